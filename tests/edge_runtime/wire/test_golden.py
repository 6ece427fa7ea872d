"""Vectors that every version reproduces byte for byte, and a second decoder that shares nothing with the first."""

import json
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.wire import (
    BitstreamError,
    ContentKind,
    EnvelopeError,
    Hop,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    decode_event,
    decode_reply,
    decode_request,
    encode_event,
    encode_labels,
    encode_reply,
    encode_request,
    encode_tokens,
)
from edge_runtime.wire.bitstream import Inter, Reference, decode, encode
from edge_runtime.wire.tables import Tables

ROOT = Path(__file__).parents[3]
BITSTREAMS = json.loads((ROOT / "tests/golden/bitstream.json").read_text())
ENVELOPES = json.loads((ROOT / "tests/golden/envelope.json").read_text())
EVENTS = json.loads((ROOT / "tests/golden/event.json").read_text())
REFUSED = json.loads((ROOT / "tests/golden/refused.json").read_text())


class CutError(Exception):
    pass


def plain_decode(file: bytes, data: bytes, reference: bytes = b"") -> tuple[list[int], int, bool]:
    """docs/protocol.md, sections 5 and 6, word for word: plain, slow. Symbols, complete channels, checked.

    reference: the symbols of the earlier frame, for a table file with seven contexts.
    """
    levels, contexts, M, G = file[5:9]
    C, H, W = (int.from_bytes(file[i : i + 2], "little") for i in (10, 12, 14))
    level, sent = data[0] >> 1 & 7, (data[1] & 3) + 1
    assert level < levels
    assert file[16] & 63 == data[1] >> 2
    assert data[0] & 1 == (contexts == 7)
    header = 4 if data[0] & 1 else 2
    position = header + 4
    x = int.from_bytes(data[header:position], "big")

    def step(f: list[int]) -> int:
        nonlocal x, position
        if x < 65536:
            if position + 2 > len(data):
                raise CutError
            x = x * 65536 + int.from_bytes(data[position : position + 2], "big")
            position += 2
        v, k, c = x & 4095, 0, 0
        while v >= c + f[k]:
            c += f[k]
            k += 1
        x = f[k] * (x // 4096) + v - c
        return k

    def sign(c: int, y: int, x: int) -> int:
        s = symbols[(c, y, x)] if y >= 0 and x >= 0 else 0
        return (s > 0) - (s < 0)

    symbols: dict[tuple[int, int, int], int] = {}
    checked = False
    try:
        if len(data) < header + 4:
            raise CutError
        for at in product(range(C // G * sent), range(H), range(W)):
            channel, row, column = at
            t = sign(channel, row, column - 1) + sign(channel, row - 1, column)
            context = (t > 0) - (t < 0) + 1 if contexts == 3 else 0
            if contexts == 7:
                earlier = reference[(channel * H + row) * W + column]
                context = min(max(earlier - 256 if earlier > 127 else earlier, -3), 3) + 3
            begin = 18 + 2 * ((level * C + channel) * contexts + context) * M
            f = [int.from_bytes(file[i : i + 2], "little") for i in range(begin, begin + 2 * M, 2)]
            k = step(f)
            symbols[at] = k - (M // 2 - 1) if k < M - 1 else step([16] * 256) - 128
        covered = file[:-4] + data[:header] + reference[: len(symbols)] + bytes(s & 255 for s in symbols.values())
        assert position == len(data)
        assert x - 65536 == zlib.crc32(covered) & 0xFFFF
        checked = True
    except CutError:
        pass
    complete = len(symbols) // (H * W)
    whole = list(symbols.values())[: complete * H * W]
    return whole + [0] * (C * H * W - len(whole)), complete, checked


@pytest.mark.parametrize("vector", BITSTREAMS["inter_vectors"], ids=lambda v: v["name"])
def test_bitstreams_with_a_reference_are_what_they_always_were(vector: dict[str, Any]):
    file, data = bytes.fromhex(BITSTREAMS["tables"][vector["tables"]]), bytes.fromhex(vector["bytes"])
    tables, alone = (
        Tables.from_bytes(bytes.fromhex(BITSTREAMS["tables"][n])) for n in (vector["tables"], "one context")
    )
    symbols, earlier = (
        np.frombuffer(bytes.fromhex(vector[name]), np.int8).reshape(tables.shape) for name in ("symbols", "reference")
    )
    reference = Reference(vector["reference_name"], earlier)
    assert tables.to_bytes() == file
    assert encode(symbols, tables, vector["level"], vector["groups"], reference) == data
    decoded = decode(data, alone, Inter(tables, lambda header: earlier if header.reference == reference.name else None))
    sent = 2 * vector["groups"]
    assert np.array_equal(decoded.symbols[:sent], symbols[:sent])
    assert plain_decode(file, data, earlier.tobytes()) == (decoded.symbols.ravel().tolist(), sent, True)


@pytest.mark.parametrize("vector", BITSTREAMS["vectors"], ids=lambda v: f"{v['tables']}, {v['name']}")
def test_bitstreams_are_what_they_always_were(vector: dict[str, Any]):
    file, data = bytes.fromhex(BITSTREAMS["tables"][vector["tables"]]), bytes.fromhex(vector["bytes"])
    tables = Tables.from_bytes(file)
    symbols = np.frombuffer(bytes.fromhex(vector["symbols"]), np.int8).reshape(tables.shape)
    assert tables.to_bytes() == file
    assert encode(symbols, tables, vector["level"], vector["groups"])[: len(data)] == data
    decoded = decode(data, tables)
    kept, group = decoded.complete_channels, tables.channels // tables.groups
    assert (kept // group, decoded.checked) == (vector["complete_groups"], vector["checked"])
    assert np.array_equal(decoded.symbols[:kept], symbols[:kept])
    assert plain_decode(file, data) == (decoded.symbols.ravel().tolist(), kept, decoded.checked)


def test_a_second_decoder_agrees_on_every_message_and_every_cut(tables: Tables, frames: NDArray[np.int8]):
    for i, symbols in enumerate(frames):
        data = encode(symbols, tables, i % 2, 1 + i % 4)
        for size in [*range(2, len(data), 7), len(data)]:
            decoded = decode(data[:size], tables)
            wanted = decoded.symbols.ravel().tolist(), decoded.complete_channels, decoded.checked
            assert plain_decode(tables.to_bytes(), data[:size]) == wanted


def test_one_changed_entry_of_a_golden_table_is_found():
    """The negative control of the vectors: they can fail."""
    vector = BITSTREAMS["vectors"][-1]
    tables = Tables.from_bytes(bytes.fromhex(BITSTREAMS["tables"][vector["tables"]]))
    frequencies = tables.frequencies.copy()
    frequencies[0, 63, 0, 6:8] += np.array([1, -1], np.int16).astype(np.uint16)
    with pytest.raises(BitstreamError):
        decode(bytes.fromhex(vector["bytes"]), Tables(frequencies, 7, 7, 4, tables.set_id))


@pytest.mark.parametrize("vector", ENVELOPES, ids=lambda v: v["name"])
def test_envelopes_are_what_they_always_were(vector: dict[str, Any]):
    data = bytes.fromhex(vector["bytes"])
    raw = [{"hex": i.hex()} if isinstance(i, bytes) else i for i in msgspec.msgpack.decode(data)]
    assert raw == vector["array"]
    is_request = vector["name"].startswith("request")
    again = encode_request(decode_request(data)) if is_request else encode_reply(decode_reply(data))
    # An earlier version's fields that are gone are ignored, and those that it does not have get their defaults.
    present = next(other for other in ENVELOPES if other["name"] == vector.get("read_as", vector["name"]))
    assert again == bytes.fromhex(present["bytes"])


@pytest.mark.parametrize("vector", EVENTS, ids=lambda v: v["name"])
def test_events_are_what_they_always_were(vector: dict[str, Any]):
    assert encode_event(decode_event(vector["json"].encode())).decode() == vector["json"]


@pytest.mark.parametrize("vector", REFUSED["replies"], ids=lambda v: v["name"])
def test_what_is_no_reply_is_refused(vector: dict[str, Any]):
    with pytest.raises(EnvelopeError):
        decode_reply(bytes.fromhex(vector["bytes"]))


@pytest.mark.parametrize("vector", REFUSED["events"], ids=lambda v: v["name"])
def test_what_is_no_event_is_refused(vector: dict[str, Any]):
    with pytest.raises(EnvelopeError):
        decode_event(vector["json"].encode())


def test_the_worked_example_of_the_protocol_is_right():
    text = (ROOT / "docs/protocol.md").read_text()
    tables = Tables(np.array([[[[1024, 2048, 1000, 24]]]], np.uint16), height=1, width=3, groups=1, set_id=5)
    latent = encode(np.array([[[0, 1, -5]]], np.int8), tables)
    request = Request(
        id=bytes.fromhex("0123456789abcdef"),
        bundle=bytes.fromhex("00112233445566ff"),
        paradigm=Paradigm.SPECULATIVE,
        age_ms=40,
        budget_ms=1960,
        content_kind=ContentKind.LATENT,
        content=latent,
        draft=encode_tokens([2, 300, 70000]),
        labels=encode_labels([(282, 176 / 255)]),
    )
    reply = Reply(
        id=request.id,
        status=Status.OK,
        tokens=encode_tokens([2, 300, 9]),
        text="a dog",
        tier=Tier.EDGE,
        server="e1",
        accepted=2,
        proposed=3,
        passes=2,
        confidence=0.5,
        hops=(Hop(Tier.EDGE, "e1", 1.5, 20.0),),
    )
    for data in (tables.to_bytes(), latent, encode_request(request), encode_reply(reply)):
        assert f"    {data.hex(' ')}\n" in text
    assert plain_decode(tables.to_bytes(), latent) == ([0, 1, -5], 1, True)
