"""Many boards at once: the runtime's client, open requests and events around ready-made latents, in this process.

What a board does before it asks (camera, head, draft) is left out, since one machine cannot do it fifty times over.
"""

import random
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.faults.stage import SERVER, SITE, Trial
from edge_runtime.app import load_draft, load_head
from edge_runtime.capture.picture_checks import decode_picture
from edge_runtime.config import MqttConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.preprocess import to_input
from edge_runtime.mqtt.client import Message, MqttClient, State
from edge_runtime.pipeline import NO_PIXELS, Plan, build_request
from edge_runtime.reporting.events import Events
from edge_runtime.requests.tracker import Answers, Question
from edge_runtime.wire import Event, RequestIds, encode_request, topics
from edge_runtime.wire.event import AnsweredBy

BOARDS = 50
ASKS_S = 4.0  # between two questions of one board
PLAN = Plan("speculative", "crowd", 4000)
MAX_CONNECTS = 10  # in BIN_S, when all come back at once
BIN_S = 0.1
OPEN = 16  # requests of a board in the soak
BATCH = 8  # of a server
SAMPLE_S = 1.0
OVERLOAD = 3.0
MAX_GROWTH_MB = 1.0  # over the second half of a soak

Look = tuple[NDArray[np.int8], tuple[int, ...]]


def looks(bundle: Bundle, photos: Sequence[bytes]) -> Iterator[Look]:
    """Symbols and draft of photo after photo, for ever."""
    head, draft = load_head(bundle, "auto", 1), load_draft(bundle, "auto", 1)
    symbols = [head.symbols(to_input(decode_picture(photo))) for photo in photos]
    return cycle([(each, tuple(draft.write(each).tokens)) for each in symbols])


class Asker:
    """A board without a camera; `with` connects it."""

    def __init__(self, trial: Trial, name: str, local: MqttClient, capacity: int) -> None:
        self.online_at: list[float] = []
        self._name, self._bundle, self._ids = name, trial.stage.bundle, RequestIds()
        self.client = MqttClient(
            MqttConfig(port=trial.stage.broker.port, keepalive_s=10).settings(name),
            subscriptions=[(topics.reply(SITE, name), 1)],
            on_message=self._heard,
            on_state=self._changed,
        )
        self._events = Events(local, SITE, name)
        self.answers = Answers(self.client, self._bundle, SITE, name, self._events, capacity, 1.5)

    def __enter__(self) -> "Asker":
        with ExitStack() as stack:
            stack.enter_context(self.client)
            stack.enter_context(self.answers)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def ask(self, look: Look) -> None:
        now, symbols, draft = time.time(), *look
        request_id = self._ids.next(int(now * 1e3), secrets.randbits(16))
        request = build_request(self._bundle, request_id, PLAN, NO_PIXELS, symbols, draft)
        seen = Event(
            type="new",
            frame=request_id.hex(),
            camera="crowd",
            captured=datetime.fromtimestamp(now, timezone.utc),
            tokens=draft,
            answered_by=AnsweredBy("device"),
        )
        captured = time.monotonic()
        payload = encode_request(request)
        self.answers.ask(Question(request, payload, seen, captured, captured + PLAN.budget_ms / 1e3))

    def _heard(self, message: Message) -> None:
        self.answers.reply_arrived(message.payload)

    def _changed(self, state: State, _: str) -> None:
        if state is State.ONLINE:
            self.online_at.append(time.monotonic())


class Crowd:
    """Askers that ask at a rate all together; `with` starts them."""

    def __init__(self, trial: Trial, count: int, capacity: int) -> None:
        self._trial, self._looks = trial, looks(trial.stage.bundle, trial.stage.photos)
        # One connection for the events of all: they are the harness's way to see, not what is measured.
        settings = MqttConfig(port=trial.stage.local.port).settings("crowd-events", queue_messages=8192)
        self._local = MqttClient(settings)
        names = [f"crowd-{number}" for number in range(count)]
        self.askers = [Asker(trial, name, self._local, capacity) for name in names]
        self._next = cycle(self.askers)
        trial.also_hear(*names)

    def __enter__(self) -> "Crowd":
        with ExitStack() as stack:
            stack.enter_context(self._local)
            for asker in self.askers:
                stack.enter_context(asker)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def ask_once(self) -> None:
        """The next board's next question."""
        self._trial.asked += 1
        next(self._next).ask(next(self._looks))

    def ask_for(self, seconds: float, per_s: float, until: Any = lambda: False) -> None:
        """Question after question, of board after board."""
        end, due = time.monotonic() + seconds, time.monotonic()
        while (now := time.monotonic()) < end and not until():
            if now >= due:
                self.ask_once()
                due = max(now - 1.0, due + 1 / per_s)  # what a busy machine delays is made up for, within bounds
            self._trial.watch(max(0.0, min(due, end) - time.monotonic()))


