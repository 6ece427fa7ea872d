"""Learns what the servers' work takes, and how much of a draft they accept, from their replies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edge_runtime.planning.recent_values import RecentValues
from edge_runtime.planning.server_status import Claims
from edge_runtime.wire import Reply
from edge_runtime.wire.envelope import MAX_TOKENS
from edge_runtime.wire.event import ParadigmName

SHORT_S, LONG_S = 60.0, 600.0
Decoding = Literal["plain", "drafted"]  # without and with a draft of the board


@dataclass(frozen=True, slots=True)
class ServerSnapshot:
    """None: not known. Times are medians of the latest replies."""

    queue_ms: float | None = None  # waiting of a request
    server_ms: float | None = None  # work on a latent, without the passes of the decoder
    # The same of the last minute, by the way of decoding: a board that writes its draft meanwhile may share its
    # processor with the server.
    kind_server_ms: Mapping[Decoding, float] = field(default_factory=dict)
    picture_server_ms: float | None = None  # work on a picture, without the passes of the decoder
    pass_ms: float | None = None  # one pass of the decoder
    kind_pass_ms: Mapping[Decoding, float] = field(default_factory=dict)  # the same of the last minute
    tokens: float | None = None  # of a verified text
    plain_passes: float | None = None  # mean, for a text without a draft
    drafted_passes: float | None = None  # mean, for a text with a draft
    accepted_share: float | None = None  # of the tokens of the drafts, 0..1


class ServerEstimator:
    """Times are seconds of one clock."""

    def __init__(self, counts: Counter[str]) -> None:
        """counts: of values that were ignored; adds to passes_refused."""
        self._counts = counts
        self._queue_ms = RecentValues(max_age_s=SHORT_S)
        # A slow picture is forgotten soon: the policy does not use a slow paradigm, so nobody would measure it again.
        self._latent_ms, self._picture_ms = RecentValues(max_age_s=LONG_S), RecentValues(max_age_s=SHORT_S)
        self._pass_ms = RecentValues(max_age_s=LONG_S)
        self._latent_ms_by_decoding, self._pass_ms_by_decoding = _by_decoding(), _by_decoding()
        self._passes: dict[Decoding, RecentValues] = {
            "plain": RecentValues(32, LONG_S),
            "drafted": RecentValues(32, LONG_S),
        }
        self._predicted_drafted_passes = RecentValues(32, LONG_S)  # if the draft had been sent
        self._tokens, self._accepted = RecentValues(32), RecentValues(32)

    def answered(self, paradigm: ParadigmName, reply: Reply, draft: Sequence[int], at: float) -> None:
        """draft: of the board, whether the request contained it or not."""
        if reply.hops:
            self._learn_prices(paradigm, reply, at)
        if draft and reply.token_ids:
            self._learn_from_draft(paradigm, reply, draft, at)

    def usual_ms(self, now: float) -> float:
        """What servers usually spend on a latent."""
        passes_ms = (self._tokens.median(now) or 0.0) * (self._pass_ms.median(now) or 0.0)
        return (self._queue_ms.median(now) or 0.0) + (self._latent_ms.median(now) or 0.0) + passes_ms

    def snapshot(self, now: float, claims: Claims) -> ServerSnapshot:
        """claims: of the servers' statuses, used for what was not measured."""
        queue_ms, pass_ms, drafted = self._queue_ms.median(now), self.pass_ms(now), self._passes["drafted"].mean(now)
        return ServerSnapshot(
            queue_ms=claims.queue_ms if queue_ms is None else queue_ms,
            server_ms=self._latent_ms.median(now),
            kind_server_ms=_known(self._latent_ms_by_decoding, now),
            picture_server_ms=self._picture_ms.median(now),
            pass_ms=claims.pass_ms if pass_ms is None else pass_ms,
            kind_pass_ms=_known(self._pass_ms_by_decoding, now),
            tokens=self._tokens.median(now),
            plain_passes=self._passes["plain"].mean(now),
            drafted_passes=self._predicted_drafted_passes.mean(now) if drafted is None else drafted,
            accepted_share=self._accepted.mean(now),
        )

    def pass_ms(self, now: float) -> float | None:
        """As measured."""
        return self._pass_ms.median(now)

    def _learn_prices(self, paradigm: ParadigmName, reply: Reply, at: float) -> None:
        hop = reply.hops[0]
        passes_ms = min(hop.compute_ms, (hop.stages_ms or {}).get("passes", 0.0))
        was_read_with_picture = paradigm == "offload" and reply.proposed
        decoding: Decoding = "drafted" if paradigm == "speculative" or was_read_with_picture else "plain"
        self._queue_ms.add(hop.queue_ms, at)
        if paradigm == "offload":
            self._picture_ms.add(hop.compute_ms - passes_ms, at)
        else:
            self._latent_ms.add(hop.compute_ms - passes_ms, at)
            self._latent_ms_by_decoding[decoding].add(hop.compute_ms - passes_ms, at)
        # Each pass brings at least one token, the last pass the end. A text of another vocabulary comes without tokens.
        if reply.passes > (len(reply.token_ids) or MAX_TOKENS) + 1:
            self._counts["passes_refused"] += 1
        elif reply.passes:
            self._passes[decoding].add(reply.passes, at)
            self._pass_ms.add(passes_ms / reply.passes, at)
            self._pass_ms_by_decoding[decoding].add(passes_ms / reply.passes, at)

    def _learn_from_draft(self, paradigm: ParadigmName, reply: Reply, draft: Sequence[int], at: float) -> None:
        """A draft that was not sent is compared with the verified text, so that its value is known as well."""
        tokens = reply.token_ids
        self._tokens.add(len(tokens), at)
        both = min(len(tokens), len(draft))
        agreed = next((n for n in range(both) if tokens[n] != draft[n]), both)
        was_sent = paradigm == "speculative" and reply.proposed
        self._accepted.add(min(1.0, reply.accepted / reply.proposed) if was_sent else agreed / len(draft), at)
        # One pass verifies the draft up to its first wrong token, then each pass brings at least one token.
        self._predicted_drafted_passes.add(max(1, len(tokens) - agreed + 1), at)


def _by_decoding() -> dict[Decoding, RecentValues]:
    return {"plain": RecentValues(max_age_s=SHORT_S), "drafted": RecentValues(max_age_s=SHORT_S)}


def _known(recent: Mapping[Decoding, RecentValues], now: float) -> dict[Decoding, float]:
    return {decoding: ms for decoding, values in recent.items() if (ms := values.median(now)) is not None}
