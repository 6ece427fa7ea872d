"""A board put together from its configuration: bundle, models, MQTT client, cameras; `aiflow run` is this.

Knows how the parts fit; what happens to a frame is in pipeline.py.
"""

import json
import logging
import secrets
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2

from edge_runtime import __version__
from edge_runtime.answers import Answers
from edge_runtime.backends import SUFFIXES, choose, load_model
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.config import MqttConfig, RuntimeConfig
from edge_runtime.draft import Draft
from edge_runtime.events import Events
from edge_runtime.head import Head
from edge_runtime.mqtt import Message, MqttClient, Publish
from edge_runtime.pipeline import Fixed, Pipeline, Plan
from edge_runtime.sources import Cameras
from edge_runtime.switches import Switches, board_switches
from edge_runtime.wire import Event, Tier, topics
from edge_runtime.wire.event import ParadigmName

logger = logging.getLogger(__name__)


def load_head(bundle: Bundle, backend: str, threads: int) -> Head:
    """The bundle's head in a backend ("onnx", "litert" or "auto"). Raises BundleError, BackendError."""
    suffix = SUFFIXES[choose(backend)]
    return Head(load_model(bundle.file(f"head{suffix}"), threads), bundle.manifest.latent.gains)


def load_draft(bundle: Bundle, backend: str, threads: int) -> Draft:
    """The bundle's draft decoder in a backend. Raises BundleError, BackendError."""
    suffix = SUFFIXES[choose(backend)]
    look, step = (load_model(bundle.file(f"draft_{part}{suffix}"), threads) for part in ("look", "step"))
    return Draft(look, step, bundle.manifest.max_tokens)


def run_board(
    config: RuntimeConfig, stop: threading.Event, listener: Callable[[Event], None] | None = None
) -> dict[str, int]:
    """Runs until the sources end or `stop` is set; returns what became of the requests.

    Raises the named errors of what cannot start; a broker that is away is not one of them.
    """
    board, site = config.board, config.board.site
    # One frame's resize gains nothing from OpenCV's own pool, and waits for its workers where cores are busy.
    cv2.setNumThreads(board.threads)
    bundle = open_bundle(Path(board.bundle))
    _ = bundle.tables, bundle.words  # a file that is missing is found at start
    only_offloads = board.paradigm == "offload"  # a board without a head
    head = None if only_offloads else load_head(bundle, board.backend, board.threads)
    draft = None if only_offloads else load_draft(bundle, board.backend, board.threads)
    tier = Tier[board.tier.upper()] if board.tier else None
    paradigm: ParadigmName = "speculative" if board.paradigm == "auto" else board.paradigm
    plan = Plan(paradigm, "configured", board.deadline_ms, tier, board.jpeg_quality)

    cameras = Cameras(config.cameras)
    switches = Switches(site, board.id, board_switches(config, cameras))
    reply_topic = topics.reply(site, board.id)
    boot = secrets.token_hex(4)

    def from_servers(message: Message) -> None:
        if message.topic == reply_topic:
            answers.reply_arrived(message.payload)
        else:
            from_users(message)

    def from_users(message: Message) -> None:
        if not switches.heard(message, local):
            cameras.arrived(message.payload)

    def status(state: str) -> Publish:
        value: dict[str, Any] = {"state": state, "boot": boot}
        if state == "online":
            value |= {"version": __version__, "bundle": bundle.id.hex(), "paradigm": board.paradigm}
        return Publish(topics.status(site, board.id), json.dumps(value).encode(), qos=1, retain=True)

    def client(mqtt: MqttConfig, topics: list[tuple[str, int]], heard: Callable[[Message], None]) -> MqttClient:
        births = switches.births if switches.subscription in topics else list
        return MqttClient(
            mqtt.settings(board.id),
            subscriptions=topics,
            on_message=heard,
            will=status("offline"),
            birth=lambda: [status("online"), *births()],
        )

    for_servers = [(reply_topic, 1)]
    for_users = [switches.subscription] + [(topics.frame(site, board.id), 0)] * cameras.wants_pictures
    if config.local:
        servers = client(config.mqtt, for_servers, from_servers)
        local = client(config.local, for_users, from_users)
    else:
        servers = local = client(config.mqtt, for_servers + for_users, from_servers)
    events = Events(local, site, board.id, listener)
    answers = Answers(
        servers, bundle, site, board.id, events, board.open_requests, board.resend_ms / 1e3, config.outbox
    )
    pipeline = Pipeline(bundle, head, draft, Fixed(plan), answers, events, board.slowdown)
    with ExitStack() as running:
        for each in {servers, local}:
            running.enter_context(each)
        running.enter_context(answers)
        pipeline.run(cameras.frames(stop))
        # Sources that end, such as files, leave questions open: their answers are waited for, up to the deadline.
        answers.wait_until_settled(board.deadline_ms / 1e3, stop)
    mqtt = {f"mqtt_{name}": count for name, count in asdict(servers.stats()).items()}
    summary = answers.summary() | {"frames_failed": pipeline.failed} | asdict(cameras.totals()) | mqtt
    logger.info("board stopped %s", " ".join(f"{name}={value}" for name, value in summary.items()))
    return summary


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
