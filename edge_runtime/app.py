"""A board put together from its configuration: bundle, models, MQTT client, cameras; `aiflow run` is this.

Knows how the parts fit; what happens to a frame is in pipeline.py.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edge_runtime import __version__
from edge_runtime.capture import Cameras
from edge_runtime.config import MqttConfig, RuntimeConfig
from edge_runtime.inference.backends import load_fastest, load_model
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.inference.draft import Draft
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.inference.head import Head
from edge_runtime.inference.preprocess import PIXELS
from edge_runtime.mqtt.client import Message, MqttClient, Publish, State
from edge_runtime.pipeline import Pipeline
from edge_runtime.planning.measurements import Estimates
from edge_runtime.planning.planner import BoardPlanner
from edge_runtime.planning.policy import Policy
from edge_runtime.reporting.events import Events
from edge_runtime.reporting.remote_settings import Switches, board_switches
from edge_runtime.requests.byte_budget import Ledger
from edge_runtime.requests.tracker import Answers
from edge_runtime.wire import Event, topics

logger = logging.getLogger(__name__)

BOOT = secrets.token_hex(4)  # tells one start of a board from the next
MAX_FRAME = 8 << 20  # bytes of a packet from the broker, where camera software sends pictures
STOP_S = 10.0  # that an orderly end takes at most: both clients say what is left, the outbox writes


def load_head(bundle: Bundle, backend: str, threads: int) -> Head:
    """The bundle's head in a backend ("onnx", "litert", or "auto": the faster here of those that are installed).

    Raises BundleError, BackendError.
    """

    def load(suffix: str) -> Head:
        return Head(load_model(bundle.file(f"head{suffix}"), threads), bundle.manifest.latent.gains)

    pixels = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    return load_fastest(backend, load, lambda head: head.symbols(pixels))


def load_draft(bundle: Bundle, backend: str, threads: int) -> Draft:
    """The bundle's draft decoder in a backend; "auto" need not choose the head's. Raises BundleError, BackendError."""

    def load(suffix: str) -> Draft:
        look, step = (load_model(bundle.file(f"draft_{part}{suffix}"), threads) for part in ("look", "step"))
        return Draft(look, step, bundle.manifest.max_tokens)

    symbols = np.zeros(bundle.tables.shape, np.int8)
    return load_fastest(backend, load, lambda draft: draft.write(symbols))


class Board:
    """The parts of one board, and how they hear of each other."""

    def __init__(self, config: RuntimeConfig, listener: Callable[[Event], None] | None = None) -> None:
        """Raises the named errors of what cannot start; a broker that is away is not one of them."""
        self.config = config
        board, site = config.board, config.board.site
        # One frame's resize gains nothing from OpenCV's own pool, and waits for its workers where cores are busy.
        cv2.setNumThreads(board.threads)
        self.bundle = bundle = open_bundle(Path(board.bundle))
        _ = bundle.tables, bundle.words  # a file that is missing is found at start
        only_offloads = board.paradigm == "offload"  # a board without a head
        head = None if only_offloads else load_head(bundle, board.backend, board.threads)
        draft = None if only_offloads else load_draft(bundle, board.backend, board.threads)
        self.cameras = Cameras(config.cameras, self._camera_changed)
        self.switches = Switches(site, board.id, board_switches(config, self.cameras))
        ledger = Ledger(config.policy.bytes_per_minute)
        self.estimates = Estimates(ledger)
        self.servers, self.local = self._clients()
        self.events = Events(self.local, site, board.id, listener)
        self.answers = Answers(
            self.servers,
            bundle,
            site,
            board.id,
            self.events,
            board.open_requests,
            board.resend_ms / 1e3,
            config.outbox,
            self.estimates,
            ledger,
        )
        new_policy = partial(
            Policy,
            config.policy,
            has_head=head is not None,
            has_draft=draft is not None,
            calibration=Calibration(bundle.manifest.draft_calibration),
        )
        planner = BoardPlanner(config, self.cameras, self.switches, new_policy, self.estimates, self.answers.has_room)
        self.pipeline = Pipeline(bundle, head, draft, planner, self.answers, self.events, board.slowdown)

    def run(self, stop: threading.Event) -> dict[str, int]:
        """Until the sources end or `stop` is set; returns what became of the requests.

        Raises PictureError for sources that can never work, and RuntimeError for whatever ends it later: that is no
        mistake of the configuration, and the board is worth starting again.
        """
        with ExitStack() as running:
            clients = {self.servers, self.local}
            for client in clients:
                running.enter_context(client)
            for client in clients:
                running.callback(client.finish)  # all of them, before the first one is waited for
            running.enter_context(self.answers)
            self.cameras.check()
            try:
                self.pipeline.run(self.cameras.frames(stop))
            except Exception as error:
                raise RuntimeError("the board broke while it ran") from error
            # Sources that end, such as files, leave questions open: their answers are waited for, up to the deadline.
            own = [camera.config.deadline_ms or 0 for camera in self.cameras]
            self.answers.wait_until_settled(max(self.config.board.deadline_ms, *own) / 1e3, stop)
        summary = self.summary()
        logger.info("board stopped %s", " ".join(f"{name}={value}" for name, value in summary.items()))
        return summary

    def summary(self) -> dict[str, int]:
        """Every counter; any thread."""
        mqtt = {f"mqtt_{name}": count for name, count in asdict(self.servers.stats()).items()}
        if self.local is not self.servers:
            mqtt |= {f"local_{name}": count for name, count in asdict(self.local.stats()).items()}
        failed = {"frames_failed": self.pipeline.failed}
        switched = {f"switch_{name}": count for name, count in asdict(self.switches.counters).items()}
        ignored = {f"ignored_{name}": count for name, count in self.estimates.counts.items()}
        return self.answers.summary() | failed | asdict(self.cameras.totals()) | switched | ignored | mqtt

    def _clients(self) -> tuple[MqttClient, MqttClient]:
        """To the servers' broker, and to the near one of the users: the same where only one is configured."""
        board, site = self.config.board, self.config.board.site
        for_servers = [(topics.reply(site, board.id), 1), (topics.server_statuses(site), 0)]
        frames = [(topics.frame(site, board.id), 0)] if self.cameras.mqtt_cameras() else []
        for_users = [self.switches.subscription, *frames]
        if (near := self.config.near_broker) is None:
            one = self._client(self.config.mqtt, for_servers + for_users, self._told)
            return one, one
        local = self._client(near, for_users)
        return self._client(self.config.mqtt, for_servers, self._told), local

    def _client(
        self,
        mqtt: MqttConfig,
        subscriptions: list[tuple[str, int]],
        on_state: Callable[[State, str], None] | None = None,
    ) -> MqttClient:
        limits = {"max_inbound_bytes": MAX_FRAME} if self.cameras.mqtt_cameras() else {}
        births = self.switches.births if self.switches.subscription in subscriptions else list
        return MqttClient(
            mqtt.settings(self.config.board.id, **limits),
            subscriptions=subscriptions,
            optional=[topics.server_statuses(self.config.board.site)],  # replies tell the same, later
            on_message=self._heard,
            will=self._status("offline"),
            birth=lambda: [self._status("online"), *births()],
            on_state=on_state,
        )

    def _told(self, state: State, _: str) -> None:
        if state is not State.CONNECTING:  # the first frames need not wait for the first connection
            self.estimates.connected(state in (State.ONLINE, State.DEGRADED))

    def _heard(self, message: Message) -> None:
        """On a client's thread: to whom a message is for."""
        board, site = self.config.board, self.config.board.site
        if message.topic == topics.reply(site, board.id):
            self.answers.reply_arrived(message.payload)
        elif message.topic == topics.frame(site, board.id):
            self.cameras.arrived(None, message.payload)
        elif not self.switches.heard(message, self.local):
            self.estimates.status_arrived(message.topic, message.payload, time.monotonic())

    def _camera_changed(self) -> None:
        """On any thread: whoever reads the status need not wait for the next connection."""
        status = self._status("online")
        self.local.publish(status.topic, status.payload, qos=status.qos, retain=status.retain)

    def _status(self, state: str) -> Publish:
        value: dict[str, Any] = {"state": state, "boot": BOOT}
        if state == "online":
            value |= {
                "version": __version__,
                "bundle": self.bundle.id.hex(),
                "paradigm": self.switches["paradigm"],
                "cameras": {name: camera.state for name, camera in self.cameras.states().items()},
            }
        board = self.config.board
        return Publish(topics.status(board.site, board.id), json.dumps(value).encode(), qos=1, retain=True)


def run_board(
    config: RuntimeConfig, stop: threading.Event, listener: Callable[[Event], None] | None = None
) -> dict[str, int]:
    """`Board.run` of a new board, with its counters exported where that is configured."""
    board = Board(config, listener)
    if config.metrics is None:
        return board.run(stop)
    from edge_runtime.reporting.metrics import (  # a few megabytes that most boards need not carry
        BOARD,
        by_kind,
        exported,
    )

    with exported(config.metrics, "board", BOARD, lambda: by_kind(BOARD, board.summary())):
        return board.run(stop)
