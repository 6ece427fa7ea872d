"""What every row stands on: two brokers, servers, one board per row, and somebody who hears all events.

The board's events and frames go over a broker of their own, its [local] one, so that they are heard whatever happens to
the servers' broker. The harness has one thread: it shows frames and takes events in `watch`, and signals in between.
"""

import json
import queue
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.faults.accounts import Ledger
from benchmarks.faults.processes import UNBOUNDED, Aiflow, Broker
from edge_runtime.config import MqttConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt.client import Message, MqttClient
from edge_runtime.wire import decode_event, topics
from testbed.link_simulator import Link
from testbed.processes import START_S, ChildError
from testbed.shaping import PROFILES

SITE, SERVER, SPARE = "faults", "server-a", "server-b"
RECOVERY_S = 60.0  # what is allowed between the end of a fault and the first answer
SETTLE_S = 60.0  # for what is open or kept when the last frame has come
KEEPALIVE_S = 4  # quicker than in the field, so that a row need not last minutes


class NotRunError(Exception):
    """A fault that cannot be brought about on this machine."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault: `play` brings it about and ends it."""

    name: str
    fault: str  # for the table
    play: "Callable[[Trial], None]"
    seconds: float = 4.0  # how long it lasts
    outbox: bool = True  # without it, what is not answered in time is lost
    sabotage: str | None = None  # the board has this fault inside, see saboteur.py
    is_gentle: bool = False  # servers and brokers notice nothing: the next row may go on with them
    by_default: bool = True


@dataclass
class Result:
    """What was seen. held: None for a fault that was not brought about."""

    fault: str
    accepted: int = 0
    answered: int = 0
    lost: int = 0
    duplicates: int = 0
    recovery_s: float | None = None  # from the end of the fault to the first answer
    held: bool | None = None
    row: str = ""
    kept: int = 0  # still in the outbox when the row ended
    gaps: int = 0  # among `lost`: rows that a damaged spool had, reported as a number
    unsettled: int = 0  # accepted, and no final event
    fault_s: float = 0.0
    answers_in_fault: int = 0
    first_events_in_fault: int = 0
    note: str = ""
    reasons: dict[str, int] = field(default_factory=dict)  # of the losses
    rss_slope: dict[str, float] = field(default_factory=dict)  # MiB per 10 minutes, of a soak
    board: dict[str, int] = field(default_factory=dict)  # what the board's last life counted


class Stage:
    """Brokers and servers; they serve several rows where these leave them alone."""

    def __init__(self, folder: Path, bundle: Bundle, photos: list[bytes], say: Callable[[str], None]) -> None:
        self.folder, self.bundle, self.photos, self.say = folder, bundle, photos, say
        self.broker, self.local = Broker(folder, "broker"), Broker(folder, "local", UNBOUNDED)
        while self.local.port == self.broker.port:  # both are free until one is taken
            self.local = Broker(folder, "local", UNBOUNDED)
        self.servers = {name: self._server(name) for name in (SERVER, SPARE)}
        self.heard: queue.SimpleQueue[tuple[float, Message]] = queue.SimpleQueue()
        self._running = ExitStack()

    def __enter__(self) -> "Stage":
        with ExitStack() as stack:
            for process in (self.broker, self.local, *self.servers.values()):
                stack.callback(process.stop)
            self.broker.start()
            self.local.start()
            settings = MqttConfig(port=self.local.port).settings("harness", queue_messages=4096)
            self.client = MqttClient(
                settings,
                subscriptions=[(f"{topics.ROOT}/{SITE}/+/up/event", 1)],
                on_message=lambda message: self.heard.put((time.monotonic(), message)),
            )
            stack.enter_context(self.client)
            if not self.client.wait_online(START_S):
                raise ChildError(f"the local broker does not answer: {self.client.reason}")
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def start_servers(self, *names: str) -> None:
        """Those that do not run yet."""
        for name in names:
            if not self.servers[name].is_running():
                self.servers[name].start()

    def _server(self, name: str) -> Aiflow:
        server = {"id": name, "site": SITE, "bundle": str(self.bundle.path), "tier": "edge"}
        mqtt = {"port": self.broker.port, "keepalive_s": KEEPALIVE_S}
        return Aiflow("serve", {"server": server, "mqtt": mqtt}, self.folder, name)


