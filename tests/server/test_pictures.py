"""The process that decodes pictures: bounded in time and memory, and replaced when it does not survive one."""

import os
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest

from edge_runtime.inference.preprocess import to_input
from edge_runtime.picture_checks import PictureError, decode_picture
from server.pictures import ROOT, Limits, PictureCostError, PictureDecoder, PictureWorkerError


def jpeg(side: int) -> bytes:
    """An honest progressive JPEG; 2,000 pixels a side take 30 ms of CPU time and 60 MiB."""
    blotches = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    picture = cv2.resize(blotches, (side, side), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()


LARGE, SMALL = jpeg(2000), jpeg(100)


def test_a_picture_comes_back_as_this_process_would_have_decoded_it() -> None:
    with PictureDecoder() as decoder:
        for picture in (SMALL, LARGE):
            assert np.array_equal(decoder.decode(picture), to_input(decode_picture(picture)))


@pytest.mark.parametrize("picture", [b"", b"\xff\xd8 no picture", LARGE[: len(LARGE) // 100]])
def test_what_is_no_picture_is_refused_and_costs_no_process(picture: bytes) -> None:
    with PictureDecoder() as decoder:
        decoder.decode(SMALL)
        process = decoder._process
        with pytest.raises(PictureError) as refused:
            decoder.decode(picture)
        assert not isinstance(refused.value, PictureCostError)
        assert decoder._process is process


def test_a_picture_of_too_many_pixels_is_refused() -> None:
    with PictureDecoder(Limits(pixels=3_999_999)) as decoder, pytest.raises(PictureError, match="at most 3999999"):
        decoder.decode(LARGE)


def test_a_picture_that_takes_too_much_time_is_given_up_and_the_next_one_is_decoded() -> None:
    with PictureDecoder(Limits(cpu_s=0.01)) as decoder:
        with pytest.raises(PictureCostError, match=r"took more than 0\.01 s of CPU time"):
            decoder.decode(LARGE)
        assert decoder.decode(SMALL).shape == (224, 224, 3)


def test_a_picture_that_needs_too_much_memory_is_refused_and_the_next_one_is_decoded() -> None:
    with PictureDecoder(Limits(memory_bytes=16 << 20)) as decoder:
        with pytest.raises(PictureError):
            decoder.decode(LARGE)
        assert decoder.decode(SMALL).shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("sent", "reason"), [(signal.SIGSTOP, "took more than 1 s"), (signal.SIGKILL, "ended with SIGKILL")]
)
def test_a_process_that_hangs_or_dies_is_replaced(sent: signal.Signals, reason: str) -> None:
    with PictureDecoder(Limits(wall_s=1.0)) as decoder:
        decoder.decode(SMALL)
        os.kill(decoder._process.pid, sent)
        with pytest.raises(PictureCostError, match=reason):
            decoder.decode(SMALL)
        assert decoder.decode(SMALL).shape == (224, 224, 3)


def test_who_stops_the_server_does_not_stop_the_process() -> None:
    with PictureDecoder() as decoder:
        decoder.decode(SMALL)
        process = decoder._process
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
        decoder.decode(SMALL)
        assert decoder._process is process
    assert process.returncode is not None


def test_a_decoder_that_was_killed_starts_no_process() -> None:
    with PictureDecoder() as decoder:
        decoder.decode(SMALL)
        decoder.kill()
        for _ in range(2):
            with pytest.raises(PictureWorkerError, match="stopping"):
                decoder.decode(SMALL)


def test_a_process_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with PictureDecoder() as decoder, pytest.raises(PictureWorkerError, match="could be started"):
        decoder.decode(SMALL)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with PictureDecoder() as decoder, pytest.raises(PictureWorkerError, match="exit code 1 at its start"):
        decoder.decode(SMALL)


def test_the_process_never_loads_torch() -> None:
    code = "import sys, server.picture_worker, edge_runtime.inference.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
