"""The labels that a board has seen, as they stand in a request beside its features: three bytes each.

The class's number (uint16, big-endian), then its probability in 255ths (uint8). See docs/protocol.md, section 3.
"""

from collections.abc import Iterable

from edge_runtime.wire.errors import EnvelopeError

MAX_LABELS = 5  # of a request or an answer, the likeliest
LABEL_BYTES = 3
MAX_CLASS = (1 << 16) - 1
_MAX_TOTAL = 255 + MAX_LABELS  # each probability is rounded


def encode_labels(labels: Iterable[tuple[int, float]]) -> bytes:
    """(class, probability), the likeliest first, to bytes. What rounds to a probability of 0 is left out."""
    rounded = ((number, round(255 * probability)) for number, probability in labels)
    return b"".join(number.to_bytes(2, "big") + bytes([share]) for number, share in rounded if share)


def decode_labels(data: bytes) -> dict[int, float]:
    """The inverse of `encode_labels`: class to probability. Raises EnvelopeError for bytes that it never writes."""
    if len(data) % LABEL_BYTES or len(data) > LABEL_BYTES * MAX_LABELS:
        raise EnvelopeError(f"{len(data)} bytes of labels, want at most {MAX_LABELS} times {LABEL_BYTES}")
    entries = [data[at : at + LABEL_BYTES] for at in range(0, len(data), LABEL_BYTES)]
    shares = {int.from_bytes(entry[:2], "big"): entry[2] for entry in entries}
    if len(shares) < len(entries) or 0 in shares.values() or sum(shares.values()) > _MAX_TOTAL:
        raise EnvelopeError(
            "labels with a class twice, a probability of 0, or more than 1 in all: want each class once"
        )
    return {number: share / 255 for number, share in shares.items()}
