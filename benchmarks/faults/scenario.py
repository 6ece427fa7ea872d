"""What all scenarios of the fault matrix share: a board, its frames, its events, and the final count.

The benchmark has one thread: it sends frames and reads events in `Scenario.wait`, and causes faults in between.
"""

import queue
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from benchmarks.faults.frame_records import FrameCounts, FrameRecords
from benchmarks.faults.site import KEEPALIVE_S, SERVER, SITE, FaultSite
from edge_runtime.wire import topics
from testbed.link_simulator import LinkSimulator
from testbed.processes import START_S, AiflowProcess, Process, ProcessError, read_event, wait_serving
from testbed.shaping import PROFILES

RECOVERY_S = 60.0  # allowed between the end of a fault and the first answer
SETTLE_S = 60.0  # allowed after the last frame for requests that are still open or kept


class NotRunError(Exception):
    """This machine cannot cause the fault."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the fault matrix. `play` causes the fault and ends it."""

    name: str
    title: str  # in the table
    play: "Callable[[Scenario], None]"
    seconds: float = 4.0  # how long the fault lasts
    outbox: bool = True  # without it, a request that is not answered in time is lost
    fault_inside: str | None = None  # a fault of fault_injection.py inside the board's process
    shares_site: bool = False  # brokers and servers stay unharmed: the next scenario may use them
    by_default: bool = True


@dataclass
class FaultResult:
    """The result of a scenario. held: None if the fault could not be caused."""

    fault: str
    accepted: int = 0
    answered: int = 0
    lost: int = 0
    duplicates: int = 0
    recovery_s: float | None = None  # from the end of the fault to the first answer
    held: bool | None = None
    row: str = ""
    kept: int = 0  # still in the outbox at the end
    gaps: int = 0  # of `lost`: rows of a damaged outbox, which the board reports as a number
    unsettled: int = 0  # accepted, without a final event
    fault_s: float = 0.0
    answers_in_fault: int = 0
    first_events_in_fault: int = 0
    note: str = ""
    reasons: dict[str, int] = field(default_factory=dict)  # of the losses
    memory_slope: dict[str, float] = field(default_factory=dict)  # MiB per 10 minutes, of a soak
    board: dict[str, int] = field(default_factory=dict)  # the counters of the board's last process


