"""The page that sorts frames into class folders: what a click does, and who may click."""

import http.client
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlencode

import cv2
import numpy as np
import pytest

from edge_runtime.picture_checks import PictureError
from firmware_tools.label_page import MAX_FORM, Labels, LabelServer

PATIENCE_S = 60


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Three frames in two folders, and one that cannot be read."""
    for number, name in enumerate(("b/2.jpg", "a/1.jpg", "a/0.jpg")):
        path = tmp_path / "frames" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".jpg", np.full((48, 64, 3), 80 * number, np.uint8))[1].tobytes())
    (tmp_path / "frames" / "a" / "0bad.jpg").write_bytes(b"no picture")
    return tmp_path / "frames"


@pytest.fixture
def server(frames: Path, tmp_path: Path) -> Iterator[LabelServer]:
    with serving(Labels(frames, ["open", "half <open>"], tmp_path / "out")) as server:
        yield server


@contextmanager
def serving(labels: Labels) -> Iterator[LabelServer]:
    with LabelServer(labels) as server:
        thread = threading.Thread(target=server.serve_until_done)
        thread.start()
        yield server
        server.is_done = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def ask(server: LabelServer, method: str, form: dict[str, str] | None = None, **headers: str) -> tuple[int, str]:
    body = urlencode(form) if form is not None else None
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE_S)) as connection:
        connection.request(method, "/", body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


def click(server: LabelServer, label: str) -> int:
    """As a browser: the form of the page with one of its buttons."""
    _, page = ask(server, "GET")
    hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
    return ask(server, "POST", hidden | {"class": label})[0]


def test_clicks_copy_the_frames_in_their_order(server: LabelServer, frames: Path, tmp_path: Path) -> None:
    assert "half &lt;open&gt;" in ask(server, "GET")[1]
    assert [click(server, label) for label in ("open", "", "half <open>")] == [303] * 3
    assert "All frames are sorted" in ask(server, "GET")[1]
    out = tmp_path / "out"
    copied = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.jpg")}
    assert copied == {
        "open/a--0.jpg": (frames / "a/0.jpg").read_bytes(),
        "half <open>/b--2.jpg": (frames / "b/2.jpg").read_bytes(),
    }
    assert len(list(frames.rglob("*.jpg"))) == 4  # they stay


def test_what_was_sorted_is_not_shown_again(server: LabelServer, frames: Path, tmp_path: Path) -> None:
    click(server, "open")
    again = Labels(frames, ["open", "half <open>"], tmp_path / "out")
    assert again.show()
    assert again.name == "a--1.jpg"


def test_every_frame_has_a_copy_of_its_own_whatever_the_names(tmp_path: Path) -> None:
    names = ["a/b-c", "a-b/c", "a-b-c", "a--b-c", "a-/b-c", "a/-b-c", "a%2D/b-c", "a%2D--b-c", "a\nb", "a%0Ab"]
    for number, name in enumerate((*names, os.fsdecode(b"a\xff"), "2024-05-01/12-00-00")):
        path = tmp_path / "frames" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".jpg", np.full((48, 64, 3), 20 * number, np.uint8))[1].tobytes())
    with serving(Labels(tmp_path / "frames", ["open"], tmp_path / "out")) as server:
        for number in range(12):
            assert click(server, "open") == 303
            assert len(list((tmp_path / "out" / "open").iterdir())) == number + 1
        again = Labels(tmp_path / "frames", ["open"], tmp_path / "out")
        assert again.show() is None  # the names are the same after a restart
    copies = {path.read_bytes() for path in (tmp_path / "out" / "open").iterdir()}
    assert len(copies) == 12
    assert (tmp_path / "out" / "open" / "2024-05-01--12-00-00.jpg").exists()  # usual names stay readable


def test_only_the_page_itself_may_click(server: LabelServer, tmp_path: Path) -> None:
    _, page = ask(server, "GET")
    hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
    form = hidden | {"class": "open"}
    assert ask(server, "POST", form | {"token": "guessed"})[0] == 403
    assert ask(server, "POST", form, Host="evil.example")[0] == 404
    assert ask(server, "GET", Host="evil.example")[0] == 404
    assert ask(server, "POST", form | {"class": "x" * MAX_FORM})[0] == 413
    assert ask(server, "POST", form | {"class": "../../open"})[0] == 303  # no class: skipped
    assert not (tmp_path / "out").exists()
    assert ask(server, "POST", form)[0] == 303  # the same form once more says nothing of the next frame
    assert server.labels.show()
    assert server.labels.name == "a--1.jpg"
    assert server.server_address[0] == "127.0.0.1"


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="holds no picture"):
        Labels(tmp_path, ["open", "closed"], tmp_path / "out")


def test_the_command_shows_the_page_then_teaches(frames: Path, tmp_path: Path, board_bundle) -> None:
    command = [sys.executable, "-m", "firmware_tools", "teach", "gate", "--from-events", str(frames), "--classes"]
    command += ["open,closed", "--images", str(tmp_path / "photos"), "--bundle", str(board_bundle.path)]
    command += ["--out", str(tmp_path / "gate.safetensors")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as teach:
        port = int(re.search(r"http://127.0.0.1:(\d+)/", teach.stdout.readline())[1])
        page = type("Page", (), {"server_port": port})
        assert [click(page, label) for label in ("open", "closed", "open")] == [303] * 3
        ask(page, "GET")
        assert "expected accuracy" in teach.stdout.read()
    assert teach.returncode == 0
