"""Pictures in a stream of bytes, however it is cut and whatever lies between them."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.capture.frame import CameraError
from edge_runtime.capture.jpeg_stream import JpegStream
from edge_runtime.picture_checks import check_picture
from tests.edge_runtime.capture.helpers import jpeg, large_jpeg

SMALL = [jpeg(shade) for shade in (10, 100, 200)]
PROGRESSIVE = cv2.imencode(
    ".jpg", np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
)[1].tobytes()
RESTARTING = cv2.imencode(
    ".jpg", np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8), [cv2.IMWRITE_JPEG_RST_INTERVAL, 1]
)[1].tobytes()
# A JPEG whose EXIF data contains another one, as cameras' preview pictures do.
WITH_PREVIEW = SMALL[0][:2] + b"\xff\xe1" + (2 + len(SMALL[1])).to_bytes(2, "big") + SMALL[1] + SMALL[0][2:]
PICTURES = [*SMALL, large_jpeg(50), PROGRESSIVE, RESTARTING, WITH_PREVIEW]


def read(stream: JpegStream, data: bytes, size: int) -> list[bytes]:
    return [picture for at in range(0, len(data), size) for picture in stream.feed(data[at : at + size])]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 1 << 20])
@pytest.mark.parametrize(
    "between", [b"", b"\r\n--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 9\r\n\r\n", b"\xff\xff\0\xff\xd9"]
)
def test_every_picture_comes_out_as_it_is_wherever_the_stream_is_cut(size, between):
    data = between + between.join(PICTURES) + between
    assert read(JpegStream(), data, size) == PICTURES


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_a_damaged_picture_is_left_out_and_the_next_one_comes(size):
    cut, overwritten = large_jpeg(10)[:-1000], SMALL[0][:2] + bytes(40) + SMALL[0][42:]
    assert read(JpegStream(), cut + SMALL[1] + overwritten + SMALL[2], size) == SMALL[1:]


@given(st.lists(st.one_of(st.sampled_from(PICTURES), st.binary(max_size=50)), max_size=8), st.integers(1, 5000))
def test_whatever_comes_a_picture_after_a_complete_one_is_found(parts, size):
    """Bytes of no picture may hide the next picture, and never more than that one."""
    found = read(JpegStream(), b"".join(parts) + SMALL[0] + SMALL[1] + SMALL[2], size)
    assert SMALL[2] in found


@given(st.binary(max_size=2000), st.integers(1, 100))
def test_any_bytes_give_pictures_that_begin_and_end_as_jpegs_do(data, size):
    for picture in read(JpegStream(), data.replace(b"a", b"\xff\xd8\xff").replace(b"b", b"\xff\xd9"), size):
        assert picture[:2] == b"\xff\xd8"
        assert picture[-2:] == b"\xff\xd9"


def test_what_it_takes_for_a_picture_can_be_checked():
    for picture in PICTURES:
        check_picture(picture)


def test_an_endless_stream_without_a_marker_is_refused():
    stream = JpegStream(max_gap_bytes=10_000)
    with pytest.raises(CameraError, match="sends 10000 bytes without a complete JPEG"):
        read(stream, bytes(20_000), 999)


def test_a_picture_that_does_not_end_is_refused():
    stream = JpegStream(max_picture_bytes=10_000)
    with pytest.raises(CameraError, match="a picture of more than 10000 bytes"):
        read(stream, SMALL[0][:-2] + bytes(20_000), 999)


def test_good_pictures_never_add_up_to_a_gap():
    stream = JpegStream(max_gap_bytes=10_000)
    for _ in range(100):
        assert read(stream, bytes(900) + SMALL[0], 333) == [SMALL[0]]
