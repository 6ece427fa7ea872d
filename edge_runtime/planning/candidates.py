"""What each paradigm is expected to take, as the sum of the stages on its way: a function of a snapshot.

In split the request is sent before the draft is decoded, so the draft costs no time until the verified text. In
speculative, and in offload with a draft, the draft is on the way: it saves the server's decoder some passes. In
speculative it is the answer at once if it needs no verification.
"""

from dataclasses import dataclass
from math import inf

from edge_runtime.planning.feature_bytes import OTHER_BYTES
from edge_runtime.planning.link_model import LinkEstimate
from edge_runtime.planning.measurements import Snapshot
from edge_runtime.planning.server_estimator import Decoding
from edge_runtime.wire.event import ParadigmName

# Used until measured; plausible values of a small board and a small server. The first frames correct them.
RESIZE_MS, HEAD_MS, DRAFT_MS, ENCODE_MS, SERVER_MS, PASS_MS = 2.0, 20.0, 10.0, 2.0, 5.0, 2.0
PICTURE_EXTRA_MS = 8.0  # more than SERVER_MS, since the server computes the head
TOKENS = 12.0
REQUEST_BYTES: dict[ParadigmName, float] = {"split": 500.0, "speculative": 520.0, "offload": 16_000.0}
UNKNOWN_LINK = LinkEstimate(150.0, 512.0)
DRAFTED_PASSES_RATIO = 0.6  # of the passes without a draft
BEST_PASSES_RATIO = 0.7  # of the likely passes is the least that a way of decoding may need that was not seen lately
HOT_C, HOT_FACTOR = 80.0, 1.5  # boards begin to throttle here, and computing on a hot board makes it slower still


@dataclass(frozen=True, slots=True)
class Candidate:
    """One paradigm and what it is expected to take."""

    paradigm: ParadigmName
    ms: float  # from the frame to the verified text, likely
    best_ms: float  # the same, if everything that is not known turns out well
    board_ms: float  # CPU time of the board
    size: float  # bytes of the request
    risk_ms: float = 0.0  # the cost of a change to a slow link, times its probability
    writes_draft: bool = True
    sends_draft: bool = False

    @property
    def cost_ms(self) -> float:
        """Candidates are compared by this."""
        return self.ms + self.risk_ms


def candidate(
    paradigm: ParadigmName,
    snapshot: Snapshot,
    writes_draft: bool,
    max_feature_bytes: float = inf,
    sends_draft: bool = False,
) -> Candidate:
    """What split, speculative or offload would take. writes_draft: even if the draft is only shown.

    max_feature_bytes: of split and speculative. sends_draft: with the picture; speculative always sends it.
    """
    sends_draft = sends_draft or paradigm == "speculative"
    writes_draft = writes_draft or sends_draft
    link, server, board = snapshot.link, snapshot.server, snapshot.board
    resize, head = known(board.resize_ms, RESIZE_MS), known(board.head_ms, HEAD_MS)
    draft, encode = known(board.draft_ms, DRAFT_MS), known(board.encode_ms, ENCODE_MS)
    if sends_draft:  # labels are found before it is written, or else before features are encoded
        draft += known(board.labels_ms, 0.0)
    elif paradigm != "offload":
        encode += known(board.labels_ms, 0.0)
    decoding: Decoding = "drafted" if sends_draft else "plain"
    latent_ms = known(server.server_ms, SERVER_MS)
    if paradigm == "offload":
        before, encode = resize + (head if sends_draft else 0.0), known(board.picture_ms, encode)
        work_ms = known(server.picture_server_ms, latent_ms + PICTURE_EXTRA_MS)
        best_work_ms = known(server.picture_server_ms, latent_ms)
    else:
        before = resize + head
        work_ms = best_work_ms = server.kind_server_ms.get(decoding, latent_ms)
    before += draft if sends_draft else 0.0
    sent_share = 1.0 - (board.accepted_unverified_share or 0.0) if paradigm == "speculative" else 1.0
    needs_head = writes_draft or paradigm != "offload"
    board_ms = resize + encode + (head if needs_head else 0.0) + (draft if writes_draft else 0.0)

    longest = max_feature_bytes + OTHER_BYTES
    smallest = min(request_bytes(snapshot, "split"), request_bytes(snapshot, "speculative"), longest)
    size = request_bytes(snapshot, paradigm)
    if paradigm != "offload":
        size = min(size, longest)
    network = link.estimate or UNKNOWN_LINK
    risk_ms = 0.0
    if link.slowest:
        risk_ms = link.change_chance * max(0.0, link.slowest.worst_ms(size) - link.slowest.worst_ms(smallest))
    factor = HOT_FACTOR if board.throttled or (board.temperature_c or 0.0) >= HOT_C else 1.0
    # Whether the draft needs verification is known before anything is encoded or sent.
    before, after = factor * before, factor * encode + (server.queue_ms or 0.0)
    passes_ms, best_passes_ms = decoding_ms(snapshot, decoding)
    ms = before + sent_share * (after + network.likely_ms(size) + work_ms + passes_ms)
    best_ms = before + sent_share * (after + network.best_ms(size) + best_work_ms + best_passes_ms)
    return Candidate(paradigm, ms, best_ms, board_ms, size, sent_share * risk_ms, writes_draft, sends_draft)


def decoding_ms(snapshot: Snapshot, decoding: Decoding) -> tuple[float, float]:
    """The passes of the server's decoder in ms: likely, and at best."""
    server = snapshot.server
    passes = known(server.plain_passes, known(server.tokens, TOKENS) + 1)  # one pass per token and one for the end
    if decoding == "drafted":
        passes = known(server.drafted_passes, DRAFTED_PASSES_RATIO * passes)
    if decoding in server.kind_pass_ms:
        ms = passes * server.kind_pass_ms[decoding]
        return ms, ms
    # A server that proposes tokens itself may need no more passes than with the board's draft.
    best_passes = BEST_PASSES_RATIO * passes
    if server.drafted_passes is not None:
        best_passes = min(best_passes, server.drafted_passes)
    pass_ms = known(server.pass_ms, PASS_MS)
    return passes * pass_ms, best_passes * pass_ms


def request_bytes(snapshot: Snapshot, paradigm: ParadigmName) -> float:
    return snapshot.link.request_bytes.get(paradigm, REQUEST_BYTES[paradigm])


def known(value: float | None, default: float) -> float:
    """The value if it is known, else the default."""
    return default if value is None else value
