"""Which paradigm answers the next frame: the one with the least expected time to a verified text within the budgets.

A state machine: a `Snapshot` and the time come in, a `Decision` goes out; the same inputs give the same decisions.

- candidates.py says what each paradigm is expected to take.
- A large gain changes the paradigm at once, a small gain only after it has lasted for some frames.
- A paradigm that is not well known is probed: one frame uses it, at most every PROBE_EVERY frames, and only if it could
  be better than the one in use. The more a probe may cost, the longer it waits.
- If the link is down, loses most requests or is too slow for the deadline, the device answers alone. A real request
  tests the link again after 1, 2, 4, ... 60 s. If the servers say that they take no requests, their statuses say when
  they do, so no request tests that.
- On a link that changes often, large requests are a risk: if one is being sent when a slow link takes over, all others
  wait for it.

Used by one thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite
from typing import Literal

from edge_runtime.config import PolicyConfig
from edge_runtime.planning.candidates import DRAFT_MS, PASS_MS, Candidate, candidate, decoding_ms, known
from edge_runtime.planning.feature_bytes import OTHER_BYTES, feature_bytes
from edge_runtime.planning.measurements import Snapshot
from edge_runtime.wire.event import Explain, ParadigmName

LARGE_GAIN, SMALL_GAIN = 0.15, 0.02  # of the time of the paradigm in use
LASTING_FRAMES = 3  # in a row with a small gain
PROBE_EVERY = 8  # frames, of which at most one is a probe
FIRST_PROBE = 4  # frames before the first probe
PROBE_COST = 0.02  # probes may cost this share of the time of all frames
MAX_SAVED_FRAMES = 100  # over which the cost of a probe may be spread
LOST_IN_ROW, LOST_SHARE = 3, 0.5  # from here on the link counts as down
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
BUDGET_MARGIN = 1.25  # times a usual request must fit into the byte budget
LONG_FEATURES = 3  # times the usual bytes of a level: no photo has more
Outage = Literal["offline", "loss", "deadline"]


@dataclass(frozen=True, slots=True)
class Decision:
    """How the next frame is answered."""

    paradigm: ParadigmName
    explain: Explain
    writes_draft: bool = True  # whether there is CPU time for a draft that is only shown
    sends_draft: bool = False  # before the request is sent
    is_probe: bool = False
    outage: Outage | None = None  # why the link is not used, or only tested
    max_feature_bytes: int | None = None  # None: no reason to send less than usual


@dataclass(slots=True)
class _LinkRetry:
    """The link is not usable and is tested from time to time."""

    next_at: float
    wait_s: float
    outage: Outage  # of the last frame


@dataclass(frozen=True, slots=True)
class _BetterParadigm:
    """A paradigm that was better than the one in use."""

    paradigm: ParadigmName | None = None
    frames: int = 0  # in a row


class Policy:
    """Call `choose` once per frame."""

    def __init__(
        self, config: PolicyConfig, *, has_head: bool = True, has_draft: bool = True, level_bytes: Sequence[float] = ()
    ) -> None:
        """Without a head only offload is possible, if the configuration allows it.

        level_bytes: of usual features at each level, the coarsest first; none: there is one level, so no choice.
        """
        self._level_bytes = level_bytes
        self.config, self._has_head, self._has_draft = config, has_head, has_draft and has_head
        self._in_use: ParadigmName | None = None
        self._better = _BetterParadigm()
        self._frames_since_probe = PROBE_EVERY - FIRST_PROBE
        self._retry: _LinkRetry | None = None

    def choose(self, snapshot: Snapshot, now: float, deadline_ms: float) -> Decision:
        """The next frame's paradigm. now: seconds; deadline_ms: from the capture of the frame. Raises nothing."""
        limit = self._max_feature_bytes(snapshot, deadline_ms)
        possible = self._possible(snapshot, limit)
        affordable = [each for each in possible if self._fits_byte_budget(each, snapshot, limit)]
        if not affordable:
            return self._device_alone(snapshot, possible, self._why_not_affordable(possible, snapshot), None)
        in_time = [each for each in affordable if each.ms <= deadline_ms]
        outage, why = _find_outage(snapshot, affordable, deadline_ms)
        if outage:
            return self._test_link_or_wait(snapshot, possible, affordable, outage, why, limit, now)
        self._retry = None
        if probe := self._find_probe(in_time):
            self._frames_since_probe = 1
            why = f"a try: {_ms(probe.ms)} expected, as little as {_ms(probe.best_ms)} possible"
            return _decide(probe, snapshot, possible, why, limit, is_probe=True)
        self._frames_since_probe += 1
        chosen = self._best_or_in_use(in_time)
        return _decide(chosen, snapshot, possible, _comparison(chosen, possible, snapshot), limit)

    # ---- what is possible ----

    def _max_feature_bytes(self, snapshot: Snapshot, deadline_ms: float) -> float:
        """At least the bytes of the coarsest level; inf if even long features of the finest level have fewer."""
        if not self._level_bytes:
            return inf
        limit = max(self._level_bytes[0], feature_bytes(snapshot, self.config.bytes_per_minute, deadline_ms))
        return limit if limit < LONG_FEATURES * self._level_bytes[-1] else inf

    def _possible(self, snapshot: Snapshot, limit: float) -> list[Candidate]:
        """The paradigms that the board can do, has CPU time for, and a server takes. limit: bytes of features."""
        names: list[ParadigmName] = []
        if self._has_head and snapshot.takes.latents:
            names += ["speculative", "split"] if self._has_draft else ["split"]
        if self.config.may_offload and snapshot.takes.pictures:
            names.append("offload")
        possible = [candidate(name, snapshot, self._has_draft, limit) for name in names]
        if self._has_draft and snapshot.takes.drafts and possible and possible[-1].paradigm == "offload":
            with_draft = candidate("offload", snapshot, True, limit, sends_draft=True)
            # Other people's servers may not tell of their passes, which then cannot be compared with the draft's time.
            if not snapshot.server.pass_ms or with_draft.ms < possible[-1].ms:
                possible[-1] = with_draft
        interval_ms = snapshot.board.interval_ms
        if not possible or self.config.cpu_share >= 1 or not interval_ms:
            return possible
        max_ms = self.config.cpu_share * interval_ms
        # Without CPU time for a draft that would only be shown, the board writes none.
        possible = [c if c.board_ms <= max_ms else candidate(c.paradigm, snapshot, False, limit) for c in possible]
        cheapest = min(each.board_ms for each in possible)
        return [each for each in possible if each.board_ms <= max(max_ms, cheapest)]

    def _fits_byte_budget(self, each: Candidate, snapshot: Snapshot, limit: float) -> bool:
        """Likely within the budget of this minute, and at most a quarter of it in a quarter of a minute.

        The tracker checks the exact size when the request is sent.
        """
        budget, size = self.config.bytes_per_minute, BUDGET_MARGIN * each.size
        if each.paradigm != "offload":
            size = min(size, limit + OTHER_BYTES)  # features that are too long are sent coarser
        if not budget:
            return True
        last_quarter = snapshot.link.bytes_last_quarter
        is_paced = not last_quarter or last_quarter + size <= budget / 4
        return is_paced and snapshot.link.bytes_last_minute + size <= budget

    def _why_not_affordable(self, possible: Sequence[Candidate], snapshot: Snapshot) -> str:
        if not possible:
            return self._why_nothing_is_possible(snapshot)
        needed = min(BUDGET_MARGIN * each.size for each in possible)
        spent, budget = snapshot.link.bytes_last_minute, self.config.bytes_per_minute
        return f"{spent} bytes sent in the last minute, {needed:.0f} more do not fit into {budget} now"

    def _why_nothing_is_possible(self, snapshot: Snapshot) -> str:
        takes = snapshot.takes
        if takes.lacking:
            return takes.lacking
        features = "no server takes this bundle's features" if self._has_head else "the board has no head"
        return (
            f"{features}, and {'no server takes pictures' if self.config.may_offload else 'pictures may not leave it'}"
        )

    # ---- a link that is not usable ----

    def _test_link_or_wait(
        self,
        snapshot: Snapshot,
        possible: list[Candidate],
        affordable: list[Candidate],
        outage: Outage,
        why: str,
        limit: float,
        now: float,
    ) -> Decision:
        if outage == "offline" and snapshot.awaited:
            self._retry = None
            return self._device_alone(snapshot, possible, f"{why}: {snapshot.awaited}", outage)
        if self._retry and self._retry.outage == "offline" and outage != "offline":
            self._retry = None  # broker or server are back: what was lost before says little about them
        retry = self._retry = self._retry or _LinkRetry(now + FIRST_RETRY_S, FIRST_RETRY_S, outage)
        retry.outage = outage
        if now >= retry.next_at:
            retry.wait_s = min(2 * retry.wait_s, LAST_RETRY_S)
            retry.next_at = now + retry.wait_s
            smallest = min(affordable, key=lambda each: each.size)
            return _decide(
                smallest, snapshot, possible, f"the link is tried again: {why}", limit, is_probe=True, outage=outage
            )
        retry.next_at = min(retry.next_at, now + LAST_RETRY_S)  # if the clock stepped back, do not wait for ever
        return self._device_alone(snapshot, possible, f"{why}, next try in {retry.next_at - now:.0f} s", outage)

    def _device_alone(self, snapshot: Snapshot, possible: list[Candidate], why: str, outage: Outage | None) -> Decision:
        device = Candidate("device", ms=0.0, best_ms=0.0, board_ms=0.0, size=0.0)
        return _decide(device, snapshot, possible, why, outage=outage)

    # ---- which of the possible ones ----

    def _find_probe(self, in_time: list[Candidate]) -> Candidate | None:
        """A paradigm that could be better than all others, and costs little if it is not."""
        if self._frames_since_probe < PROBE_EVERY:
            return None
        best = min(in_time, key=lambda each: each.cost_ms)
        max_cost_ms = PROBE_COST * min(self._frames_since_probe, MAX_SAVED_FRAMES) * best.ms
        probes = [
            each
            for each in in_time
            if each.paradigm != best.paradigm
            and each.best_ms + each.risk_ms < (1 - SMALL_GAIN) * best.cost_ms
            and each.ms - best.ms <= max_cost_ms
        ]
        return min(probes, key=lambda each: each.best_ms, default=None)

    def _best_or_in_use(self, in_time: list[Candidate]) -> Candidate:
        """The best one, unless the paradigm in use is nearly as good."""
        best = min(in_time, key=lambda each: each.cost_ms)
        in_use = next((each for each in in_time if each.paradigm == self._in_use), None)
        if in_use and best.paradigm != in_use.paradigm:
            gain = (in_use.cost_ms - best.cost_ms) / max(in_use.cost_ms, 1e-9)
            frames = self._better.frames + 1 if self._better.paradigm == best.paradigm else 1
            self._better = _BetterParadigm(best.paradigm, frames) if gain > SMALL_GAIN else _BetterParadigm()
            if gain <= LARGE_GAIN and self._better.frames < LASTING_FRAMES:
                return in_use
        self._in_use, self._better = best.paradigm, _BetterParadigm()
        return best