class Scenario:
    """One fault of the matrix while it runs."""

    def __init__(self, site: FaultSite, fault: Fault, seconds: float | None) -> None:
        """seconds: how long the fault lasts; None: the fault's own duration."""
        self.site, self.fault, self.seconds = site, fault, fault.seconds if seconds is None else seconds
        self.records, self.notes, self.unseen = FrameRecords(), list[str](), list[str]()
        self.memory_slope: dict[str, float] = {}
        self.name = f"board-{fault.name}"
        self.outbox = site.folder / self.name / "outbox.sqlite"
        self.interval_s = 0.25  # between frames
        self.tables: dict[str, Any] = {
            "board": {
                "id": self.name,
                "site": SITE,
                "bundle": str(site.bundle.path),
                "paradigm": "speculative",
                "deadline_ms": 2500,
                "resend_ms": 500,
            },
            "cameras": [{"name": "cam", "source": "mqtt"}],
            "mqtt": {"port": site.broker.port, "keepalive_s": KEEPALIVE_S},
            "local": {"port": site.local.port},
        }
        if fault.outbox:
            self.tables["outbox"] = {"file": str(self.outbox), "replay_per_s": 20.0}
        self.started_at = self.ended_at = self._next_frame = 0.0  # of the fault
        self.board: AiflowProcess | None = None
        self.board_starts = 0
        self.asked = 0  # requests of the boards that load.py simulates
        self._sends_frames = False
        self._photos: Iterator[bytes] = cycle(site.photos)
        self._topics = {topics.event(SITE, self.name)}
        self._servers: list[Process] = []
        self.closing = ExitStack()

    # ---- the steps of which scenarios are made ----

    def begin(self, *servers: str) -> None:
        """Starts servers and the board, sends frames, and waits for answers."""
        self.start_servers(*servers or (SERVER,), meanwhile=self.start_board)
        self.send_frames()
        self.wait_for_answers()

    def start_servers(self, *servers: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Waits until requests reach them. Raises ProcessError if one ends instead."""
        self._servers = [self.site.processes[name] for name in servers]
        for server in self._servers:
            if not server.is_running():
                server.start()
        meanwhile()
        for name, server in zip(servers, self._servers, strict=True):
            wait_serving(server, self.site.broker.port, SITE, name)

    def start_board(self) -> AiflowProcess:
        self.outbox.parent.mkdir(exist_ok=True)
        inside = ["benchmarks.faults.fault_injection", self.fault.fault_inside] if self.fault.fault_inside else []
        self.board = AiflowProcess("run", self.tables, self.site.folder, self.name, inside)
        self.closing.callback(self.board.stop)
        self.board.start()
        self.board_starts += 1
        return self.board

    def send_frames(self, sends: bool = True) -> None:
        self._sends_frames = sends

    def wait_for_answers(self) -> None:
        """Waits until some frames are answered. Raises ProcessError if a process ends instead."""
        began = time.monotonic()

        def are_there() -> bool:
            self._check_running()
            return self.records.answers(began) >= 4

        if not self.wait(START_S, are_there):
            raise ProcessError(f"no answers before the fault; the board said last: {self.board_log()[-1500:]}")

    def add_link(self, cut_in_outage: bool = False) -> LinkSimulator:
        """Puts a simulated link between the board and the servers' broker."""
        target = ("127.0.0.1", self.site.broker.port)
        link = self.closing.enter_context(LinkSimulator(target, PROFILES["wifi"], cut_in_outage=cut_in_outage))
        self.tables["mqtt"] |= {"port": link.port}
        return link

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Begins, then lets nothing pass between the board and the servers' broker during the block."""
        link = self.add_link()
        self.begin()
        link.set(PROFILES["outage"])
        yield
        link.set(PROFILES["wifi"])

    def fault_started(self) -> None:
        """Call it after the action that causes the fault."""
        self.started_at = time.monotonic()
        self.site.say(f"{self.fault.name}: fault")

    def hold(self, seconds: float | None = None) -> None:
        """Keeps the fault for its duration, or for this time."""
        self.wait(self.seconds if seconds is None else seconds)

    def fault_ended(self) -> None:
        """Call it before the action that ends the fault returns."""
        self.ended_at = time.monotonic()
        self.site.say(f"{self.fault.name}: fault ended")

    def hold_fault(self, seconds: float | None = None) -> None:
        """Call it between the action that causes the fault and the one that ends it: keeps the fault for this time."""
        self.fault_started()
        self.hold(seconds)
        self.fault_ended()

    def expect(self, seen: bool, what: str) -> None:
        """Adds a condition without which the row does not hold, such as that the fault happened at all."""
        if not seen:
            self.unseen.append(what)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def counts(self) -> FrameCounts:
        """What became of the frames so far."""
        return self.records.counts()

    def board_log(self) -> str:
        return self.board.said() if self.board else ""

    def signal_board(self, number: int) -> None:
        assert self.board
        self.board.signal(number)

    def wait(self, timeout_s: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Sends frames and reads events until the condition is true. False: the time was up first."""
        end = time.monotonic() + timeout_s
        while not until():
            now = time.monotonic()
            if now >= end:
                return False
            pause = end - now
            if self._sends_frames:
                if now >= self._next_frame:
                    self._next_frame = max(now, self._next_frame + self.interval_s)
                    self.site.client.publish(topics.frame(SITE, self.name), next(self._photos), qos=0)
                pause = min(pause, max(0.0, self._next_frame - now))
            self._read(min(pause, 0.2))
        return True

    def count_also(self, *boards: str) -> None:
        """Counts the events of these boards too."""
        self._topics |= {topics.event(SITE, board) for board in boards}

    def _read(self, timeout_s: float) -> None:
        try:
            at, message = self.site.messages.get(timeout=max(0.001, timeout_s))
        except queue.Empty:
            return
        if message.topic in self._topics:
            event = read_event(message.payload)
            self.expect(event is not None, "events that can be read")
            if event:
                self.records.add(event, at, message.topic)

    def _check_running(self) -> None:
        for process in (*([self.board] if self.board else []), *self._servers):
            process.check_running()

    # ---- the same in all scenarios ----

    def run(self) -> FaultResult:
        """Causes the fault, waits until every request has ended, and counts."""
        result = FaultResult(self.fault.title, row=self.fault.name)
        with self.closing:
            try:
                self.fault.play(self)
                recovered = self.wait(RECOVERY_S, lambda: self.records.first_answer(self.ended_at) is not None)
                self.send_frames(False)
                self.wait(SETTLE_S, self._is_settled)
                self._end_board()
            except NotRunError as error:
                result.note = str(error)
                return result
        self._count(result)
        first = self.records.first_answer(self.ended_at)
        result.recovery_s = None if first is None else round(first - self.ended_at, 2)
        self.expect(recovered, f"an answer within {RECOVERY_S:.0f} s")
        self.expect(result.accepted == result.answered + result.lost, "an end of every accepted request")
        self.expect(result.duplicates == 0, "one end per frame")
        result.held = not self.unseen
        if result.gaps:
            self.note(f"{result.gaps} of the lost reported as a number, their content is gone")
        result.note = "; ".join(self.notes + [f"not seen: {what}" for what in self.unseen])
        return result

    def _is_settled(self) -> bool:
        # The last frames count too, although the board may not have read them yet.
        quiet = self.site.messages.empty() and self.counts.unsettled == self._gaps()
        return quiet and not self.wait(1.0, lambda: not self.site.messages.empty())

    def _gaps(self) -> int:
        """Requests lost with a damaged outbox. The board reports their number; which frames they were is not known."""
        return sum(map(int, re.findall(r"outbox rows lost count=(\d+)", self.board_log())))

    def _end_board(self) -> None:
        """SIGTERM: open requests end as lost, kept ones stay in the outbox."""
        if not self.board:
            return
        self.board.check_running()
        self.board.signal(signal.SIGTERM)
        self.board.has_ended()
        while self.wait(1.0, lambda: not self.site.messages.empty()):  # its last events, however busy the machine is
            self._read(0.0)

    def _count(self, result: FaultResult) -> None:
        counts = self.counts
        for name in ("accepted", "answered", "lost", "duplicates", "kept", "unsettled"):
            setattr(result, name, getattr(counts, name))
        result.fault_s = round(self.ended_at - self.started_at, 2)
        result.answers_in_fault = self.records.answers(self.started_at, self.ended_at)
        result.first_events_in_fault = self.records.first_events(self.started_at, self.ended_at)
        result.reasons, result.memory_slope = dict(self.records.reasons), self.memory_slope
        if self.board:
            result.board = final_counters(self.board_log())
            result.gaps = self._gaps()
            result.lost += result.gaps
            self.expect(bool(result.board), "the board's orderly end")
        if self.board_starts <= 1:  # a killed process reported no counters
            counted = self.asked + result.board.get("accepted", 0)
            self.expect(counted == counts.accepted, f"events of all requests that were counted, {counted}")


def final_counters(log: str) -> dict[str, int]:
    """The counters that a board logs when it stops in good order; empty if it did not."""
    lines = [line for line in log.splitlines() if "board stopped " in line]
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", lines[-1])} if lines else {}
