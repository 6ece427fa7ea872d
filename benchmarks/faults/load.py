"""Load by many boards: simulated boards in this process with the runtime's client, requests and events.

Camera, head and draft are left out, since one machine cannot run them fifty times: the latents are prepared before.
"""

import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from itertools import combinations, cycle
from typing import Any

import msgspec
import numpy as np
import psutil

from benchmarks.faults.scenario import Scenario
from benchmarks.faults.site import SERVER, SITE
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.networks import load_draft, load_head
from edge_runtime.inference.preprocess import to_input
from edge_runtime.inference.rate import RatedSymbols, features_of
from edge_runtime.mqtt import MqttClient, MqttConfig, State
from edge_runtime.picture_checks import decode_picture
from edge_runtime.pipeline import NO_PIXELS, build_request
from edge_runtime.planning import Plan
from edge_runtime.reporting.events import Events
from edge_runtime.requests import NewRequest, RequestTracker
from edge_runtime.wire import Event, RequestIds, encode_request, topics
from edge_runtime.wire.event import AnsweredBy
from server.reply_cache import MAX_AGE_S, MAX_REPLIES
from server.watchdog import STATUS_PERIOD_S

BOARDS = 50
REQUEST_INTERVAL_S = 4.0  # between two requests of one board
PLAN = Plan("speculative", "load", 4000)
MAX_CONNECTS = 10  # in BIN_S, when all boards reconnect at once
BIN_S = 0.1
OPEN = 16  # open requests per board in the soak
BATCH = 8  # a server's batch size
LOADED_S = 1.0  # of requests between two looks at the queues
# Under load the server's memory goes up and down by some 10 MB with the batches at hand, which would hide a leak.
REST_EVERY_S = 30.0
REST_S = STATUS_PERIOD_S + 1.0  # after the last answer: until then the server has given back what it has freed
MIN_RESTS = 5  # otherwise memory cannot be compared
OVERLOAD = 3.0
MAX_GROWTH_MB = 1.0  # over the second half of a soak

EncodedPhoto = tuple[RatedSymbols, tuple[int, ...]]


def encoded_photos(bundle: Bundle, photos: Sequence[bytes]) -> Iterator[EncodedPhoto]:
    """Features and draft of every photo, repeated without end."""
    head, draft = load_head(bundle, "onnx", 1), load_draft(bundle, "onnx", 1)
    encoded = []
    for latent in (head.latent(to_input(decode_picture(photo))) for photo in photos):
        features = features_of(latent, bundle)
        assert features  # there is no limit
        encoded.append((features, draft.write(latent.symbols()).tokens))
    return cycle(encoded)


class SimulatedBoard:
    """A board without a camera. `with` its client and then its tracker."""

    def __init__(self, scenario: Scenario, name: str, local: MqttClient, capacity: int) -> None:
        self.online_at: list[float] = []
        self._bundle, self._ids = scenario.site.bundle, RequestIds()
        self.client = MqttClient(
            MqttConfig(port=scenario.site.broker.port, keepalive_s=10).settings(name),
            subscriptions=[(topics.reply(SITE, name), 1)],
            on_message=lambda message: self.tracker.reply_arrived(message.payload),
            on_state=self._changed,
        )
        events = Events(local, SITE, name)
        self.tracker = RequestTracker(self.client, self._bundle, SITE, name, events, capacity, 1.5)

    def send(self, photo: EncodedPhoto) -> None:
        now, features, draft = time.time(), *photo
        request_id = self._ids.next(int(now * 1e3), secrets.randbits(16))
        request = build_request(self._bundle, request_id, PLAN, NO_PIXELS, features, draft)
        seen = Event(
            type="new",
            frame=request_id.hex(),
            camera="load",
            captured=datetime.fromtimestamp(now, timezone.utc),
            tokens=draft,
            answered_by=AnsweredBy("device"),
        )
        captured = time.monotonic()
        payload = encode_request(request)
        self.tracker.submit(NewRequest(request, payload, seen, captured, captured + PLAN.budget_ms / 1e3))

    def _changed(self, state: State, _: str) -> None:
        if state is State.ONLINE:
            self.online_at.append(time.monotonic())