def _find_outage(snapshot: Snapshot, affordable: list[Candidate], deadline_ms: float) -> tuple[Outage | None, str]:
    """Why the link cannot be used, and the same in words."""
    losses, loss, fastest_ms = snapshot.link.losses_in_row, snapshot.link.reply_loss, min(c.ms for c in affordable)
    if not snapshot.is_online:
        return "offline", snapshot.why_offline
    if losses >= LOST_IN_ROW:
        return "loss", f"no answer to the last {losses} requests"
    if losses and (loss or 0.0) > LOST_SHARE:
        return "loss", f"no answer to {loss:.0%} of the latest requests"
    if fastest_ms > deadline_ms:
        return "deadline", f"an answer would take {_ms(fastest_ms)}, wanted within {_ms(deadline_ms)}"
    return None, ""


def _decide(
    chosen: Candidate,
    snapshot: Snapshot,
    possible: list[Candidate],
    why: str,
    max_feature_bytes: float = inf,
    is_probe: bool = False,
    outage: Outage | None = None,
) -> Decision:
    """With the explanation."""
    limit = int(max_feature_bytes) if max_feature_bytes < inf else None
    expected_ms = {each.paradigm: round(min(each.ms, 1e9), 1) for each in possible}
    explain = Explain(chosen.paradigm, f"{chosen.paradigm}: {why}"[:256], expected_ms, _numbers(snapshot))
    return Decision(chosen.paradigm, explain, chosen.writes_draft, chosen.sends_draft, is_probe, outage, limit)


