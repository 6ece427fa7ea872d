"""Which paradigm answers the next frame, and why: the lowest expected time to a verified text within the budgets.

A state machine over values: `Facts` and the time come in, a `Decision` goes out; same inputs, same decisions. Strategy:

- What each paradigm would take is the sum of the stages on its way. In split the request leaves before the draft is
  written, so drafting costs nothing; in speculative the draft is on the way, saves the target's decoder some passes,
  and is the answer at once where it is sure enough to stand.
- Another paradigm is taken at once for a large gain, for a small one when it has lasted for some frames.
- What is not well known is tried by a frame at most every PROBE_EVERY, and only if it could be better than what is in
  use; the more a try may cost, the longer it waits.
- A link that is away, loses most requests or is too slow for the deadline leaves the device alone; a real request tries
  it again after 1, 2, 4 ... 60 s.
- A link that changes often makes large requests a risk: one that is on the way when a thin link takes over blocks all.

One thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Literal

from edge_runtime.config import PolicyConfig
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.planning.link_model import Link
from edge_runtime.planning.measurements import Facts, Kind
from edge_runtime.wire.event import Explain, ParadigmName

LARGE_GAIN, SMALL_GAIN = 0.15, 0.02  # of the present paradigm's time
LASTING = 3  # frames in a row that a small gain must be seen
PROBE_EVERY = 8  # frames, at most one of them a try
FIRST_PROBE = 4  # frames, before there is anything to compare
PROBE_PRICE = 0.02  # of the time of all frames is what tries may cost
LONGEST_SAVING = 100  # frames that a try may be saved for
UNPROVEN = 0.7  # of its likely time is the best that a decoding which was not seen lately may take
LOST_IN_ROW, LOST_SHARE = 3, 0.5  # from here on the link counts as away
FIRST_TRY_S, LAST_TRY_S = 1.0, 60.0
HOT_C, HOT_WEIGHT = 80.0, 1.5  # where boards begin to throttle; what a hot one computes makes it slower still
# Until measured: ms, bytes and counts, plausible of a small board and a small server. The first frames correct them.
DEFAULTS = Facts(
    resize_ms=2.0, head_ms=20.0, draft_ms=10.0, encode_ms=2.0, picture_ms=2.0, queue_ms=0.0, server_ms=5.0, pass_ms=2.0,
    tokens=12.0, request_bytes={"split": 500.0, "speculative": 520.0, "offload": 16_000.0},
)  # fmt: skip
UNKNOWN_LINK = Link(150.0, 512.0)
PICTURE_EXTRA_MS = 8.0  # the head on a server
DRAFTED_SHARE = 0.6  # of the plain passes
BUDGET_MARGIN = 1.25  # of a usual request, when asking whether one more fits
Away = Literal["offline", "loss", "deadline"]


@dataclass(frozen=True, slots=True)
class Decision:
    """How the next frame is answered."""

    paradigm: ParadigmName
    explain: Explain
    drafts: bool = True  # whether there is CPU time for a draft; where it is part of the paradigm, always
    is_probe: bool = False
    away: Away | None = None  # why nothing is sent, or only as a try


@dataclass(frozen=True, slots=True)
class Option:
    """One paradigm and what it is expected to take, in ms of the board and until the verified text."""

    paradigm: ParadigmName
    ms: float  # likely
    best_ms: float  # if everything that is not known is in its favour
    board_ms: float  # of CPU
    size: float  # bytes up
    risk_ms: float = 0.0  # share of what it costs if the link becomes thin
    drafts: bool = True

    @property
    def price(self) -> float:
        """What is compared."""
        return self.ms + self.risk_ms


@dataclass(slots=True)
class _Trying:
    """The link is away, and tried now and then."""

    next_at: float
    wait_s: float


@dataclass(slots=True)
class _Evidence:
    """For another paradigm."""

    paradigm: ParadigmName | None = None
    frames: int = 0


class Policy:
    """Call `choose` once a frame, `stands` when its draft is written."""

    def __init__(
        self,
        config: PolicyConfig,
        *,
        has_head: bool = True,
        has_draft: bool = True,
        calibration: Calibration | None = None,
    ) -> None:
        """Without a head only offload is possible, if pictures may leave; without a calibration no draft stands."""
        self.config, self._has_head, self._has_draft = config, has_head, has_draft and has_head
        self._calibration = calibration or Calibration()
        self._present: ParadigmName | None = None
        self._evidence = _Evidence()
        self._since_probe = PROBE_EVERY - FIRST_PROBE  # frames
        self._trying: _Trying | None = None

    def stands(self, confidence: float) -> bool:
        """Whether a draft of this confidence is worth enough of the verified text to need nobody who verifies it."""
        worth = self._calibration.worth(confidence)
        return worth > 0 and worth >= self.config.quality_floor

    def choose(self, facts: Facts, now: float, deadline_ms: float) -> Decision:
        """The next frame's paradigm; now: seconds, deadline_ms: from capture. Raises nothing."""
        options = self._options(facts)
        open_ = [option for option in options if self._fits(option, facts)]
        if not open_:
            return self._alone(facts, options, None, self._poor(options, facts))
        in_time = [option for option in open_ if option.ms <= deadline_ms]
        away, why = self._away(facts, in_time, open_, deadline_ms)
        if away:
            return self._try_or_wait(facts, options, open_, away, why, now)
        self._trying = None
        if probe := self._probe(in_time):
            self._since_probe = 1
            reason = f"a try: {_ms(probe.ms)} expected, as little as {_ms(probe.best_ms)} possible"
            return self._decision(probe, facts, options, reason, is_probe=True)
        self._since_probe += 1
        chosen = self._settle(in_time)
        return self._decision(chosen, facts, options, _reason(chosen, options, facts))

    # ---- what is possible ----

    def _options(self, facts: Facts) -> list[Option]:
        names: list[ParadigmName] = []
        if self._has_head:
            names += ["speculative", "split"] if self._has_draft else ["split"]
        if self.config.may_offload:
            names.append("offload")
        options = [_expect(name, facts, self._has_draft) for name in names]
        if not options or self.config.cpu_share >= 1 or not facts.interval_ms:
            return options
        # A board that has no time for its draft leaves it out where only its own event would show it.
        limit = self.config.cpu_share * facts.interval_ms
        leaner = [o if o.board_ms <= limit else _expect(o.paradigm, facts, drafts=False) for o in options]
        cheapest = min(option.board_ms for option in leaner)
        return [option for option in leaner if option.board_ms <= max(limit, cheapest)]

    def _fits(self, option: Option, facts: Facts) -> bool:
        """Likely within the budget of the minute, and not all of it at once: a quarter of it in a quarter of a minute.

        What it is exactly is known when the request is encoded (ledger.py).
        """
        budget, size = self.config.bytes_per_minute, BUDGET_MARGIN * option.size
        if not budget:
            return True
        is_paced = not facts.bytes_last_quarter or facts.bytes_last_quarter + size <= budget / 4
        return is_paced and facts.bytes_last_minute + size <= budget

    def _poor(self, options: Sequence[Option], facts: Facts) -> str:
        if not options:
            return "it has no head, and pictures may not leave it"
        needed = min(BUDGET_MARGIN * option.size for option in options)
        spent, budget = facts.bytes_last_minute, self.config.bytes_per_minute
        return f"{spent} bytes sent in the last minute, {needed:.0f} more do not fit into {budget} now"

    # ---- a link that is away ----

    def _away(
        self, facts: Facts, in_time: list[Option], open_: list[Option], deadline_ms: float
    ) -> tuple[Away | None, str]:
        if not facts.is_online:
            return "offline", "link offline"
        if facts.losses_in_row >= LOST_IN_ROW:
            return "loss", f"no answer to the last {facts.losses_in_row} requests"
        if facts.losses_in_row and (facts.reply_loss or 0.0) > LOST_SHARE:
            return "loss", f"no answer to {facts.reply_loss:.0%} of the latest requests"
        if not in_time:
            return "deadline", f"an answer would take {_ms(min(o.ms for o in open_))}, wanted within {_ms(deadline_ms)}"
        return None, ""

    def _try_or_wait(
        self, facts: Facts, options: list[Option], open_: list[Option], away: Away, why: str, now: float
    ) -> Decision:
        trying = self._trying = self._trying or _Trying(now + FIRST_TRY_S, FIRST_TRY_S)
        if now >= trying.next_at:
            trying.wait_s = min(2 * trying.wait_s, LAST_TRY_S)
            trying.next_at = now + trying.wait_s
            smallest = min(open_, key=lambda option: option.size)
            return self._decision(smallest, facts, options, f"a try: {why}", is_probe=True, away=away)
        # A clock that stepped back must not make it wait for ever.
        trying.next_at = min(trying.next_at, now + LAST_TRY_S)
        return self._alone(facts, options, away, f"{why}, next try in {trying.next_at - now:.0f} s")

    # ---- which ----

    def _probe(self, in_time: list[Option]) -> Option | None:
        """Worth a try: could be better than all, and costs little if it is not."""
        if self._since_probe < PROBE_EVERY:
            return None
        best = min(in_time, key=lambda option: option.price)
        bound = PROBE_PRICE * min(self._since_probe, LONGEST_SAVING) * best.ms
        others = [
            option
            for option in in_time
            if option.paradigm != best.paradigm
            and option.best_ms + option.risk_ms < (1 - SMALL_GAIN) * best.price
            and option.ms - best.ms <= bound
        ]
        return min(others, key=lambda option: option.best_ms, default=None)

    def _settle(self, in_time: list[Option]) -> Option:
        """The best one, unless the present one is nearly as good."""
        best = min(in_time, key=lambda option: option.price)
        present = next((option for option in in_time if option.paradigm == self._present), None)
        if present is None or best.paradigm == present.paradigm:
            self._present, self._evidence = best.paradigm, _Evidence()
            return best
        gain = (present.price - best.price) / max(present.price, 1e-9)
        seen = self._evidence.frames + 1 if self._evidence.paradigm == best.paradigm else 1
        self._evidence = _Evidence(best.paradigm, seen) if gain > SMALL_GAIN else _Evidence()
        if gain <= LARGE_GAIN and self._evidence.frames < LASTING:
            return present
        self._present, self._evidence = best.paradigm, _Evidence()
        return best

    # ---- saying so ----

    def _alone(self, facts: Facts, options: list[Option], away: Away | None, why: str) -> Decision:
        alone = Option("device", 0.0, 0.0, 0.0, 0.0)
        return self._decision(alone, facts, options, why, away=away)

    def _decision(
        self,
        chosen: Option,
        facts: Facts,
        options: list[Option],
        why: str,
        is_probe: bool = False,
        away: Away | None = None,
    ) -> Decision:
        expected = {option.paradigm: round(min(option.ms, 1e9), 1) for option in options}
        reason = f"{chosen.paradigm}: {why}"[:256]
        explain = Explain(chosen.paradigm, reason, expected, _numbers(facts))
        return Decision(chosen.paradigm, explain, chosen.drafts, is_probe, away)


