"""Requests to a target that fails, limits and stalls a share of its calls: what becomes of each, and what is paid.

    python -m benchmarks.unreliable_target --requests 1000

The server's service, its target, the HTTP connections and the life of a board's requests are the real ones. Only MQTT
is left out, and the other server is `testbed.chat_server`. Prints one JSON object. `is_sound` is false, and the exit
code 1, if a request has no outcome or two, or if an answer was paid for twice. Wants jsonschema (the extra `test`).
"""

import argparse
import json
import random
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import msgspec
import numpy as np

from edge_runtime.requests.actions import Action, Answer, Lose, Send, Why
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.requests.thread import LifecycleThread
from edge_runtime.wire import ContentKind, Paradigm, Reply, Request, RequestIds, aged, decode_reply, encode_request
from server.config import OpenAIConfig, ServerConfig
from server.gateway import Arrival
from server.reply_cache import MAX_AGE_S, ReplyCache
from server.service import Service
from server.serving import serve
from server.targets.openai import OpenAITarget
from testbed.chat_server import BEHAVIOURS, Behaviour, ChatServer, text_of

ANSWERS: tuple[Behaviour, ...] = ("answer", "no_usage", "odd_usage", "long_text")
FAULTS: tuple[Behaviour, ...] = tuple(each for each in BEHAVIOURS if each not in ANSWERS)
SETTLE_S = 600.0  # for the last request's end
REPEAT_SHARE = 0.1  # of the answered requests, asked once more afterwards


@dataclass
class Totals:
    """What became of the requests of one run."""

    accepted: int = 0
    answered: int = 0
    lost: int = 0
    lost_because: Counter[str] = field(default_factory=Counter)  # by the code of the reason
    ended_twice: int = 0  # requests with more than one last event
    wrong_texts: int = 0  # answers with the text of another picture
    changed_repeats: int = 0  # repeats of an answered request whose reply was another one
    billed_for_repeats: int = 0  # answers that the other server wrote for them
    breaches: int = 0  # requests to the other server that break its schema
    calls: dict[str, int] = field(default_factory=dict)  # by what became of them
    resent: int = 0
    seconds: float = 0.0

    @property
    def is_sound(self) -> bool:
        """Each request has one outcome, nothing is paid twice for a repeat, and the requests are as documented."""
        faults = (self.ended_twice, self.wrong_texts, self.changed_repeats, self.billed_for_repeats, self.breaches)
        return self.accepted == self.answered + self.lost and not any(faults)


class SimulatedBoard:
    """A board's requests, handed to a service directly."""

    def __init__(self, name: str, service: Service, capacity: int) -> None:
        self.name, self._service = name, service
        self.ends: dict[bytes, list[Reply | Why]] = {}  # by request: its last events
        self._lifecycle: RequestLifecycle[tuple[Request, float]] = RequestLifecycle(
            capacity, min_resend_s=1.0, rng=random.Random(0)
        )
        self.thread: LifecycleThread[tuple[Request, float], tuple[Request, float]] = LifecycleThread(
            name, self._lifecycle, self._new, self._perform
        )
        self.room = threading.Semaphore(capacity)

    def ask(self, request: Request) -> None:
        """Waits while as many requests as may be are open."""
        self.room.acquire()
        self.thread.put((request, time.monotonic() + request.budget_ms / 1e3))

    def arrival(self, request: Request, reply: Any) -> Arrival:
        return Arrival(self.name, encode_request(request), time.monotonic(), lambda: None, reply)

    def _new(self, new: tuple[Request, float], now: float) -> Sequence[Action[tuple[Request, float]]]:
        return self._lifecycle.on_request(new[0].id, new, new[1], now)

    def _perform(self, action: Action[tuple[Request, float]], _: float) -> Sequence[Action[tuple[Request, float]]]:
        match action:
            case Send(_, (request, _), waited_s, left_s):
                again = aged(request, waited_s, left_s)
                self._service.receive(self.arrival(again, lambda data, _: self.thread.reply_arrived(data)))
            case Answer(request_id, _, reply):
                self._end(request_id, reply)
            case Lose(request_id, _, why):
                self._end(request_id, why)
        return ()

    def _end(self, request_id: bytes, how: Reply | Why) -> None:
        self.ends.setdefault(request_id, []).append(how)
        self.room.release()


