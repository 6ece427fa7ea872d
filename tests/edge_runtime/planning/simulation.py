"""Measures the time that the policy's choices cost: the real policy with a simulated board, link and server.

For every link profile, speed of the board and speed of the server, it compares the policy with each fixed paradigm. On
traces whose link changes every 20 s it compares the policy with an oracle that knows the link and all prices. All see
the same noise. The simulation is arithmetic without I/O and takes seconds.
"""

import heapq
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, pairwise
from typing import Any

from edge_runtime.config import PolicyConfig
from edge_runtime.planning import Measurements, Policy
from edge_runtime.wire import Hop, Reply, Status, Tier, encode_tokens
from edge_runtime.wire.event import ParadigmName
from testbed.shaping import PROFILES

# Uplink in kbit/s, round trip in ms.
LINKS = {profile.name: (profile.up_kbit, profile.rtt_ms) for profile in PROFILES.values() if not profile.is_outage}
SLOWDOWNS = (1.0, 5.0, 20.0)  # of the board, times
SERVERS = (0.25, 1.0, 4.0)  # slowdown of the server, times
FIXED: tuple[ParadigmName, ...] = ("split", "speculative", "offload")
PERIOD_S, SWITCH_S = 1.0, 20.0  # between frames, between links
DEADLINE_MS = 10_000.0
TOKENS, DRAFTED_PASSES, PICTURE_BYTES = 11, 6, 12_600


@dataclass(frozen=True, slots=True)
class Noise:
    """How one frame differs from the usual one."""

    board: float  # factors around 1
    round_trip: float
    server: float
    latent_bytes: int
    tokens: int  # of the text, with the end token
    passes: int  # of the decoder, with a draft


@dataclass(frozen=True, slots=True)
class World:
    """Links, board and server of a run."""

    links: Sequence[tuple[float, float]]  # kbit/s and round trip in ms, of each frame
    slowdown: float  # of the board
    server: float  # slowdown of the server

    def stages_ms(self, paradigm: ParadigmName, noise: Noise) -> dict[str, float]:
        ms = {"resize": 0.8, "head": 4.0, "draft": 3.5, "encode": 0.7}
        return {name: self.slowdown * noise.board * value for name, value in ms.items()}

    def server_ms(self, paradigm: ParadigmName, noise: Noise) -> tuple[float, float, int]:
        """Ms before the passes of the decoder, ms of the passes, and their number."""
        passes = noise.passes if paradigm == "speculative" else noise.tokens
        fixed = 4.0 + (8.0 if paradigm == "offload" else 0.0)
        return fixed * self.server * noise.server, 1.6 * passes * self.server * noise.server, passes


USUAL = Noise(1.0, 1.0, 1.0, 430, TOKENS, DRAFTED_PASSES)
Chooser = Callable[[int], ParadigmName]


def noises(frames: int, seed: int) -> list[Noise]:
    """The same noise for the policy and for what it is compared with."""
    rng = random.Random(seed)
    return [
        Noise(
            rng.lognormvariate(0, 0.08),
            rng.lognormvariate(0, 0.1),
            rng.lognormvariate(0, 0.15),
            max(200, round(rng.gauss(430, 40))),
            tokens := max(5, round(rng.gauss(TOKENS, 2))),
            min(tokens, max(1, round(rng.gauss(DRAFTED_PASSES, 2)))),
        )
        for _ in range(frames)
    ]


def before_ms(paradigm: ParadigmName, stages: dict[str, float]) -> float:
    """From capture to sending."""
    names = {"split": ("head",), "speculative": ("head", "draft"), "offload": ()}[paradigm]
    return stages["resize"] + stages["encode"] + sum(stages[name] for name in names)


def size_of(paradigm: ParadigmName, noise: Noise) -> int:
    """Bytes of a request."""
    return {"split": noise.latent_bytes, "speculative": noise.latent_bytes + 15, "offload": PICTURE_BYTES}[paradigm]