def _expect(paradigm: ParadigmName, facts: Facts, drafts: bool) -> Option:
    """What a paradigm would take; drafts: the board writes one, if only for its own event."""
    resize, head, draft = _of(facts, "resize_ms"), _of(facts, "head_ms"), _of(facts, "draft_ms")
    kind: Kind = "drafted" if paradigm == "speculative" else "plain"
    encode, server = _of(facts, "encode_ms"), facts.kind_server_ms.get(kind, _of(facts, "server_ms"))
    server_best = server
    decoding, decoding_best = _decoding(facts, kind)
    before, asks = resize + head, 1.0
    if paradigm == "speculative":
        drafts, before, asks = True, before + draft, 1.0 - (facts.stands_share or 0.0)
    elif paradigm == "offload":
        before, encode = resize, encode if facts.picture_ms is None else facts.picture_ms
        server_best = _of(facts, "server_ms")
        server = server_best + PICTURE_EXTRA_MS
        if facts.picture_server_ms is not None:
            server = server_best = facts.picture_server_ms
    needs_head = drafts or paradigm != "offload"
    board = resize + encode + (head if needs_head else 0.0) + (draft if drafts else 0.0)

    size, smallest = _size(facts, paradigm), min(_size(facts, "split"), _size(facts, "speculative"))
    net, net_best = (facts.link or UNKNOWN_LINK).likely_ms(size), (facts.link or UNKNOWN_LINK).best_ms(size)
    risk = 0.0
    if facts.slowest:
        risk = facts.change_chance * max(0.0, facts.slowest.worst_ms(size) - facts.slowest.worst_ms(smallest))
    weight = HOT_WEIGHT if facts.throttled or (facts.temperature_c or 0.0) >= HOT_C else 1.0
    before, after = weight * before, weight * encode + _of(facts, "queue_ms")  # it is known whether the draft stands
    ms = before + asks * (after + net + server + decoding)
    best_ms = before + asks * (after + net_best + server_best + decoding_best)
    return Option(paradigm, ms, best_ms, board, size, asks * risk, drafts)


