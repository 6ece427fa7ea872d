"""What a board reads of a new bundle before it trusts anybody, and what a sender reads of a board."""

import tempfile
from pathlib import Path

from edge_runtime.firmware.archive import Archive
from edge_runtime.firmware.signature import SignatureError, claimed
from edge_runtime.inference.bundle import BundleError
from edge_runtime.wire import EnvelopeError
from edge_runtime.wire.update import decode_chunk, decode_update_state, encode_chunk, encode_update_state
from tests.fuzz.mutations import JSON, MSGPACK
from tests.fuzz.target import Target

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-archive-")


def archive(data: bytes) -> None:
    path = Path(FOLDER.name) / "bundle.tar"
    path.write_bytes(data)
    with Archive(path) as opened:
        opened.signature()


def chunk(data: bytes) -> None:
    read = decode_chunk(data)
    assert decode_chunk(encode_chunk(read)) == read


def update_state(data: bytes) -> None:
    read = decode_update_state(data)
    assert decode_update_state(encode_update_state(read)) == read


TARGETS = {
    "archive": Target(archive, BundleError, 16384),
    "chunk": Target(chunk, EnvelopeError, 512, format=MSGPACK),
    "signature": Target(claimed, SignatureError, 2048),
    "update_state": Target(update_state, EnvelopeError, 1024, format=JSON),
}
