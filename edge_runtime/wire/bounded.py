"""Messages that anybody may have sent: within a bound, and of one kind."""

from typing import TypeVar

import msgspec

from edge_runtime.errors import AiflowError
from edge_runtime.wire.errors import EnvelopeError

T = TypeVar("T")


def decode_bounded(
    decoder: "msgspec.json.Decoder[T] | msgspec.msgpack.Decoder[T]",
    data: bytes,
    max_bytes: int,
    what: str,
    error: type[AiflowError] = EnvelopeError,
) -> T:
    """The message in these bytes. what: its name in errors, such as "an event". Raises `error` for anything else."""
    if len(data) > max_bytes:
        raise error(f"{what} of {len(data)} bytes, at most {max_bytes} are read: send less")
    try:
        return decoder.decode(data)
    # The last two: text that is not UTF-8, and lists in lists without end.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as reason:
        raise error(f"not {what}: {reason}") from reason