class Trial:
    """One row under way: its board, its frames, its events."""

    def __init__(self, stage: Stage, row: Row, seconds: float | None) -> None:
        self.stage, self.row, self.seconds = stage, row, row.seconds if seconds is None else seconds
        self.ledger, self.notes, self.unseen = Ledger(), list[str](), list[str]()
        self.rss_slope: dict[str, float] = {}
        self.name = f"board-{row.name}"
        self.spool = stage.folder / self.name / "outbox.sqlite"
        self.interval_s = 0.25  # between frames
        self.tables: dict[str, Any] = {
            "board": {
                "id": self.name,
                "site": SITE,
                "bundle": str(stage.bundle.path),
                "paradigm": "speculative",
                "deadline_ms": 2500,
                "resend_ms": 500,
            },
            "cameras": [{"name": "cam", "source": "mqtt"}],
            "mqtt": {"port": stage.broker.port, "keepalive_s": KEEPALIVE_S},
            "local": {"port": stage.local.port},
        }
        if row.outbox:
            self.tables["outbox"] = {"file": str(self.spool), "replay_per_s": 20.0}
        self.injected = self.healed = self._next_frame = 0.0
        self.lives = 0  # of the board
        self.asked = 0  # by boards that the harness plays, see crowd.py
        self._shows = False
        self._photos: Iterator[bytes] = cycle(stage.photos)
        self._topics = {topics.event(SITE, self.name)}
        self.closing = ExitStack()

    # ---- what rows are written with ----

    def begin(self, *servers: str) -> None:
        """Servers and the board run, frames come, and answers flow."""
        self.serve(*servers or (SERVER,), meanwhile=self.start_board)
        self.show_frames()
        self.await_answers()

    def serve(self, *servers: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until requests reach them. Raises ChildError for one that ends instead."""
        self.stage.start_servers(*servers)
        self._served = [self.stage.servers[name] for name in servers]
        meanwhile()
        proven: set[str] = set()

        def heard(message: Message) -> None:
            status = json.loads(message.payload)
            if status.get("share_proven"):
                proven.add(status["server"])

        def are_proven() -> bool:
            for process in self._served:
                process.check()
            return proven == set(servers)

        settings = MqttConfig(port=self.stage.broker.port).settings("harness")
        everything = [(topics.server_status(SITE, name), 1) for name in servers]
        with MqttClient(settings, subscriptions=everything, on_message=heard):
            if not self.watch(START_S, are_proven):
                raise ChildError(
                    f"servers did not start within {START_S:.0f} s: try again when the machine is less busy"
                )

    def start_board(self) -> None:
        self.spool.parent.mkdir(exist_ok=True)
        self.board = Aiflow("run", self.tables, self.stage.folder, self.name, self.row.sabotage)
        self.closing.callback(self.board.stop)
        self.board.start()
        self.lives += 1

    def show_frames(self, shows: bool = True) -> None:
        self._shows = shows

    def await_answers(self) -> None:
        """Until some frames were answered. Raises ChildError when a process ends instead."""
        began = time.monotonic()

        def are_there() -> bool:
            for process in (self.board, *self._served):
                process.check()
            return self.ledger.answers(began) >= 4

        if not self.watch(START_S, are_there):
            raise ChildError(f"no answers before the fault; the board said last: {self.board.said()[-1500:]}")

    def through_link(self, cut_in_outage: bool = False) -> Link:
        """Between the board and the servers' broker."""
        target = ("127.0.0.1", self.stage.broker.port)
        link = self.closing.enter_context(Link(target, PROFILES["wifi"], cut_in_outage=cut_in_outage))
        self.tables["mqtt"] |= {"port": link.port}
        return link

    def inject(self) -> None:
        """From now on the fault is there. Call it behind what brings it about."""
        self.injected = time.monotonic()
        self.stage.say(f"{self.row.name}: fault")

    def last(self, seconds: float | None = None) -> None:
        """The fault stays for its time."""
        self.watch(self.seconds if seconds is None else seconds)

    def heal(self) -> None:
        """From now on the fault is gone. Call it before what ends it returns."""
        self.healed = time.monotonic()
        self.stage.say(f"{self.row.name}: healed")

    def expect(self, seen: bool, what: str) -> None:
        """What else must have been seen for the row to hold; or, that the fault happened at all."""
        if not seen:
            self.unseen.append(what)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def watch(self, timeout_s: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Shows frames and takes events until it is so, or the time is up. False: the time is up."""
        end = time.monotonic() + timeout_s
        while not until():
            now = time.monotonic()
            if now >= end:
                return False
            wait = end - now
            if self._shows:
                if now >= self._next_frame:
                    self._next_frame = max(now, self._next_frame + self.interval_s)
                    self.stage.client.publish(topics.frame(SITE, self.name), next(self._photos), qos=0)
                wait = min(wait, max(0.0, self._next_frame - now))
            self._take(min(wait, 0.2))
        return True

    def also_hear(self, *boards: str) -> None:
        self._topics |= {topics.event(SITE, board) for board in boards}

    def _take(self, timeout_s: float) -> None:
        try:
            at, message = self.stage.heard.get(timeout=max(0.001, timeout_s))
        except queue.Empty:
            return
        if message.topic in self._topics:
            self.ledger.take(decode_event(message.payload), at, message.topic)

    # ---- what is the same in all rows ----

    def run(self) -> Result:
        """Brings the fault about, waits until all is settled, and counts."""
        result = Result(self.row.fault, row=self.row.name)
        with self.closing:
            try:
                self.row.play(self)
                recovered = self.watch(RECOVERY_S, lambda: self.ledger.first_answer(self.healed) is not None)
                self.show_frames(False)
                self.watch(SETTLE_S, self._is_settled)
                self._end_board()
            except NotRunError as error:
                result.note = str(error)
                return result
        self._count(result)
        first = self.ledger.first_answer(self.healed)
        result.recovery_s = None if first is None else round(first - self.healed, 2)
        self.expect(recovered, f"an answer within {RECOVERY_S:.0f} s")
        self.expect(result.accepted == result.answered + result.lost, "an end of every accepted request")
        self.expect(result.duplicates == 0, "one end per frame")
        result.held = not self.unseen
        if result.gaps:
            self.note(f"{result.gaps} of the lost reported as a number, their content is gone")
        result.note = "; ".join(self.notes + [f"not seen: {what}" for what in self.unseen])
        return result

    def _is_settled(self) -> bool:
        # Also what the last frames become, which the board may not have looked at yet.
        quiet = self.stage.heard.empty() and self.ledger.tally().unsettled == self._gaps()
        return quiet and not self.watch(1.0, lambda: not self.stage.heard.empty())

    def _gaps(self) -> int:
        """What a damaged spool lost: the board tells how many, nobody can say which frames."""
        said = self.board.said() if hasattr(self, "board") else ""
        return sum(map(int, re.findall(r"outbox rows lost count=(\d+)", said)))

    def _end_board(self) -> None:
        """SIGTERM: what is still open ends as lost, what is kept stays kept."""
        if hasattr(self, "board"):
            self.board.check()
            self.board.signal(signal.SIGTERM)
            if code := self.board.process.returncode:
                raise ChildError(f"the board ended with exit code {code}; it said last: {self.board.said()[-6000:]}")
            while self.watch(1.0, lambda: not self.stage.heard.empty()):  # its last events, however busy the machine is
                self._take(0.0)

    def _count(self, result: Result) -> None:
        tally = self.ledger.tally()
        for name in ("accepted", "answered", "lost", "duplicates", "kept", "unsettled"):
            setattr(result, name, getattr(tally, name))
        result.fault_s = round(self.healed - self.injected, 2)
        result.answers_in_fault = self.ledger.answers(self.injected, self.healed)
        result.first_events_in_fault = self.ledger.news(self.injected, self.healed)
        result.reasons, result.rss_slope = dict(self.ledger.reasons), self.rss_slope
        if hasattr(self, "board"):
            result.board = self.board.summary()
            result.gaps = self._gaps()
            result.lost += result.gaps
            self.expect(bool(result.board), "the board's orderly end")
        if self.lives <= 1:  # a killed life told nobody what it counted
            counted = self.asked + result.board.get("accepted", 0)
            self.expect(counted == tally.accepted, f"events of all requests that were counted, {counted}")