def _comparison(chosen: Candidate, possible: list[Candidate], snapshot: Snapshot) -> str:
    """The comparison that decided, for people."""
    draft_ms, pass_ms = known(snapshot.board.draft_ms, DRAFT_MS), known(snapshot.server.pass_ms, PASS_MS)
    saved_ms = max(0.0, decoding_ms(snapshot, "plain")[0] - decoding_ms(snapshot, "drafted")[0])
    passes = f"{saved_ms / max(pass_ms, 1e-9):.0f} passes of {_ms(pass_ms)}"
    others = {each.paradigm: each for each in possible if each.paradigm != chosen.paradigm}
    if chosen.paradigm == "offload" and chosen.sends_draft and not snapshot.server.pass_ms:
        return f"draft {_ms(draft_ms)}, and a server says that it uses drafts"
    if chosen.sends_draft:
        share = snapshot.board.accepted_unverified_share if chosen.paradigm == "speculative" else None
        easy = f", and {share:.0%} of the drafts need no server" if share else ""
        return f"draft {_ms(draft_ms)} saves {passes}{easy}"
    if chosen.paradigm == "split" and (speculative := others.get("speculative")):
        if draft_ms > saved_ms:
            return f"draft {_ms(draft_ms)} would save only {passes}"
        return f"{_ms(chosen.ms)} expected, speculative {_ms(speculative.ms)}"
    if not others:
        return "nothing else is possible"
    best = min(others.values(), key=lambda each: each.cost_ms)
    return f"{chosen.size:.0f} bytes and {_ms(chosen.ms)} expected, {best.paradigm} {_ms(best.ms)}"


def _ms(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.2g} ms"


def _numbers(snapshot: Snapshot) -> dict[str, float]:
    """The known numbers of the snapshot, at most 32, as events publish them."""
    parts = (snapshot, snapshot.link, snapshot.server, snapshot.board)
    values = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
    if estimate := snapshot.link.estimate:
        values |= {"link_ms": round(estimate.ms, 1), "link_window_bytes": round(estimate.window)}
    values["stands_share"] = values.pop("accepted_unverified_share")  # the name that events have always had
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    return {name: round(value, 3) for name, value in numbers.items() if isfinite(value)}
