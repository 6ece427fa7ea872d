import struct
import subprocess
import sys
import zlib
from contextlib import suppress

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.inference.preprocess import (
    MAX_JPEG_SEGMENTS,
    MAX_PICTURE_BYTES,
    PIXELS,
    PictureError,
    claimed_size,
    decode_picture,
    to_input,
)

FORMATS = {
    "jpeg": (".jpg", []),
    "progressive jpeg": (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    "restarting jpeg": (".jpg", [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
    "png": (".png", []),
    "lossy webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 80]),
    "lossless webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
    "extended webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 80]),  # with an alpha channel, see encoded()
}


def scene(width: int, height: int) -> np.ndarray:
    """RGB: red grows to the right, green downwards, blue is constant."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


def encoded(kind: str, width: int = 40, height: int = 30) -> bytes:
    suffix, options = FORMATS[kind]
    pixels = cv2.cvtColor(scene(width, height), cv2.COLOR_RGB2BGR)
    if kind.startswith("extended"):
        pixels = np.dstack([pixels, pixels[..., 0]])
    return cv2.imencode(suffix, pixels, options)[1].tobytes()


def png(width: int, height: int) -> bytes:
    """A whole PNG with one black bit a pixel: small, whatever it claims."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp(kind: bytes, data: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBP" + kind + struct.pack("<I", len(data)) + data


SIDE = 10_001  # squared: 100 megapixels
BOMBS = {
    "png": png(SIDE, SIDE),
    "jpeg": b"\xff\xd8\xff\xe0\x00\x04\0\0\xff\xc0\x00\x11\x08" + struct.pack(">HH", SIDE, SIDE) + bytes(99),
    "lossy webp": webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", SIDE, SIDE) + bytes(99)),
    "lossless webp": webp(b"VP8L", b"\x2f" + struct.pack("<I", SIDE - 1 | SIDE - 1 << 14) + bytes(99)),
    "extended webp": webp(b"VP8X", bytes(4) + 2 * (SIDE - 1).to_bytes(3, "little") + bytes(99)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_picture_that_claims_100_megapixels_is_refused(kind):
    assert claimed_size(BOMBS[kind]) == (SIDE, SIDE)
    with pytest.raises(PictureError, match="claims 10001 x 10001 pixels"):
        decode_picture(BOMBS[kind])


def test_a_caller_may_take_smaller_pictures_only():
    data = encoded("png", 40, 30)
    assert decode_picture(data, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(PictureError, match="claims 40 x 30 pixels, at most 1199 are decoded"):
        decode_picture(data, max_pixels=1199)


def test_memory_that_runs_out_while_decoding_is_a_picture_error(monkeypatch):
    def without_memory(*_: object) -> None:
        cv2.resize(np.zeros((1, 1), np.uint8), (0, 0))  # any of OpenCV's own errors

    monkeypatch.setattr(cv2, "cvtColor", without_memory)
    data = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].tobytes()
    with pytest.raises(PictureError, match="picture cannot be decoded"):
        decode_picture(data)


def test_a_picture_bomb_is_refused_before_its_pixels_are_allocated(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(BOMBS["png"])
    code = """
import resource, sys
from edge_runtime.inference.preprocess import PictureError, decode_picture
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: decode_picture(data)
except PictureError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 10_000  # KiB; the pixels are 300 MB


@pytest.mark.parametrize("kind", FORMATS)
@given(st.integers(1, 70), st.integers(1, 70))
def test_the_claimed_size_is_the_size_that_is_decoded(kind, width, height):
    data = encoded(kind, width, height)
    assert claimed_size(data) == (width, height)
    assert decode_picture(data).shape == (height, width, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_colours_are_in_the_order_red_green_blue(kind):
    difference = np.abs(decode_picture(encoded(kind)).astype(int) - scene(40, 30))
    assert difference.mean() < 6


def test_markers_without_a_length_do_not_hide_the_frame_header():
    data = encoded("jpeg")
    decoy = b"\xff\x01\xff\xd0"  # read as segments, these would jump over the real header
    assert claimed_size(data[:2] + decoy + data[2:]) == (40, 30)


@pytest.mark.parametrize("filler", [b"\xff", b"\xff\xe0\x00\x02", b"\xff\x01"])
def test_endless_jpeg_segments_are_given_up(filler):
    data = b"\xff\xd8\xff\xd0" + filler * (MAX_JPEG_SEGMENTS + 1) + encoded("jpeg")[2:]
    with pytest.raises(PictureError, match="no JPEG frame header"):
        claimed_size(data)


starts = st.sampled_from(
    [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", *(webp(k, b"") for k in (b"VP8 ", b"VP8L", b"VP8X"))]
)
jpeg_markers = st.lists(
    st.sampled_from([b"\xff\xe0\x00\x00", b"\xff\xe0\x00\x02", b"\xff\xff", b"\xff\xd8", b"\xff\xc0"])
)


@given(starts, jpeg_markers, st.binary(max_size=64))
def test_any_bytes_claim_a_size_or_are_a_picture_error(start, markers, rest):
    with suppress(PictureError):
        width, height = claimed_size(start + b"".join(markers) + rest)
        assert width >= 0
        assert height >= 0


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_picture_is_a_picture_error(kind):
    data = encoded(kind, 120, 90)
    for cut in np.linspace(0, len(data) - 3, 40).astype(int):
        with pytest.raises(PictureError):
            decode_picture(data[:cut])


@given(st.sampled_from(list(FORMATS)), st.data())
def test_a_damaged_picture_is_a_picture_or_a_picture_error(kind, data):
    damaged = bytearray(encoded(kind))
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] ^= data.draw(st.integers(1, 255))
    with suppress(PictureError):
        assert decode_picture(bytes(damaged)).dtype == np.uint8


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(99), b"%PDF-1.7", bytes(99)])
def test_what_is_no_jpeg_png_or_webp_is_refused_by_name(data):
    with pytest.raises(PictureError, match="does not start a JPEG, PNG or WebP"):
        decode_picture(data)


def test_too_many_bytes_are_refused_unread():
    with pytest.raises(PictureError, match=f"at most {MAX_PICTURE_BYTES} are read"):
        decode_picture(encoded("jpeg") + bytes(MAX_PICTURE_BYTES))


@given(st.integers(1, 700), st.integers(1, 700))
def test_any_size_is_squashed_to_the_input(width, height):
    pixels = to_input(np.full((height, width, 3), (10, 120, 250), np.uint8))
    assert pixels.shape == (PIXELS, PIXELS, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (10, 120, 250)).all()


@pytest.mark.parametrize("size", [(PIXELS, PIXELS), (448, 448), (640, 480), (480, 640), (1280, 720), (230, 2000)])
def test_the_whole_frame_is_seen_at_any_size(size):
    squashed = to_input(scene(*size)).astype(int)
    assert np.abs(squashed - scene(PIXELS, PIXELS)).max() <= 3


@pytest.mark.parametrize("side", [8 * PIXELS, 9 * PIXELS - 1])  # even: by halves; odd: at once
def test_shrinking_averages_so_that_fine_patterns_turn_grey(side):
    board = np.indices((side, side)).sum(0) % 2 * 255
    assert np.abs(to_input(np.dstack(3 * [board.astype(np.uint8)])).astype(int) - 127).max() < 10


def test_a_frame_of_the_inputs_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
    assert np.array_equal(to_input(pixels), pixels)