def _decoding(facts: Facts, kind: Kind) -> tuple[float, float]:
    """The decoder's passes in ms: likely, and at best."""
    plain = _of(facts, "tokens") + 1 if facts.plain_passes is None else facts.plain_passes  # the end is one too
    passes = plain
    if kind == "drafted":
        passes = DRAFTED_SHARE * plain if facts.drafted_passes is None else facts.drafted_passes
    pass_ms = facts.kind_pass_ms.get(kind, _of(facts, "pass_ms"))
    if kind in facts.kind_pass_ms:
        return passes * pass_ms, passes * pass_ms
    # A server that proposes words to itself may need no more passes than with the board's draft.
    best = UNPROVEN * passes if facts.drafted_passes is None else min(UNPROVEN * passes, facts.drafted_passes)
    return passes * pass_ms, best * pass_ms


def _of(facts: Facts, name: str) -> float:
    """A fact, or what stands for it until it is known."""
    value = getattr(facts, name)
    return float(getattr(DEFAULTS, name) if value is None else value)


def _size(facts: Facts, paradigm: ParadigmName) -> float:
    return facts.request_bytes.get(paradigm, DEFAULTS.request_bytes[paradigm])


def _reason(chosen: Option, options: list[Option], facts: Facts) -> str:
    """The comparison that decided, for people."""
    draft, pass_ms = _of(facts, "draft_ms"), _of(facts, "pass_ms")
    plain, drafted = _decoding(facts, "plain")[0], _decoding(facts, "drafted")[0]
    saved = max(0.0, plain - drafted)
    passes = f"{saved / max(pass_ms, 1e-9):.0f} passes of {_ms(pass_ms)}"
    others = {option.paradigm: option for option in options if option.paradigm != chosen.paradigm}
    if chosen.paradigm == "speculative":
        easy = f", and {facts.stands_share:.0%} of the drafts need no server" if facts.stands_share else ""
        return f"draft {_ms(draft)} saves {passes}{easy}"
    if chosen.paradigm == "split" and (other := others.get("speculative")):
        if draft > saved:
            return f"draft {_ms(draft)} would save only {passes}"
        return f"{_ms(chosen.ms)} expected, speculative {_ms(other.ms)}"
    if not others:
        return "nothing else is possible"
    best = min(others.values(), key=lambda option: option.price)
    return f"{chosen.size:.0f} bytes and {_ms(chosen.ms)} expected, {best.paradigm} {_ms(best.ms)}"


def _ms(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.2g} ms"


def _numbers(facts: Facts) -> dict[str, float]:
    """The known facts that are numbers, at most 32."""
    known = {f.name: getattr(facts, f.name) for f in fields(facts)}
    numbers = {name: round(float(value), 3) for name, value in known.items() if isinstance(value, int | float)}
    if facts.link:
        numbers |= {"link_ms": round(facts.link.ms, 1), "link_window_bytes": round(facts.link.window)}
    return {name: value for name, value in numbers.items() if -inf < value < inf}
