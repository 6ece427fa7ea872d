"""A board put together from its configuration: bundle, models, MQTT client, cameras; `aiflow run` is this.

Knows how the parts fit; what happens to a frame is in pipeline.py.
"""

import json
import logging
import secrets
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2

from edge_runtime import __version__
from edge_runtime.answers import Answers
from edge_runtime.backends import SUFFIXES, choose, load_model
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.config import RuntimeConfig
from edge_runtime.draft import Draft
from edge_runtime.events import Events
from edge_runtime.head import Head
from edge_runtime.mqtt import Message, MqttClient, Publish
from edge_runtime.pipeline import Pipeline, Plan
from edge_runtime.sources import ArrivingFrames, Counters, merged_frames
from edge_runtime.wire import Event, Tier, topics

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
    head = load_head(bundle, board.backend, board.threads) if board.paradigm != "offload" else None
    drafts = board.paradigm in ("device", "speculative")
    draft = load_draft(bundle, board.backend, board.threads) if drafts else None
    tier = Tier[board.tier.upper()] if board.tier else None
    plan = Plan(board.paradigm, "configured", board.deadline_ms, tier, board.jpeg_quality)

    counters = Counters()
    arriving = {c.name: ArrivingFrames(c, counters) for c in config.cameras if c.source == "mqtt"}
    reply_topic = topics.reply(site, board.id)
    boot = secrets.token_hex(4)

    def on_message(message: Message) -> None:
        if message.topic == reply_topic:
            answers.reply_arrived(message.payload)
        else:
            for source in arriving.values():
                source.arrived(message.payload)

    def status(state: str) -> Publish:
        value: dict[str, Any] = {"state": state, "boot": boot}
        if state == "online":
            value |= {"version": __version__, "bundle": bundle.id.hex(), "paradigm": board.paradigm}
        return Publish(topics.status(site, board.id), json.dumps(value).encode(), qos=1, retain=True)

    subscriptions = [(reply_topic, 1)] + [(topics.frame(site, board.id), 0)] * bool(arriving)
    client = MqttClient(
        config.mqtt.settings(board.id),
        subscriptions=subscriptions,
        on_message=on_message,
        will=status("offline"),
        birth=lambda: [status("online")],
    )
    events = Events(client, site, board.id, listener)
    answers = Answers(client, bundle, site, board.id, events, board.open_requests, board.resend_ms / 1e3)
    pipeline = Pipeline(bundle, head, draft, plan, answers, events)
    with client, answers:
        pipeline.run(merged_frames(config.cameras, arriving, stop, counters))
        # Sources that end, such as files, leave questions open: their answers are waited for, up to the deadline.
        answers.wait_until_settled(board.deadline_ms / 1e3, stop)
    mqtt = {f"mqtt_{name}": count for name, count in asdict(client.stats()).items()}
    summary = answers.summary() | {"frames_failed": pipeline.failed} | asdict(counters) | mqtt
    logger.info("board stopped %s", " ".join(f"{name}={value}" for name, value in summary.items()))
    return summary


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
