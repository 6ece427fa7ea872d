"""What the policy's choice costs: a board, a link and a server as arithmetic, in closed loop with the real policy.

Every link profile, board and server, with noise; policy against each fixed paradigm and, on a trace whose link changes
every 20 s, against an oracle that knows link and prices. All see the same noise. No I/O: seconds, not hours.
`python -m benchmarks.policy [--json]`.
"""

import argparse
import heapq
import json
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
SLOWDOWNS = (1.0, 5.0, 20.0)  # of the board
SERVERS = (0.25, 1.0, 4.0)  # times as slow
FIXED: tuple[ParadigmName, ...] = ("split", "speculative", "offload")
PERIOD_S, SWITCH_S = 1.0, 20.0  # between frames, between links
DEADLINE_MS = 10_000.0
TOKENS, DRAFTED_PASSES, PICTURE_BYTES = 11, 6, 12_600


@dataclass(frozen=True, slots=True)
class Noise:
    """What is different in one frame; factors around 1."""

    board: float
    trip: float
    server: float
    latent_bytes: int
    tokens: int  # of the text with its end
    passes: int  # with a draft


@dataclass(frozen=True, slots=True)
class World:
    """What a frame meets."""

    links: Sequence[tuple[float, float]]  # one for each frame
    slowdown: float
    server: float

    def stages_ms(self, paradigm: ParadigmName, noise: Noise) -> dict[str, float]:
        ms = {"resize": 0.8, "head": 4.0, "draft": 3.5, "encode": 0.7}
        return {name: self.slowdown * noise.board * value for name, value in ms.items()}

    def server_ms(self, paradigm: ParadigmName, noise: Noise) -> tuple[float, float, int]:
        """Before the decoder's passes, these, and their number."""
        passes = noise.passes if paradigm == "speculative" else noise.tokens
        fixed = 4.0 + (8.0 if paradigm == "offload" else 0.0)
        return fixed * self.server * noise.server, 1.6 * passes * self.server * noise.server, passes


USUAL = Noise(1.0, 1.0, 1.0, 430, TOKENS, DRAFTED_PASSES)
Chooser = Callable[[int], ParadigmName]


def noises(frames: int, seed: int) -> list[Noise]:
    """The same for whoever chooses."""
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
    """From capture until the request leaves."""
    names = {"split": ("head",), "speculative": ("head", "draft"), "offload": ()}[paradigm]
    return stages["resize"] + stages["encode"] + sum(stages[name] for name in names)


def size_of(paradigm: ParadigmName, noise: Noise) -> int:
    """Bytes of a request."""
    return {"split": noise.latent_bytes, "speculative": noise.latent_bytes + 15, "offload": PICTURE_BYTES}[paradigm]


class Run:
    """One board on its way through a world; requests queue on the uplink."""

    def __init__(self, world: World, measurements: Measurements | None = None) -> None:
        self._world, self._measurements = world, measurements
        self._free_s = 0.0  # the uplink
        self._arriving: list[tuple[float, int, Callable[[], None]]] = []

    def frame(self, number: int, paradigm: ParadigmName, noise: Noise) -> float:
        """Ms from capture to the verified text, at most the deadline."""
        world, now = self._world, number * PERIOD_S
        kbit, trip_ms = world.links[number]
        stages, size = world.stages_ms(paradigm, noise), size_of(paradigm, noise)
        fixed_ms, passes_ms, passes = world.server_ms(paradigm, noise)
        sent = now + before_ms(paradigm, stages) / 1e3
        self._free_s = max(self._free_s, sent) + size * 8 / (kbit * 1e3)
        replied = self._free_s + (trip_ms * noise.trip + fixed_ms + passes_ms) / 1e3
        if self._measurements:
            self._tell(number, paradigm, stages, size, sent, replied, noise, (fixed_ms, passes_ms, passes))
        return min(DEADLINE_MS, 1e3 * (replied - now))

    def catch_up(self, number: int) -> None:
        """What has arrived by the time of a frame."""
        while self._arriving and self._arriving[0][0] <= number * PERIOD_S:
            heapq.heappop(self._arriving)[2]()

    def _tell(
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
        # One pass a token and one for the end; with a draft, one for all that agrees.
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
            heapq.heappush(self._arriving, (replied, number, lambda: measurements.answered(reply, replied, draft)))
        else:
            heapq.heappush(self._arriving, (lost, number, lambda: measurements.lost(request_id, lost)))


def play_fixed(world: World, choose: Chooser, noise: Sequence[Noise]) -> list[float]:
    """Verified ms of each frame, of one who needs not learn."""
    run = Run(world)
    return [run.frame(number, choose(number), some) for number, some in enumerate(noise)]


def play_policy(world: World, noise: Sequence[Noise]) -> tuple[list[float], list[ParadigmName]]:
    """Verified ms and paradigm of each frame; a frame without a request counts as one that waited for its deadline."""
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
    """What a board does whose configuration fixes the paradigm."""
    return paradigm


def oracle(world: World) -> Chooser:
    """Knows the link and every price, not the noise."""

    def usual_ms(paradigm: ParadigmName, number: int) -> float:
        kbit, trip_ms = world.links[number]
        fixed_ms, passes_ms, _ = world.server_ms(paradigm, USUAL)
        before = before_ms(paradigm, world.stages_ms(paradigm, USUAL))
        return before + size_of(paradigm, USUAL) * 8 / kbit + trip_ms + fixed_ms + passes_ms

    return lambda number: min(FIXED, key=lambda paradigm: usual_ms(paradigm, number))


def run(frames: int = 240, seed: int = 0) -> dict[str, Any]:
    """All worlds: verified ms, mean over frames, and ratios; the median's ratio too, since a try costs few frames."""
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


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="instead of the table")
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    figures = run(args.frames, args.seed)
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{'link':8}{'board':>6}{'server':>7}{'ratio':>7}{'p50':>7}  changes  mostly       verified ms")
    for row in (*figures["steady"], *figures["traces"]):
        head = f"{row['link']:8}{row['slowdown']:6.0f}{row['server']:7.2f}{row['ratio']:7.3f}{row['ratio_p50']:7.3f}"
        print(f"{head}{row['changes']:9}  {row['mostly']:12} {row['verified_ms']}")
    print(f"worst: {figures['worst_to_best_fixed']} of the best fixed, {figures['worst_to_oracle']} of the oracle")


if __name__ == "__main__":
    main()
