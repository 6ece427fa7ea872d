"""The messages while a board gets a new bundle; docs/protocol.md, section 14.

The offer is the content of a bundle.sig, so it needs no code here. A chunk is a msgpack array, as an envelope is. What
the board says is JSON.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from edge_runtime.wire.bounded import decode_bounded

VERSION = 1
CHUNK_BYTES = 16 * 1024  # of a file in one message: it passes a link of 16 kbit/s within a keepalive of 10 s
WINDOW_BYTES = 4 * CHUNK_BYTES  # that a board asks for at once
MAX_CHUNK = CHUNK_BYTES + 64  # bytes of the message
MAX_UPDATE_STATE = 4096  # bytes of the message
INSTALL = "install"  # what a user says of a bundle that waits
MAX_FILE_BYTES = 1 << 36  # as in a manifest

# wants: the sender has to send more. kept, refused and waiting (for a user, who installs it) are the end.
UpdateWord = Literal["wants", "waiting", "testing", "installed", "trial", "kept", "refused"]


class Chunk(Struct, array_like=True, frozen=True):
    """A piece of a file, from a sender to a board."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    file: Annotated[bytes, Meta(min_length=32, max_length=32)]  # SHA-256 of the whole file
    offset: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]  # of the piece in the file
    data: Annotated[bytes, Meta(min_length=1, max_length=CHUNK_BYTES)]


class UpdateState(Struct, frozen=True, omit_defaults=True):
    """A board's answer to an offered bundle."""

    state: UpdateWord
    bundle: Annotated[str, Meta(max_length=16)] = ""  # its id; "" if the offer could not be read
    file: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""  # wants: SHA-256 of the file that is next
    offset: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)] = 0  # wants: from here
    bytes: Annotated[int, Meta(ge=0, le=WINDOW_BYTES)] = 0  # wants: so many
    received: Annotated[int, Meta(ge=0)] = 0  # bytes of the bundle's files that are stored
    total: Annotated[int, Meta(ge=0)] = 0  # bytes of those that are known to be needed
    why: Annotated[str, Meta(max_length=1024)] = ""  # refused: for people


_chunk, _update_state = msgspec.msgpack.Decoder(Chunk), msgspec.json.Decoder(UpdateState)


def encode_chunk(chunk: Chunk) -> bytes:
    return msgspec.msgpack.encode(chunk)


def decode_chunk(data: bytes) -> Chunk:
    """Raises EnvelopeError."""
    return decode_bounded(_chunk, data, MAX_CHUNK, "a chunk")


def encode_update_state(state: UpdateState) -> bytes:
    return msgspec.json.encode(state)


def decode_update_state(data: bytes) -> UpdateState:
    """Raises EnvelopeError."""
    return decode_bounded(_update_state, data, MAX_UPDATE_STATE, "an update state")
