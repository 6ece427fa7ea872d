import io
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
from PIL import Image

from edge_runtime.picture_checks import (
    MAX_PARTS,
    MAX_PICTURE_BYTES,
    MAX_SCANS,
    PictureError,
    check_picture,
    decode_picture,
    decode_small,
)
from testbed.sample_photos import shipped
from tests.fuzz.picture_cost import repeated

SAMPLINGS = [getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in (411, 420, 422, 440, 444)]
PROGRESSIVE = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
# Name: suffix and options of OpenCV's encoder.
ENCODED = {
    "jpeg": (".jpg", ()),
    "progressive jpeg": (".jpg", PROGRESSIVE),
    "restarting jpeg": (".jpg", (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)),
    "restarting progressive jpeg": (".jpg", (*PROGRESSIVE, cv2.IMWRITE_JPEG_RST_INTERVAL, 3)),
    "optimised jpeg": (".jpg", (cv2.IMWRITE_JPEG_OPTIMIZE, 1)),
    **{f"jpeg of quality {q}": (".jpg", (cv2.IMWRITE_JPEG_QUALITY, q)) for q in range(0, 101, 5)},
    **{f"jpeg sampled {s:x}": (".jpg", (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, s)) for s in SAMPLINGS},
    **{
        f"progressive jpeg sampled {s:x}": (".jpg", (*PROGRESSIVE, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, s))
        for s in SAMPLINGS
    },
    "png": (".png", ()),
    **{f"webp of quality {q}": (".webp", (cv2.IMWRITE_WEBP_QUALITY, q)) for q in range(1, 101, 11)},
}
# Name: mode and options of Pillow's encoder.
SAVED = {
    **{f"{mode} {format}": (mode, {"format": format}) for mode in ("L", "RGB", "CMYK") for format in ("JPEG", "MPO")},
    **{f"{mode} PNG": (mode, {"format": "PNG"}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    **{f"{mode} WEBP": (mode, {"format": "WEBP"}) for mode in ("RGB", "RGBA")},
    "progressive CMYK": ("CMYK", {"format": "JPEG", "progressive": True}),
    "progressive grey": ("L", {"format": "JPEG", "progressive": True}),
    "JPEG with a comment": ("RGB", {"format": "JPEG", "comment": b"\xff\xda" * 99}),
    "JPEG with a profile in two segments": ("RGB", {"format": "JPEG", "icc_profile": b"\xff\xc0" * 40_000}),
    "PNG with a profile": ("RGB", {"format": "PNG", "icc_profile": bytes(10_000)}),
    "WebP with a profile": ("RGB", {"format": "WEBP", "icc_profile": bytes(10_001)}),
    "PNG with transparent colours": ("P", {"format": "PNG", "transparency": 0}),
}
ORDINARY = [*ENCODED, *SAVED]


def scene(width: int, height: int) -> np.ndarray:
    """RGB: red grows to the right, green downwards, blue is constant."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


def picture(kind: str, width: int = 40, height: int = 30, orientation: int = 1) -> bytes:
    """An ordinary picture. An orientation other than 1 is written into EXIF data."""
    if kind in ENCODED and orientation == 1:
        suffix, options = ENCODED[kind]
        return cv2.imencode(suffix, cv2.cvtColor(scene(width, height), cv2.COLOR_RGB2BGR), options)[1].tobytes()
    mode, options = SAVED[kind]
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image = Image.fromarray(scene(width, height))
    (image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)).save(file, exif=exif, **options)
    return file.getvalue()


def opencv(data: bytes) -> np.ndarray:
    """What OpenCV alone decodes."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_picture_has_the_pixels_that_opencv_decodes(kind):
    data = picture(kind, 157, 91)
    assert check_picture(data)[:2] == (157, 91)
    assert np.array_equal(decode_picture(data), opencv(data))


@pytest.mark.parametrize("photo", list(shipped()), ids=lambda photo: photo.name)
def test_a_photo_has_the_pixels_that_opencv_decodes(photo):
    assert np.array_equal(decode_picture(photo.data), opencv(photo.data))


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["RGB JPEG", "RGB PNG", "RGB WEBP", "RGBA WEBP"])
def test_a_picture_is_turned_as_its_exif_data_says_and_claims_the_stored_size(kind, orientation):
    data = picture(kind, 40, 30, orientation)
    assert check_picture(data)[:2] == (40, 30)
    pixels = decode_picture(data)
    assert np.array_equal(pixels, opencv(data))
    if kind == "RGB JPEG":  # older OpenCV turns nothing else
        assert pixels.shape == ((40, 30, 3) if orientation > 4 else (30, 40, 3))


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "restarting jpeg", "png", "webp of quality 56"])
@given(st.integers(1, 70), st.integers(1, 70))
def test_the_claimed_size_is_the_size_that_is_decoded(kind, width, height):
    data = picture(kind, width, height)
    assert check_picture(data)[:2] == (width, height)
    assert decode_picture(data).shape == (height, width, 3)