class Run:
    """One board in a world. Requests queue on the uplink."""

    def __init__(self, world: World, measurements: Measurements | None = None) -> None:
        self._world, self._measurements = world, measurements
        self._free_s = 0.0  # when the uplink is free
        self._pending: list[tuple[float, int, Callable[[], None]]] = []

    def frame(self, number: int, paradigm: ParadigmName, noise: Noise) -> float:
        """Returns ms from capture to the verified text, at most the deadline."""
        world, now = self._world, number * PERIOD_S
        kbit, trip_ms = world.links[number]
        stages, size = world.stages_ms(paradigm, noise), size_of(paradigm, noise)
        fixed_ms, passes_ms, passes = world.server_ms(paradigm, noise)
        sent = now + before_ms(paradigm, stages) / 1e3
        self._free_s = max(self._free_s, sent) + size * 8 / (kbit * 1e3)
        replied = self._free_s + (trip_ms * noise.round_trip + fixed_ms + passes_ms) / 1e3
        if self._measurements:
            self._report(number, paradigm, stages, size, sent, replied, noise, (fixed_ms, passes_ms, passes))
        return min(DEADLINE_MS, 1e3 * (replied - now))

    def catch_up(self, number: int) -> None:
        """Reports the replies and losses until the time of a frame."""
        while self._pending and self._pending[0][0] <= number * PERIOD_S:
            heapq.heappop(self._pending)[2]()

    def _report(
        self,
        number: int,
        paradigm: ParadigmName,
        stages: dict[str, float],
        size: int,
        sent: float,
        replied: float,
        noise: Noise,
        served: tuple[float, float, int],
    ) -> None:
        measurements, request_id = self._measurements, number.to_bytes(8, "big")
        assert measurements is not None
        fixed_ms, passes_ms, passes = served
        hop = Hop(Tier.EDGE, "server", 0.0, fixed_ms + passes_ms, {"tail": fixed_ms, "passes": passes_ms})
        # One pass per token and one for the end. With a draft, one pass for all tokens that agree.
        text, agreed = tuple(range(4, 3 + noise.tokens)), noise.tokens - noise.passes
        draft = (*text[:agreed], *[3] * (noise.tokens - agreed))
        is_sent = paradigm == "speculative"
        reply = Reply(
            id=request_id,
            status=Status.OK,
            tokens=encode_tokens(text),
            passes=passes,
            hops=(hop,),
            proposed=len(draft) if is_sent else 0,
            accepted=agreed if is_sent else 0,
        )
        lost = number * PERIOD_S + DEADLINE_MS / 1e3
        measurements.frame_handled(paradigm, stages, number * PERIOD_S + sum(stages.values()) / 1e3)
        measurements.sent(request_id, paradigm, size, sent)
        if replied <= lost:
            heapq.heappush(self._pending, (replied, number, lambda: measurements.answered(reply, replied, draft)))
        else:
            heapq.heappush(self._pending, (lost, number, lambda: measurements.lost(request_id, lost)))


def play_fixed(world: World, choose: Chooser, noise: Sequence[Noise]) -> list[float]:
    """Ms of each frame, for a choice that needs no measurements."""
    run = Run(world)
    return [run.frame(number, choose(number), some) for number, some in enumerate(noise)]


def play_policy(world: World, noise: Sequence[Noise]) -> tuple[list[float], list[ParadigmName]]:
    """Ms and paradigm of each frame. A frame without a request counts as if it had waited until its deadline."""
    measurements, policy = Measurements(), Policy(PolicyConfig())
    run, times, chosen = Run(world, measurements), [], []
    for number, some in enumerate(noise):
        run.catch_up(number)
        now = number * PERIOD_S
        decision = policy.choose(measurements.snapshot(now), now, DEADLINE_MS)
        chosen.append(decision.paradigm)
        times.append(DEADLINE_MS if decision.paradigm == "device" else run.frame(number, decision.paradigm, some))
    return times, chosen


def always(paradigm: ParadigmName, number: int) -> ParadigmName:
    """The choice of a board with a configured paradigm."""
    return paradigm


def oracle(world: World) -> Chooser:
    """Knows the link and all prices, but not the noise."""

    def usual_ms(paradigm: ParadigmName, number: int) -> float:
        kbit, trip_ms = world.links[number]
        fixed_ms, passes_ms, _ = world.server_ms(paradigm, USUAL)
        before = before_ms(paradigm, world.stages_ms(paradigm, USUAL))
        return before + size_of(paradigm, USUAL) * 8 / kbit + trip_ms + fixed_ms + passes_ms

    return lambda number: min(FIXED, key=lambda paradigm: usual_ms(paradigm, number))


def run(frames: int = 240, seed: int = 0) -> dict[str, Any]:
    """Runs all worlds. Ratios of means and of medians: a probe costs few frames, so it hardly moves the median."""
    noise = noises(frames, seed)
    steady: list[dict[str, Any]] = []
    traces: list[dict[str, Any]] = []
    for slowdown in SLOWDOWNS:
        for server in SERVERS:
            for profile, link in LINKS.items():
                world = World([link] * frames, slowdown, server)
                fixed = {str(name): play_fixed(world, partial(always, name), noise) for name in FIXED}
                policy, chosen = play_policy(world, noise)
                row = {"link": profile, "slowdown": slowdown, "server": server}
                steady.append(row | _against(policy, chosen, fixed))
            each = cycle(link for link in LINKS.values() for _ in range(int(SWITCH_S / PERIOD_S)))
            world = World(list(islice(each, frames)), slowdown, server)
            policy, chosen = play_policy(world, noise)
            fixed = {"oracle": play_fixed(world, oracle(world), noise)}
            traces.append({"link": "trace", "slowdown": slowdown, "server": server} | _against(policy, chosen, fixed))
    return {
        "frames": frames,
        "worst_to_best_fixed": max(row["ratio"] for row in steady),
        "worst_to_oracle": max(row["ratio"] for row in traces),
        "steady": steady,
        "traces": traces,
    }


def _against(policy: list[float], chosen: list[ParadigmName], others: dict[str, list[float]]) -> dict[str, Any]:
    means = {name: round(statistics.fmean(ms), 1) for name, ms in others.items()}
    best, best_p50 = min(means.values()), min(statistics.median(ms) for ms in others.values())
    changes = sum(a != b for a, b in pairwise(chosen))
    return {
        "verified_ms": means | {"policy": round(statistics.fmean(policy), 1)},
        "ratio": round(statistics.fmean(policy) / best, 3),
        "ratio_p50": round(statistics.median(policy) / best_p50, 3),
        "mostly": statistics.mode(chosen),
        "changes": changes,
    }
