"""A board put together from its configuration: bundle, models, MQTT clients, cameras. `aiflow run` is this.

This file knows how the parts fit together. The path of a frame is in pipeline.py, what users do with a
board in users.py.
"""

import json
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import cv2

from edge_runtime import __version__
from edge_runtime.capture import Cameras, Frame
from edge_runtime.capture.camera import StateName
from edge_runtime.config import RuntimeConfig
from edge_runtime.errors import ConfigError, RestartError, StoppedError
from edge_runtime.firmware.updates import Updates, self_test, store_of
from edge_runtime.inference.backends import BackendError
from edge_runtime.inference.bundle import Bundle, BundleError, open_bundle
from edge_runtime.inference.choice import choose
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.inference.networks import Networks, load_networks
from edge_runtime.inference.references import ReferenceFrames
from edge_runtime.inference.reuse import ReusableAnswers
from edge_runtime.mqtt import Message, MqttClient, MqttConfig, Publish, State, connection_text
from edge_runtime.mqtt.routes import Route, Router
from edge_runtime.pipeline import Pipeline
from edge_runtime.planning import BoardPlanner, Measurements
from edge_runtime.planning.thermal import ThermalReader
from edge_runtime.reporting import BOARD, Events, Values, not_zero
from edge_runtime.reporting.trigger import Trigger
from edge_runtime.requests import ByteBudget, RequestTracker
from edge_runtime.sd_notify import Notifier
from edge_runtime.shutdown import Stop
from edge_runtime.users import Users
from edge_runtime.wire import Event, Options, topics

logger = logging.getLogger(__name__)

# Of the time until a request's deadline, which says for how slow an answer the user is prepared: so long it is not sent
# again as long as no reply time is known. A copy may reach another server, which computes it, perhaps pays for it, too.
UNKNOWN_SHARE = 1 / 6

BOOT = secrets.token_hex(4)  # distinguishes one start of a board from the next