@contextmanager
def load_of(scenario: Scenario, count: int, capacity: int) -> Iterator["LoadGenerator"]:
    """Runs so many simulated boards during the `with` block. capacity: open requests of each."""
    # One connection for the events of all boards: it belongs to the benchmark, not to what is measured.
    settings = MqttConfig(port=scenario.site.local.port).settings("load-events", queue_messages=8192)
    names = [f"load-{number}" for number in range(count)]
    scenario.count_also(*names)
    with ExitStack() as running:
        local = running.enter_context(MqttClient(settings))
        boards = [SimulatedBoard(scenario, name, local, capacity) for name in names]
        for board in boards:
            running.enter_context(board.client)
            running.enter_context(board.tracker)
        yield LoadGenerator(scenario, boards)


class LoadGenerator:
    """Simulated boards that together send requests at a given rate."""

    def __init__(self, scenario: Scenario, boards: Sequence[SimulatedBoard]) -> None:
        self._scenario, self.boards, self._next = scenario, boards, cycle(boards)
        self._photos = encoded_photos(scenario.site.bundle, scenario.site.photos)

    def most_open(self) -> int:
        """The open requests of the board that has the most."""
        return max(int(board.tracker.summary()["open"]) for board in self.boards)

    def send_once(self) -> None:
        """Sends the next board's next request."""
        self._scenario.asked += 1
        next(self._next).send(next(self._photos))

    def send_for(self, seconds: float, per_s: float, until: Any = lambda: False) -> None:
        """Sends requests, board after board."""
        end, due = time.monotonic() + seconds, time.monotonic()
        while (now := time.monotonic()) < end and not until():
            if now >= due:
                self.send_once()
                due = max(now - 1.0, due + 1 / per_s)  # after a delay, up to one second of requests is caught up
            self._scenario.wait(max(0.0, min(due, end) - time.monotonic()))


def fifty_boards(scenario: Scenario) -> None:
    """The broker restarts, and all boards reconnect at once."""
    scenario.start_servers(SERVER)
    with load_of(scenario, BOARDS, 64) as load:
        per_s, records = BOARDS / REQUEST_INTERVAL_S, scenario.records
        began = time.monotonic()
        load.send_for(120.0, per_s, lambda: records.answers(began) >= BOARDS)
        scenario.expect(records.answers(began) >= BOARDS, "answers before the fault")
        scenario.site.broker.signal(signal.SIGKILL)
        scenario.fault_started()
        load.send_for(scenario.seconds, per_s)
        scenario.fault_ended()
        scenario.site.broker.start()
        back = [False] * BOARDS

        def are_back() -> bool:
            back[:] = [bool(a.online_at) and a.online_at[-1] >= scenario.ended_at for a in load.boards]
            return all(back) and records.first_answer(scenario.ended_at) is not None

        load.send_for(60.0, per_s, are_back)
        at = [when for board in load.boards for when in board.online_at if when >= scenario.ended_at]
        bins = np.bincount([int((when - scenario.ended_at) / BIN_S) for when in at]) if at else np.zeros(1, int)
        last_s = max(at, default=scenario.ended_at) - scenario.ended_at
        scenario.note(f"{sum(back)} of {BOARDS} back, the last after {last_s:.1f} s")
        scenario.note(f"at most {bins.max()} connects in {BIN_S * 1e3:.0f} ms")
        scenario.expect(all(back), "every board back within 60 s")
        scenario.expect(bins.max() <= MAX_CONNECTS, f"at most {MAX_CONNECTS} connects in {BIN_S * 1e3:.0f} ms")
        scenario.wait(30.0, lambda: scenario.counts.unsettled == 0)