@pytest.mark.parametrize(
    ("height", "least", "lines"), [(1080, 100, 135), (720, 100, 180), (480, 200, 240), (480, 480, 480), (30, 100, 30)]
)
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_small_picture_is_the_same_in_grey_with_enough_lines(kind, height, least, lines):
    data = picture(kind, height, height)
    small = decode_small(data, least)
    assert small.shape == (lines, lines)
    grey = cv2.cvtColor(decode_picture(data), cv2.COLOR_RGB2GRAY)
    assert abs(float(small.mean()) - float(grey.mean())) < 2


def test_a_small_picture_that_its_exif_data_turns_has_enough_lines_too():
    assert decode_small(picture("RGB JPEG", 400, 200, orientation=6), 100).shape == (200, 100)


def test_colours_are_in_the_order_red_green_blue():
    assert np.array_equal(decode_picture(picture("png")), scene(40, 30))


def test_bytes_after_the_end_are_ignored():  # many telephones append a second picture or a video
    data = picture("jpeg")
    assert np.array_equal(decode_picture(data + picture("progressive jpeg")), opencv(data))


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(99), b"%PDF-1.7", bytes(99)])
def test_what_is_no_jpeg_png_or_webp_is_refused_by_name(data):
    with pytest.raises(PictureError, match="does not start a JPEG, PNG or WebP"):
        decode_picture(data)


def test_too_many_bytes_are_refused_unread():
    with pytest.raises(PictureError, match=f"at most {MAX_PICTURE_BYTES} are read"):
        decode_picture(picture("jpeg") + bytes(MAX_PICTURE_BYTES))


def test_an_error_of_opencv_is_a_picture_error(monkeypatch):
    def without_memory(*_: object) -> None:
        cv2.resize(np.zeros((1, 1), np.uint8), (0, 0))  # any of OpenCV's own errors

    data = picture("png")
    monkeypatch.setattr(cv2, "cvtColor", without_memory)
    with pytest.raises(PictureError, match="picture cannot be decoded"):
        decode_picture(data)


# Pictures that claim many pixels


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    """A PNG chunk, with another length than its own if one is given."""
    body = kind + data
    return struct.pack(">I", len(data) if length is None else length) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of black bits with further chunks after its header: small, whatever size it has."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes((1 + (width + 7) // 8) * height)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + rows + chunk(b"IEND", b"")