def measure(
    requests: int = 1000, fault_share: float = 1 / 3, boards: int = 8, deadline_s: float = 30.0, seed: int = 0
) -> Totals:
    """Runs so many requests through a target of which this share of calls goes wrong, in every way in turn."""
    rng = random.Random(seed)
    faults = [rng.choice(FAULTS) if rng.random() < fault_share else None for _ in range(8 * requests)]

    def behave(call: int) -> Behaviour:
        return faults[call % len(faults)] or "answer"

    config = OpenAIConfig("fake", calls=16, timeout_s=1.0, input_price=1.0, output_price=2.0)
    pictures = {i.to_bytes(8, "big"): _picture(i) for i in range(requests)}
    started = time.monotonic()
    with ChatServer(behave) as other:
        other.retry_after = "0.2"
        target = OpenAITarget(other.url, config)
        service = Service(
            ServerConfig("bench", target=f"openai:{other.url}", queue=512), target, ReplyCache(max_flight_s=MAX_AGE_S)
        )
        stop = threading.Event()
        serving = threading.Thread(target=serve, args=(service, stop))
        serving.start()
        lanes = [SimulatedBoard(f"b{i}", service, 8) for i in range(boards)]
        ids, asked = RequestIds(), dict[bytes, Request]()
        for lane in lanes:
            lane.thread.start()
        for i, picture in enumerate(pictures.values()):
            request = _request(ids.next(i, secrets.randbits(16)), picture, deadline_s)
            asked[request.id] = request
            lanes[i % boards].ask(request)
        for lane in lanes:
            for _ in range(8):
                lane.room.acquire(timeout=SETTLE_S)
        totals = _total(lanes, asked)
        billed = sum(other.billed.values())
        _repeat(lanes, asked, totals, rng)
        stop.set()
        serving.join()  # it answers first what it has accepted
        totals.billed_for_repeats = sum(other.billed.values()) - billed
        for lane in lanes:
            lane.thread.close(Why("stopping", "the run is over"))
        totals.calls = dict(sorted(target.status()["usage"]["calls"].items()))
        totals.breaches = len(other.objections)
    totals.seconds = round(time.monotonic() - started, 1)
    return totals


def _total(lanes: Sequence[SimulatedBoard], asked: dict[bytes, Request]) -> Totals:
    totals = Totals()
    for lane in lanes:
        counts = lane.thread.counts
        totals.accepted += counts.accepted
        totals.resent += counts.resent
        for request_id, ends in lane.ends.items():
            totals.ended_twice += len(ends) > 1
            last = ends[-1]
            if isinstance(last, Reply):
                totals.answered += 1
                totals.wrong_texts += last.text != text_of(asked[request_id].content)
            else:
                totals.lost += 1
                totals.lost_because[last.code] += 1
    return totals


def _repeat(lanes: Sequence[SimulatedBoard], asked: dict[bytes, Request], totals: Totals, rng: random.Random) -> None:
    """Asks some answered requests again, as a board does that has lost the reply."""
    for lane in lanes:
        for request_id, ends in lane.ends.items():
            if isinstance(ends[-1], Reply) and rng.random() < REPEAT_SHARE:
                replies: list[Reply] = []
                lane._service.receive(
                    lane.arrival(asked[request_id], lambda data, _, replies=replies: replies.append(decode_reply(data)))
                )
                totals.changed_repeats += replies != [ends[-1]]


def _request(request_id: bytes, picture: bytes, deadline_s: float) -> Request:
    return Request(
        id=request_id,
        bundle=bytes(8),
        paradigm=Paradigm.OFFLOAD,
        age_ms=0,
        budget_ms=int(1e3 * deadline_s),
        content_kind=ContentKind.JPEG,
        content=picture,
    )


def _picture(number: int) -> bytes:
    """A JPEG like no other."""
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, metavar="N")
    parser.add_argument("--fault-share", type=float, default=1 / 3, metavar="SHARE", help="of the calls (default: 1/3)")
    args = parser.parse_args()
    totals = measure(args.requests, args.fault_share)
    print(json.dumps(msgspec.to_builtins(totals) | {"is_sound": totals.is_sound}, indent=2))
    return 0 if totals.is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
