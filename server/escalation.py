"""Whether a server passes a request up to the tier above, and what goes there and comes back, as functions of values.

The board has this server's text by then, so passing up never delays the first answer. It is worth its bytes and passes
if this text is likely to be improved on, or if the request asks for a higher tier. This text goes up as the draft: the
tier above keeps what it would have written as well, so what comes back is its own text to the token (greedy
verification, Leviathan et al., arXiv 2211.17192). A small share goes up unasked, since otherwise nobody would learn
what passing up changes. Knows nothing of connections; time and chance are arguments.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import msgspec

from edge_runtime.wire import Options, Paradigm, Reply, Request, Tier, aged, encode_tokens
from edge_runtime.wire.envelope import MAX_QUESTIONS, MAX_VIA, seed_of

RESERVE = 0.1  # of a request's time, kept for the last reply's way to the board
MAX_RESERVE_S = 1.0
MAX_HOPS = 16  # of a reply
MAX_BOARDS = 1024  # whose allowances are remembered
LATEST = 512  # answers, among which a new one is ranked
MAX_SAVED = 8.0  # requests that a board may pass up at once after it has asked for less than it may

Reason = Literal["tier", "confidence", "explore"]
Obstacle = Literal["no_upstream", "offline", "full", "board_full", "too_late"]


@dataclass(frozen=True, slots=True)
class Above:
    """The tier above as it is known now."""

    is_online: bool  # its broker
    has_room: bool  # in the table of requests that wait for it
    round_trip_s: float  # longer than most of the late replies took; 0: not known


@dataclass(frozen=True, slots=True)
class Bounds:
    """The operator's. The defaults pass nothing up unless it is asked for."""

    min_confidence: float = 0.0  # texts below it go up,
    max_share: float = 0.0  # but only this share of all answers: the least sure ones
    explore: float = 0.0  # this share of the others goes up too, and counts in max_share
    max_requested_share: float = 1.0  # of each board's answers, on its own request
    max_open_per_board: int = 1 << 30  # requests of one board that wait for the tier above


class Ranks:
    """How sure an answer is among the latest.

    A confidence is not a probability: what 0.4 says differs between targets and between scenes, so a bound on it alone
    passes up an unknown share. On 1,000 photos of Flickr8k nine in ten texts of one edge target had 0.23 to 0.64, and
    94 were the cloud's to the token. It is good for an order, and a weak one: with the less sure half passed up, CIDEr
    was 0.950 of the cloud's, with a random half 0.933, with half by the product of the probabilities 0.945. The product
    tells better which texts would come back unchanged (area under the curve 0.85 to 0.82).
    """

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=LATEST)

    def rank(self, confidence: float, chance: float) -> float:
        """The share of the latest answers that were less sure, in [0, 1); the next call compares with this one too.

        chance, uniform in [0, 1), places it among its equals: a camera that sees one thing all day has many.
        """
        less = sum(other < confidence for other in self._latest)
        equal = self._latest.count(confidence) + 1
        rank = (less + chance * equal) / (len(self._latest) + 1)
        self._latest.append(confidence)
        return rank


class Allowances:
    """How many of its answers a board may have passed up because it asks for it.

    A token bucket per board, filled by its answers and not by time, so the bound is a share and holds at any load.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._saved: OrderedDict[str, float] = OrderedDict()  # by board, the latest last

    def spend(self, board: str, asks: bool) -> bool:
        """Call it once per answer. True: the board asks for a higher tier and may have it."""
        saved = min(self._saved.pop(board, 0.0) + self._share, MAX_SAVED)
        may_ask = asks and saved >= 1.0
        self._saved[board] = saved - may_ask
        if len(self._saved) > MAX_BOARDS:
            self._saved.popitem(last=False)
        return may_ask


def requested_reason(options: Options | None, tier: Tier, confidence: float) -> Reason | None:
    """Why the request itself wants an answer of this tier to go up; None: it does not."""
    if options and options.tier is not None and options.tier > tier:
        return "tier"
    if options and options.min_confidence is not None and confidence < options.min_confidence:
        return "confidence"
    return None


def own_reason(confidence: float, rank: float, bounds: Bounds, chance: float) -> Reason | None:
    """Why an answer should go up by the operator's bounds; None: it is final.

    rank: of its confidence, see Ranks. chance: uniform in [0, 1), and another one than the rank's.
    """
    explore = min(bounds.explore, bounds.max_share)
    if confidence < bounds.min_confidence and rank < bounds.max_share - explore:
        return "confidence"
    return "explore" if chance < explore else None


def obstacle_to(above: Above | None, left_s: float, board_has_room: bool = True) -> Obstacle | None:
    """Why the tier above cannot be asked now, with left_s seconds for its reply; None: it can.

    above: None, if there is no tier above. board_has_room: fewer of the board's requests wait for it than may.
    """
    if above is None:
        return "no_upstream"
    if not above.is_online:
        return "offline"
    if not above.has_room:
        return "full"
    if not board_has_room:
        return "board_full"
    return "too_late" if left_s <= above.round_trip_s else None


def ask_until(arrived_at: float, deadline: float) -> float:
    """When this server stops waiting for the tier above; seconds, on the clock of both arguments."""
    return deadline - min(RESERVE * (deadline - arrived_at), MAX_RESERVE_S)


def is_loop(options: Options, server: str) -> bool:
    """Whether a request has passed this server before, or as many servers as it may."""
    return server in options.via or len(options.via) >= MAX_VIA


def passed_up(request: Request, server: str, tokens: Sequence[int], waited_s: float) -> Request:
    """The same envelope waited_s seconds later, with this server's tokens as the draft and its id in `via`."""
    options = request.options or Options()
    # The tier above gets another request id, and shall have the same noise.
    seed = seed_of(options, request.id) if options.is_sampled else options.seed
    later = aged(request, waited_s, request.budget_ms / 1e3 - waited_s)
    return msgspec.structs.replace(
        later,
        paradigm=Paradigm.OFFLOAD if request.paradigm is Paradigm.OFFLOAD else Paradigm.SPECULATIVE,
        draft=encode_tokens(tokens),
        options=msgspec.structs.replace(options, via=(*options.via, server), seed=seed),
    )


def passed_down(own: Reply, above: Reply) -> Reply:
    """What the board is told of a reply from above to its request: all of it, behind this server's own hop.

    Questions that the tier above does not have keep this server's answers: both have the same features. The board sends
    its next frames here, so the tier above cannot speak of references.
    """
    answers = dict(islice(((own.answers or {}) | (above.answers or {})).items(), MAX_QUESTIONS))
    hops = (*own.hops, *above.hops)[:MAX_HOPS]
    return msgspec.structs.replace(above, id=own.id, hops=hops, answers=answers or None, is_reference=own.is_reference)