class Board:
    """The parts of one board, and which of them hears what."""

    def __init__(
        self,
        config: RuntimeConfig,
        listener: Callable[[Event], None] | None = None,
        notifier: Notifier | None = None,
        stop: threading.Event | None = None,
        state_folder: Path | None = None,
    ) -> None:
        """Raises the named error of a part that can never start. A broker that is away is not an error.

        notifier: to the service manager; None: there is none. stop: if it is set while backends are tried,
        StoppedError is raised. state_folder: keeps over a restart which pictures of watched folders have been read;
        None: nothing does.
        """
        self.config, self.notifier, self._listener = config, notifier or Notifier(), listener
        board, site = config.board, config.board.site
        self._telling = threading.Lock()  # over the next one, and the order of statuses: the last one is the newest
        self.problems: dict[str, str] = {}  # part -> what is wrong with it; in the status

        for mqtt in (config.mqtt, config.near_broker):
            _ = mqtt and mqtt.settings(board.id)  # a mistake is found before the networks are loaded

        # OpenCV's own threads do not make the resize of a frame faster, and it waits for them if all cores are busy.
        cv2.setNumThreads(1)
        self.updates = self._new_updates()
        self.bundle = bundle = self.updates.bundle if self.updates else open_bundle(Path(board.bundle))
        networks, sampling = self._of_bundle(stop)

        read_pictures = state_folder / "watched" / board.id if state_folder else None
        self.thermal, self.cameras = ThermalReader(), Cameras(config.cameras, self.publish_status, read_pictures)
        self.users = Users(
            config,
            self.cameras,
            lambda: self.local,
            self.report_problem,
            on_paradigm=self.publish_status,
            on_install=self.updates.install_arrived if self.updates else None,
            has_labels=bool(bundle.manifest.classes),
        )

        # The network: requests and replies with `servers`, everything for users with `local`.
        byte_budget = ByteBudget(config.policy.bytes_per_minute)
        self.measurements = Measurements(byte_budget.spent, bundle.id.hex())
        self.reusable, self.references = ReusableAnswers(), ReferenceFrames(board.refresh_s)
        self.routers: list[Router] = []
        self.servers, self.local = self._clients()
        manifest, names = bundle.manifest, bundle.manifest.class_names
        for warning in config.bundle_warnings(names, manifest.classes, manifest.latent.level_bytes):
            logger.warning("%s", warning)
        triggers = {camera.name: [Trigger(each.when, names) for each in camera.triggers] for camera in config.cameras}
        self.events = Events(self.local, site, board.id, self._event_published, triggers)
        self.tracker = RequestTracker(
            self.servers,
            bundle,
            site,
            board.id,
            self.events,
            capacity=board.open_requests,
            resend_s=board.resend_ms / 1e3,
            outbox=config.outbox,
            observer=self.measurements,
            byte_budget=byte_budget,
            on_reply=self.references.heard,
            find_silence=self._find_silence,
            has_other_server=self.measurements.has_other_server,
            unknown_share=UNKNOWN_SHARE,
        )
        self.pipeline = self._new_pipeline(networks, sampling)

    def _new_updates(self) -> Updates | None:
        """None: the board has no [updates]."""
        config = self.config
        if config.updates is None or (store := store_of(config)) is None:
            return None
        test = partial(self_test, config)
        return Updates(store, test, self._update_state, self.publish_status, asks=config.updates.ask)

    def _of_bundle(self, stop: threading.Event | None) -> tuple[Networks, dict[str, Options]]:
        """Its networks, and how each camera's tokens are chosen. Raises BundleError, BackendError, StoppedError, and
        ConfigError for stop words that the bundle does not have; RestartError if another bundle is to run, or if no
        runtime was ready in time.
        """
        board, bundle = self.config.board, self.bundle
        try:
            _ = bundle.tables, bundle.inter_tables, bundle.words  # read now, so that a missing file is found at start
            sampling = self.config.sampling(bundle.words)
            if board.paradigm == "offload":
                return Networks(), sampling
            return fastest_networks(self.config, bundle, self.notifier.starting, stop), sampling
        except StoppedError:
            if self.updates:
                self.updates.forget_starts()
            raise
        except (BundleError, BackendError, ConfigError) as error:
            if not self.updates or not self.updates.is_trial:
                raise
            self.updates.give_up(str(error))
            raise RestartError(self.updates.restart_why) from error

    def _new_pipeline(self, networks: Networks, sampling: dict[str, Options]) -> Pipeline:
        """The path of a frame, and what decides on it."""
        board, manifest = self.config.board, self.bundle.manifest
        planner = BoardPlanner(
            self.config,
            self.cameras,
            self.users.settings,
            self.measurements,
            Calibration(manifest.draft_calibration),
            has_head=networks.head is not None,
            has_draft=networks.draft is not None,
            level_bytes=manifest.latent.level_bytes,
            has_room=self.tracker.has_room,
            sampling=sampling,
        )
        return Pipeline(
            self.bundle,
            networks,
            planner,
            self.tracker,
            self.events,
            slowdown=board.slowdown,
            sends_labels=board.labels == "send",
            reusable=self.reusable,
            references=self.references,
        )

    def run(self, stop: threading.Event) -> Values:
        """Handles frames until the sources end or `stop` is set; returns `summary`.

        Raises ConfigError for sources that can never work, and RuntimeError for anything that ends it later: that is
        not a mistake in the configuration, and the board is worth starting again. Raises RestartError after an orderly
        end, if another bundle is to run.
        """
        with ExitStack() as running:
            for client in (clients := {self.servers, self.local}):
                running.enter_context(client)
            for client in clients:
                running.callback(client.finish)  # all of them, before the first one is waited for
            running.enter_context(self.users.running())
            running.enter_context(self.tracker)
            if self.updates:
                self.updates.stop_with(stop)
                running.enter_context(self.updates)
            try:
                self.cameras.check()
            except ConfigError:  # which says nothing of the bundle
                self._forget_starts(stop)
                raise
            self.notifier.ready()  # a board works without a broker: it does not wait for one
            try:
                self.pipeline.run(self._frames(stop))
            except Exception as error:
                raise RuntimeError("the board broke while it ran") from error
            # Sources that end, such as files, leave requests open: wait for their answers until the deadline.
            own = [camera.config.deadline_ms or 0 for camera in self.cameras]
            self.tracker.wait_until_settled(max(self.config.board.deadline_ms, *own) / 1e3, stop, self._progressed)
            self.notifier.stopping()
            self._forget_starts(stop)  # before the rest of the end, which may take until the process is killed
        summary = self.summary()
        logger.info("board stopped %s", not_zero(summary))
        if self.updates and self.updates.restart_why:
            raise RestartError(f"{self.updates.restart_why}: the next start runs another bundle")
        return summary

    def _forget_starts(self, stop: threading.Event) -> None:
        """This start proves nothing against the bundle, unless one of its threads has died."""
        if self.updates and not (isinstance(stop, Stop) and stop.is_broken):
            self.updates.forget_starts()

    def _frames(self, stop: threading.Event) -> Iterator[Frame]:
        for frame in self.cameras.frames(stop, self._progressed):
            yield frame  # it has been handled then
            if self.updates:
                self.updates.frame_handled(self.pipeline.failed)
            self.users.frame_handled(frame)
            del frame  # see Frame

    def summary(self) -> Values:
        """The board's counts, with the names of reporting/counters.py; any thread."""
        rejected = Counter[str]()
        for router in self.routers:
            rejected.update(router.rejected())
        clients = {"servers": self.servers} | ({} if self.local is self.servers else {"local": self.local})
        counts = {broker: client.counts() for broker, client in clients.items()}
        return {
            **self.tracker.summary(),
            **asdict(self.cameras.totals()),
            "jpeg_bytes": self.pipeline.jpeg_bytes,
            "handled": dict(self.pipeline.handled),
            "frames_failed": self.pipeline.failed,
            "triggered": self.events.triggered,
            "reused": self.pipeline.reused,
            "with_reference": self.pipeline.with_reference,
            "rejected": dict(rejected),
            "ignored": dict(self.measurements.counts),
            **self.users.counts(),
            **{name: {broker: each[name] for broker, each in counts.items()} for name in counts["servers"]},
        }

    def numbers(self) -> Values:
        """`summary`, and what is so now; any thread."""
        states = Counter(camera.state for camera in self.cameras.states().values())
        return {
            **self.summary(),
            "paradigm": {self.users.settings["paradigm"]: 1},
            "cameras": {name: states[name] for name in get_args(StateName)},
            **self.thermal.numbers(time.monotonic()),
            "info": {__version__: 1},
        }

    def _progressed(self) -> None:
        """A frame has been handled, or none is due. This thread hangs if one of the others blocks it, except for those
        of the requests and of the MQTT clients, which it must ask.
        """
        if not (self.tracker.hangs() or self.servers.hangs() or self.local.hangs()):
            self.notifier.progress()

    def publish_status(self) -> None:
        """On any thread: every broker that has the board's status hears of the change."""
        with self._telling:
            self._tell_status()

    def _tell_status(self) -> None:
        """With the lock held."""
        status = self._status("online")
        for client in {self.servers, self.local}:
            client.send(status)

    def report_problem(self, part: str, problem: str) -> None:
        """On any thread: show in the status what is wrong with a part; "" when it works again."""
        with self._telling:
            before, now = self.problems, {**self.problems, part: problem}
            self.problems = {name: text for name, text in now.items() if text}
            if self.problems != before:
                self._tell_status()

    # ---- which messages go where ----

    def _clients(self) -> tuple[MqttClient, MqttClient]:
        """To the servers' broker and to the users' broker. Without [local] they are one."""
        board, site = self.config.board, self.config.board.site
        for_servers = [
            Route(topics.reply(site, board.id), lambda message: self.tracker.reply_arrived(message.payload)),
            Route(
                topics.server_statuses(site), self._server_status_arrived, qos=0, accepts_retained=True, optional=True
            ),
        ]
        for_servers += self.updates.routes(site, board.id) if self.updates else []
        mqtt, near = self.config.mqtt, self.config.near_broker
        users, birth = self.users.routes(), self.users.birth
        if near is None:
            both = self._client(mqtt, board.id, for_servers + users, birth, self._connection_changed)
            return both, both
        # Two ids: if both tables name one broker, two connections with one id would end each other for ever.
        servers = self._client(mqtt, board.id, for_servers, list, self._connection_changed)
        return servers, self._client(near, f"{board.id}-local", users, birth)

    def _client(
        self,
        mqtt: MqttConfig,
        client_id: str,
        routes: Sequence[Route],
        birth: Callable[[], list[Publish]],
        on_state: Callable[[State, str], None] | None = None,
    ) -> MqttClient:
        router = Router(routes)
        self.routers.append(router)
        return MqttClient(
            mqtt.settings(client_id, max_inbound_bytes=router.max_packet),
            subscriptions=router.subscriptions,
            optional=router.optional,
            on_message=router.message_arrived,
            will=self._status("offline"),
            birth=lambda: [self._status("online"), *birth()],
            on_state=on_state,
        )

    def _update_state(self, payload: bytes) -> None:
        board = self.config.board
        self.servers.publish(topics.bundle_state(board.site, board.id), payload)

    def _event_published(self, event: Event) -> None:
        self.reusable.published(event)
        self.users.event_published(event)
        if self._listener:
            self._listener(event)

    def _connection_changed(self, state: State, reason: str) -> None:
        self.notifier.status(connection_text(self.config.mqtt, state, reason))
        if state is not State.ONLINE:
            self.references.disconnected()
        if self.config.near_broker and state in (State.ONLINE, State.BACKOFF):
            mqtt = self.config.mqtt
            lost = f"no connection to {mqtt.host}:{mqtt.port}" if state is State.BACKOFF else ""
            self.report_problem("link", lost)
        if state is not State.CONNECTING:  # the first frames need not wait for the first connection
            self.measurements.connected(state in (State.ONLINE, State.DEGRADED))

    def _find_silence(self) -> str:
        """Why no server can answer now, in words; "" if one can."""
        if self.servers.state in (State.ONLINE, State.DEGRADED):
            return self.measurements.find_silence()
        mqtt = self.config.mqtt
        return f"no connection to the broker {mqtt.host}:{mqtt.port}: {self.servers.trouble or 'not yet'}"

    def _server_status_arrived(self, message: Message) -> None:
        self.measurements.status_arrived(message.topic, message.payload, time.monotonic(), message.retained)

    def _status(self, state: str) -> Publish:
        value: dict[str, Any] = {"state": state, "boot": BOOT}
        if state == "online":
            value |= {
                "version": __version__,
                "bundle": self.bundle.id.hex(),
                "bundle_name": self.bundle.manifest.name,
                "bundle_version": self.updates.version if self.updates else 0,
                "update": self.updates.status() if self.updates else None,
                "paradigm": self.users.settings["paradigm"],
                "cameras": {name: camera.state for name, camera in self.cameras.states().items()},
                "problems": self.problems,
            }
        board = self.config.board
        return Publish(topics.status(board.site, board.id), json.dumps(value).encode(), qos=1, retain=True)


