"""What libjpeg says of damaged pictures is not written, and nothing else is lost."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime.picture_checks import decode_picture

START = "import os, sys; from edge_runtime.decoder_stderr import DECODER_STDERR; DECODER_STDERR.separate()\n"
DECODE_AND_LOG = """
import logging, threading
from pathlib import Path
from edge_runtime.picture_checks import decode_picture
logging.basicConfig(format="%(message)s")
picture, begun, ended = Path(sys.argv[1]).read_bytes(), threading.Event(), threading.Event()
def decode():
    while not ended.is_set():
        decode_picture(picture)
        begun.set()
threads = [threading.Thread(target=decode) for _ in range(2)]
for thread in threads:
    thread.start()
begun.wait()
for number in range(300):
    logging.warning("line %d", number)
ended.set()
for thread in threads:
    thread.join()
os.write(2, b"the last words of a library\\n")
"""
# A decoder that writes out of its bounds ends so.
CRASH = "with DECODER_STDERR.silenced():\n    os.abort()\n"


def stderr_of(code: str, *arguments: object, options: tuple[str, ...] = ()) -> list[str]:
    command = [sys.executable, *options, "-c", code, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False).stderr.splitlines()


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A JPEG that is decoded, and that libjpeg complains of."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    data = bytearray(cv2.imencode(".jpg", noise)[1].tobytes())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\x12" * 40
    (tmp_path / "damaged.jpg").write_bytes(data)
    return tmp_path / "damaged.jpg"


def test_a_damaged_picture_writes_nothing_and_no_line_of_another_thread_is_lost(damaged: Path) -> None:
    assert stderr_of(START + DECODE_AND_LOG, damaged) == [
        *(f"line {number}" for number in range(300)),
        "the last words of a library",
    ]


def test_a_crash_of_a_decoder_says_where() -> None:
    lines = stderr_of(START + CRASH, options=("-X", "faulthandler"))
    assert "Fatal Python error: Aborted" in lines


def test_a_board_says_nothing_of_its_own_about_damaged_pictures(damaged: Path, board_bundle) -> None:
    config = damaged.with_name("board.toml")
    config.write_text(
        f'[board]\nid = "b1"\nbundle = "{board_bundle.path}"\nparadigm = "device"\nbackend = "onnx"\n[mqtt]\nport = 1\n'
        f'[[cameras]]\nname = "door"\nsource = "{damaged}"\ninterval_s = 0\n'
    )
    code = "import sys; from firmware_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    lines = stderr_of(code, "run", "--show", config)
    assert any("INFO" in line for line in lines)
    assert [line for line in lines if "Corrupt" in line] == []


def test_without_a_separate_descriptor_nothing_is_silenced(damaged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    decode_picture(damaged.read_bytes())
    assert "Corrupt JPEG data" in capfd.readouterr().err