def fifty_boards(trial: Trial) -> None:
    """The broker goes and comes back, and all come back to it at once."""
    trial.serve(SERVER)
    with Crowd(trial, BOARDS, 64) as crowd:
        per_s, ledger = BOARDS / ASKS_S, trial.ledger
        began = time.monotonic()
        crowd.ask_for(120.0, per_s, lambda: ledger.answers(began) >= BOARDS)
        trial.expect(ledger.answers(began) >= BOARDS, "answers before the fault")
        trial.stage.broker.signal(signal.SIGKILL)
        trial.inject()
        crowd.ask_for(trial.seconds, per_s)
        trial.heal()
        trial.stage.broker.start()
        back = [False] * BOARDS

        def are_back() -> bool:
            back[:] = [bool(a.online_at) and a.online_at[-1] >= trial.healed for a in crowd.askers]
            return all(back) and ledger.first_answer(trial.healed) is not None

        crowd.ask_for(60.0, per_s, are_back)
        at = [when for asker in crowd.askers for when in asker.online_at if when >= trial.healed]
        bins = np.bincount([int((when - trial.healed) / BIN_S) for when in at]) if at else np.zeros(1, int)
        trial.note(f"{sum(back)} of {BOARDS} back, the last after {max(at, default=trial.healed) - trial.healed:.1f} s")
        trial.note(f"at most {bins.max()} connects in {BIN_S * 1e3:.0f} ms")
        trial.expect(all(back), "every board back within 60 s")
        trial.expect(bins.max() <= MAX_CONNECTS, f"at most {MAX_CONNECTS} connects in {BIN_S * 1e3:.0f} ms")
        trial.watch(30.0, lambda: ledger.tally().unsettled == 0)


def soak(trial: Trial) -> None:
    """One real board shown three times the frames it can handle, and a crowd that asks three times what is answered."""
    trial.tables["board"] |= {"open_requests": OPEN}
    trial.begin(SERVER)
    statuses: list[dict[str, Any]] = []
    watcher = MqttClient(
        MqttConfig(port=trial.stage.broker.port).settings("soak-watcher"),
        subscriptions=[(topics.server_status(SITE, SERVER), 1)],
        on_message=lambda message: statuses.append(msgspec.json.decode(message.payload)),
    )
    with watcher, Crowd(trial, 8, OPEN) as crowd:
        trial.show_frames(False)
        server_per_s = _capacity(trial, crowd)
        trial.show_frames()
        frame_s = _frame_s(trial)
        trial.interval_s = frame_s / OVERLOAD
        trial.note(f"{1 / trial.interval_s:.0f} frames/s shown, {OVERLOAD * server_per_s:.0f} requests/s asked")
        watched = {
            "board": trial.board.pid,
            "server": trial.stage.servers[SERVER].pid,
            "broker": trial.stage.broker.pid,
        }
        resident: dict[str, list[float]] = {name: [] for name in watched}
        most_open = 0
        trial.inject()
        end = time.monotonic() + trial.seconds
        while time.monotonic() < end:
            crowd.ask_for(SAMPLE_S, OVERLOAD * server_per_s)
            most_open = max(most_open, *(asker.answers.summary()["open"] for asker in crowd.askers))
            for name, pid in watched.items():
                resident[name].append(resident_mb(pid))
        trial.interval_s = 0.25
        trial.heal()
        trial.await_answers()
        trial.show_frames(False)
        trial.watch(30.0, lambda: trial.ledger.tally().unsettled == 0)
    waiting = max((status["queue"]["waiting"] for status in statuses if "queue" in status), default=0)
    bound = next((status["queue"]["capacity"] for status in statuses if "queue" in status), 0)
    trial.note(f"at most {most_open} of {OPEN} open at a board, {waiting} of {bound} waiting at the server")
    trial.expect(most_open <= OPEN and waiting <= bound, "queues within their bounds")
    for name, samples in resident.items():
        slope, growth = slope_of(samples)
        trial.rss_slope[name] = round(slope, 3)
        trial.expect(growth <= MAX_GROWTH_MB, f"flat memory of the {name} ({growth:+.2f} MiB over the second half)")


def _capacity(trial: Trial, crowd: Crowd) -> float:
    """Answers a second while a full batch is open and another one waits, but never more: none of them goes stale."""
    trial.watch(10.0, lambda: trial.ledger.tally().unsettled == 0)
    began = time.monotonic()
    while (now := time.monotonic()) < began + 6.0:
        if trial.ledger.tally().unsettled < 2 * BATCH:
            crowd.ask_once()
        trial.watch(0.01)
    return max(1.0, trial.ledger.answers(began) / (now - began))


def _frame_s(trial: Trial) -> float:
    """Seconds that the board needs for a frame, when frames come as fast as they can."""
    trial.interval_s = 0.01
    trial.watch(2.0)
    began = time.monotonic()
    trial.watch(4.0)
    handled = trial.ledger.news(began, board=topics.event(SITE, trial.name))
    return 4.0 / max(1, handled)


def resident_mb(pid: int) -> float:
    """proc_pid_statm(5): resident pages."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def slope_of(samples: Sequence[float]) -> tuple[float, float]:
    """MiB per 10 minutes, and MiB in all, over the second half; the first half is the warm-up of caches and pools.

    Theil-Sen: the median of the slopes of pairs, which a single garbage collection does not bend.
    """
    half = np.asarray(samples[len(samples) // 2 :])
    if len(half) < 3:
        return 0.0, 0.0
    rng = random.Random(0)
    pairs = [sorted(rng.sample(range(len(half)), 2)) for _ in range(2000)]
    slope = float(np.median([(half[b] - half[a]) / (b - a) for a, b in pairs])) / SAMPLE_S
    return 600 * slope, slope * SAMPLE_S * len(half)