def fastest_networks(
    config: RuntimeConfig,
    bundle: Bundle,
    tell: Callable[[float], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Networks:
    """As `choose` finds them: anew if what it kept no longer loads, such as after an update of the GPU's libraries.

    Raises BundleError, BackendError, RestartError, StoppedError.
    """
    board, has_labels = config.board, config.board.labels != "never"
    find = partial(choose, bundle, board.backend, config.threads, board.providers, tell, stop)
    setup = find()
    try:
        return load_networks(bundle, setup, has_labels=has_labels)
    except BackendError as error:
        logger.warning("networks not loaded, the backends are tried again: %s", error)
        return load_networks(bundle, find(again=True), has_labels=has_labels)


def run_board(
    config: RuntimeConfig,
    stop: threading.Event,
    listener: Callable[[Event], None] | None = None,
    notifier: Notifier | None = None,
    state_folder: Path | None = None,
) -> Values:
    """`Board.run` of a new board, with its numbers exported if [metrics] is configured.

    Returns {} if `stop` is set before the start is over.
    """
    try:
        board = Board(config, listener, notifier, stop, state_folder)
    except StoppedError as error:
        logger.info("board stopped: %s", error)
        return {}
    if config.metrics is None:
        return board.run(stop)
    from edge_runtime.reporting.metrics import exported  # a few megabytes that most boards need not load

    with exported(config.metrics, "board", BOARD, board.numbers, partial(board.report_problem, "metrics")):
        return board.run(stop)