def soak(scenario: Scenario) -> None:
    """A real board gets three times the frames it can handle, and the server three times the requests it can answer."""
    scenario.tables["board"] |= {"open_requests": OPEN}
    scenario.begin(SERVER)
    statuses: list[dict[str, Any]] = []
    watcher = MqttClient(
        MqttConfig(port=scenario.site.broker.port).settings("soak-watcher"),
        subscriptions=[(topics.server_status(SITE, SERVER), 1)],
        on_message=lambda message: statuses.append(msgspec.json.decode(message.payload)),
    )
    with watcher, load_of(scenario, 8, OPEN) as load:
        scenario.send_frames(False)
        server_per_s = _capacity(scenario, load)
        scenario.send_frames()
        frame_s = _frame_s(scenario)
        scenario.interval_s = frame_s / OVERLOAD
        scenario.note(f"{1 / scenario.interval_s:.0f} frames/s shown, {OVERLOAD * server_per_s:.0f} requests/s asked")
        assert scenario.board
        watched = {
            "board": psutil.Process(scenario.board.pid),
            "server": psutil.Process(scenario.site.processes[SERVER].pid),
            "broker": psutil.Process(scenario.site.broker.pid),
        }
        times: list[float] = []
        # At each of the times, at rest. Without the pages of files, which the system may drop and read again.
        anonymous: dict[str, list[float]] = {name: [] for name in watched}
        most_open = 0
        began = time.monotonic()  # the server's memory grows until its reply cache is full
        while scenario.records.answers(began) < MAX_REPLIES and time.monotonic() < began + MAX_AGE_S:
            load.send_for(LOADED_S, OVERLOAD * server_per_s)
        scenario.fault_started()
        end = time.monotonic() + scenario.seconds
        while time.monotonic() < end:
            loaded_until = time.monotonic() + REST_EVERY_S
            while time.monotonic() < loaded_until:
                load.send_for(LOADED_S, OVERLOAD * server_per_s)
                most_open = max(most_open, load.most_open())
            scenario.send_frames(False)
            scenario.wait(30.0, lambda: scenario.counts.unsettled == 0 and not load.most_open())
            scenario.wait(REST_S)
            times.append(time.monotonic())
            for name, process in watched.items():
                memory = process.memory_info()
                anonymous[name].append((memory.rss - memory.shared) / 2**20)
            scenario.send_frames()
        scenario.interval_s = 0.25
        scenario.fault_ended()
        scenario.wait_for_answers()
        scenario.send_frames(False)
        scenario.wait(30.0, lambda: scenario.counts.unsettled == 0)
    waiting = max((status["queue"]["waiting"] for status in statuses if "queue" in status), default=0)
    bound = next((status["queue"]["capacity"] for status in statuses if "queue" in status), 0)
    scenario.note(f"at most {most_open} of {OPEN} open at a board, {waiting} of {bound} waiting at the server")
    scenario.expect(most_open <= OPEN and waiting <= bound, "queues within their bounds")
    scenario.expect(len(times) >= MIN_RESTS, f"{MIN_RESTS} rests ({len(times)} were): want --seconds 300 or more")
    for name, samples in anonymous.items():
        slope, growth = slope_of(times, samples)
        scenario.memory_slope[name] = round(slope, 3)
        scenario.expect(growth <= MAX_GROWTH_MB, f"flat memory of the {name} ({growth:+.2f} MiB over the second half)")


def _capacity(scenario: Scenario, load: LoadGenerator) -> float:
    """Answers per second while one full batch is open and another waits. More would only become stale."""
    scenario.wait(10.0, lambda: scenario.counts.unsettled == 0)
    began = time.monotonic()
    while (now := time.monotonic()) < began + 6.0:
        if scenario.counts.unsettled < 2 * BATCH:
            load.send_once()
        scenario.wait(0.01)
    return max(1.0, scenario.records.answers(began) / (now - began))


def _frame_s(scenario: Scenario) -> float:
    """Seconds that the board needs per frame when frames come faster than that."""
    scenario.interval_s = 0.01
    scenario.wait(2.0)
    began = time.monotonic()
    scenario.wait(4.0)
    handled = scenario.records.first_events(began, board=topics.event(SITE, scenario.name))
    return 4.0 / max(1, handled)


def slope_of(times: Sequence[float], samples: Sequence[float]) -> tuple[float, float]:
    """Growth of the second half of the samples: MiB per 10 minutes, and MiB in total. The first half is warm-up.

    times: of the samples, in seconds. Theil-Sen: the median of the slopes of all pairs, so that a single garbage
    collection does not matter.
    """
    half = list(zip(times, samples, strict=True))[len(samples) // 2 :]
    if len(half) < 3:
        return 0.0, 0.0
    slope = float(np.median([(b - a) / (till - since) for (since, a), (till, b) in combinations(half, 2)]))
    return 600 * slope, slope * (half[-1][0] - half[0][0])