def webp(*chunks: bytes) -> bytes:
    body = b"".join(chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def frame(width: int, height: int) -> bytes:
    """The header of a lossy WebP frame."""
    return webp_chunk(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(99))


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp_chunk(b"VP8X", struct.pack("<I", flags) + sides)


SIDE = 10_001  # squared: 100 megapixels
LARGE = {
    "png": png(SIDE, SIDE),
    "jpeg": b"\xff\xd8\xff\xe0\x00\x04\0\0\xff\xc0\x00\x11\x08" + struct.pack(">HHB", SIDE, SIDE, 3) + bytes(99),
    "webp": webp(frame(SIDE, SIDE)),
    "extended webp": webp(canvas(SIDE, SIDE), frame(SIDE, SIDE)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_picture_that_claims_100_megapixels_is_refused(kind):
    with pytest.raises(PictureError, match="claims 10001 x 10001 pixels"):
        decode_picture(LARGE[kind])


def test_a_caller_may_take_smaller_pictures_only():
    data = picture("png", 40, 30)
    assert decode_picture(data, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(PictureError, match="claims 40 x 30 pixels, at most 1199 are decoded"):
        decode_picture(data, max_pixels=1199)


def peak_growth_kib(tmp_path, data: bytes) -> int:
    """By how much a refusal raises the peak memory of a process of its own."""
    path = tmp_path / "picture"
    path.write_bytes(data)
    code = """
import resource, sys
from edge_runtime.picture_checks import PictureError, decode_picture
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: decode_picture(data)
except PictureError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.parametrize("data", [LARGE["png"], png(16, 16, chunk(b"IDAT", b"", 1 << 30))], ids=["pixels", "chunk"])
def test_a_picture_bomb_is_refused_before_its_memory_is_allocated(tmp_path, data):
    assert peak_growth_kib(tmp_path, data) < 10_000  # the pixels are 300 MB, the chunk claims 1 GB


# JPEG


def test_a_progressive_jpeg_with_more_scans_than_any_encoder_writes_is_refused():
    usual = picture("progressive jpeg")
    assert decode_picture(repeated(usual, MAX_SCANS)).shape == (30, 40, 3)
    with pytest.raises(PictureError, match=f"over {MAX_SCANS} scans"):
        decode_picture(repeated(usual, MAX_SCANS + 1))


def test_thousands_of_scans_are_refused_without_decoding_one(monkeypatch):
    monkeypatch.delattr(cv2, "imdecode")
    with pytest.raises(PictureError, match="scans"):
        decode_picture(repeated(picture("progressive jpeg", 640, 480), 1000))


def test_a_sequential_jpeg_has_one_scan_per_component():
    usual = picture("jpeg")
    scan = usual[usual.index(b"\xff\xda") : -2]
    with pytest.raises(PictureError, match="over 1 scans"):
        decode_picture(usual[:-2] + scan + b"\xff\xd9")


def test_a_jpeg_whose_frame_header_is_hidden_from_a_strict_reader_is_refused():
    small, large = picture("jpeg", 16, 16), picture("jpeg", 320, 240)
    # A segment with marker 00 and a length for us; for libjpeg, bytes to skip, behind which the large picture begins.
    trick = b"\xff\x00" + struct.pack(">H", len(large)) + large[2:]
    with pytest.raises(PictureError, match="marker 00"):
        decode_picture(small[:2] + trick + small[2:])


UNEXPECTED = [0x00, 0x01, 0x02, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB, 0xCC, 0xD0, 0xD8, 0xDC, 0xDE, 0xDF, 0xF0, 0xFD]


@pytest.mark.parametrize("marker", UNEXPECTED, ids=hex)
@pytest.mark.parametrize("place", ["before the frame", "before the second scan"])
def test_a_marker_that_no_encoder_writes_there_is_refused(marker, place):
    data = picture("progressive jpeg")
    at = 2 if place == "before the frame" else data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    with pytest.raises(PictureError, match=f"marker {marker:02x} at byte {at}"):
        decode_picture(data[:at] + bytes([0xFF, marker, 0, 2]) + data[at:])


def test_an_end_before_the_first_scan_is_refused():
    data = picture("jpeg")
    with pytest.raises(PictureError, match="marker d9 at byte 2"):
        decode_picture(data[:2] + b"\xff\xd9" + data[2:])


def test_bytes_between_segments_are_refused():
    data = picture("jpeg")
    at = data.index(b"\xff\xdb")
    with pytest.raises(PictureError, match=f"no JPEG marker at byte {at}"):
        decode_picture(data[:at] + b"\0" + data[at:])


def test_fill_bytes_before_a_marker_are_accepted():
    data = picture("jpeg")
    assert np.array_equal(decode_picture(data[:2] + b"\xff\xff" + data[2:]), opencv(data))


def test_a_second_frame_is_refused():
    data = picture("jpeg")
    start = data.index(b"\xff\xc0")
    header = data[start : start + 19]
    with pytest.raises(PictureError, match="marker c0"):
        decode_picture(data[:start] + header + data[start:])


@pytest.mark.parametrize(("bits", "components"), [(12, 3), (8, 2), (8, 5), (8, 0)])
def test_a_frame_that_opencv_cannot_show_is_refused(bits, components):
    header = struct.pack(">HBHHB", 8 + 3 * components, bits, 8, 8, components) + bytes(3 * components)
    with pytest.raises(PictureError, match=f"JPEG of {bits} bits and {components} components"):
        decode_picture(b"\xff\xd8\xff\xc1" + header + bytes(99))


@pytest.mark.parametrize("scan", [b"\0\0\0\0", b"\1\7\0\0\0\0", b"\2\1\0\0\0\0", b"\1\1\0\0\0\0\0"])
def test_a_scan_header_that_does_not_fit_its_frame_is_refused(scan):
    data = picture("jpeg")
    at = data.index(b"\xff\xda")
    header = b"\xff\xda" + struct.pack(">H", 2 + len(scan)) + scan
    with pytest.raises(PictureError, match="scan of components"):
        decode_picture(data[:at] + header + data[at:])


@pytest.mark.parametrize("filler", [b"\xff", b"\xff\xe0\x00\x02"])
def test_endless_jpeg_segments_are_given_up(filler):
    with pytest.raises(PictureError, match=f"more than {MAX_PARTS} segments"):
        decode_picture(b"\xff\xd8" + filler * (MAX_PARTS + 1) + picture("jpeg")[2:])


@pytest.mark.parametrize("size", [(0, 16), (16, 0)])  # a height of 0 would be told after the first scan
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(PictureError, match="claims"):
        decode_picture(b"\xff\xd8\xff\xc0\x00\x0b\x08" + struct.pack(">HHB", *size, 1) + bytes(99))


def test_a_picture_of_another_size_than_it_claims_is_refused(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(PictureError, match="claims 40 x 30 pixels and has 8 x 8"):
        decode_picture(picture("jpeg"))


# PNG


def test_only_the_chunks_that_make_up_the_picture_are_decoded():
    inflating = zlib.compress(bytes(1 << 20))
    bombs = [
        chunk(b"iCCP", b"x\0\0" + inflating),
        chunk(b"zTXt", b"x\0\0" + inflating),
        chunk(b"iTXt", b"x\0\1\0\0\0" + inflating),
        chunk(b"acTL", struct.pack(">II", 1 << 30, 0)),
        chunk(b"fcTL", bytes(26)),
    ]
    data = png(40, 30, *bombs)
    _, _, checked = check_picture(data)
    assert checked == png(40, 30)
    assert decode_picture(data).shape == (30, 40, 3)


@pytest.mark.parametrize(
    ("extra", "why"),
    [(chunk(b"IHDR", bytes(13)), "want IHDR first"), (chunk(b"CgBI", b""), "not known"), (bytes(12), "not known")],
)
def test_a_png_chunk_that_cannot_be_left_out_and_is_not_known_is_refused(extra, why):
    with pytest.raises(PictureError, match=why):
        decode_picture(png(16, 16, extra))


def test_a_png_without_a_header_is_refused():
    with pytest.raises(PictureError, match="want IHDR first"):
        decode_picture(b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_endless_png_chunks_are_given_up():
    with pytest.raises(PictureError, match=f"more than {MAX_PARTS} chunks"):
        decode_picture(png(16, 16, chunk(b"tEXt", b"") * MAX_PARTS))


# WebP


@pytest.mark.parametrize("kind", [b"VP8L", b"ANIM", b"ANMF"])
def test_a_lossless_or_animated_webp_is_refused(kind):
    with pytest.raises(PictureError, match="lossless or animated"):
        decode_picture(webp(canvas(16, 16), webp_chunk(kind, bytes(99))))


def test_the_alpha_channel_of_a_webp_is_not_decoded():
    data = picture("RGBA WEBP")
    assert b"ALPH" not in check_picture(data)[2]


def test_a_webp_with_two_frames_is_refused():
    with pytest.raises(PictureError, match="animated"):
        decode_picture(webp(frame(16, 16), frame(16, 16)))


def test_a_webp_frame_of_another_size_than_its_canvas_is_refused():
    with pytest.raises(PictureError, match="frame of 17 x 16 pixels does not fill its canvas"):
        decode_picture(webp(canvas(16, 16), frame(17, 16)))


def test_a_webp_without_a_frame_is_refused():
    with pytest.raises(PictureError, match="ends within its header"):
        decode_picture(webp(canvas(16, 16)))


def test_endless_webp_chunks_are_given_up():
    with pytest.raises(PictureError, match=f"more than {MAX_PARTS} chunks"):
        decode_picture(webp(*[webp_chunk(b"XMP ", b"")] * MAX_PARTS, frame(16, 16)))


# Anything


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "png", "webp of quality 56", "RGBA WEBP"])
def test_a_truncated_picture_is_a_picture_error(kind):
    data = picture(kind, 120, 90)
    for cut in np.linspace(0, len(data) - 1, 40).astype(int):
        with pytest.raises(PictureError):
            decode_picture(data[:cut])


@given(st.sampled_from(["jpeg", "progressive jpeg", "png", "webp of quality 56", "RGBA WEBP"]), st.data())
def test_a_damaged_picture_is_a_picture_or_a_picture_error(kind, data):
    damaged = bytearray(picture(kind))
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] ^= data.draw(st.integers(1, 255))
    with suppress(PictureError):
        assert decode_picture(bytes(damaged)).dtype == np.uint8
