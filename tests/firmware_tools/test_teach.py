"""`aiflow teach`: from a few photos to a question that a server answers and a camera's trigger watches."""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.app import run_board
from edge_runtime.config import RuntimeConfig, load_toml
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import MANIFEST, Bundle
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import Event
from firmware_tools import cli
from firmware_tools.class_photos import read_class_photos
from models.questions import read_question
from server.app import run_server
from server.config import Config, ServerConfig
from server.numerics import prove
from tests.server.boards import PATIENCE_S, board_of


def jpeg(kind: str, number: int) -> bytes:
    """A photo of its class: stripes across or along, on a background of its own."""
    rng = np.random.default_rng(number)
    pixels = np.full((120, 160, 3), rng.integers(60, 200, 3), np.uint8)
    width = int(rng.integers(8, 14))
    for at in range(0, 160, 2 * width):
        (pixels[:, at : at + width] if kind == "open" else pixels[at : at + width])[:] = rng.integers(0, 256, 3)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photos of each of two classes."""
    for number in range(6):
        for kind in ("open", "closed"):
            path = tmp_path / "photos" / kind / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(kind, number))
    return tmp_path / "photos"


def teach(folder: Path, bundle: Bundle, *more: str) -> int:
    out = str(folder.parent / "gate.safetensors")
    return cli.main(["teach", "gate", "--images", str(folder), "--bundle", str(bundle.path), "--out", out, *more])


def test_a_question_is_taught_measured_and_the_same_again(photos: Path, board_bundle: Bundle, capsys) -> None:
    assert teach(photos, board_bundle) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| open \| 6 \| [01]\.\d\d \|", said)
    assert "expected accuracy" in said
    assert "class open has too few photos for a reliable accuracy: 6," in said
    assert 'below [questions]:   gate = "' in said
    file = photos.parent / "gate.safetensors"
    question, first = read_question(file, board_bundle), file.read_bytes()
    assert question.record.classes == ("closed", "open")
    assert question.record.photos == 12
    assert teach(photos, board_bundle) == 0
    assert file.read_bytes() == first


def test_a_full_disk_is_named(photos: Path, board_bundle: Bundle, capsys) -> None:
    assert teach(photos, board_bundle, "--out", "/dev/full") == 1
    assert "/dev/full cannot be written: No space left on device" in capsys.readouterr().err


def test_what_was_taught_holds_for_photos_that_it_has_not_seen(photos: Path, board_bundle: Bundle, monkeypatch) -> None:
    monkeypatch.setattr("server.loading.prove", lambda engine, _: prove(engine, (1, 2)))
    assert teach(photos, board_bundle) == 0
    for number in range(6):
        for kind in ("open", "closed"):
            (photos / kind / f"{number}.jpg").write_bytes(jpeg(kind, 100 + number))
    figures = photos.parent / "figures.json"
    where = ["--images", str(photos), "--bundle", str(board_bundle.path), "--json", str(figures)]
    file = str(photos.parent / "gate.safetensors")
    assert cli.main(["evaluate", "classify", "--question", file, *where]) == 0
    measured = msgspec.json.decode(figures.read_bytes())
    assert measured["images"] == 12
    assert measured["accuracy"] >= 0.75
    (photos / "open").rename(photos / "ajar")
    assert cli.main(["evaluate", "classify", "--question", file, *where]) == 1  # a class that it was not taught


def put(photos: Path, kind: str, name: str, data: bytes) -> None:
    (photos / kind).mkdir(exist_ok=True)
    (photos / kind / name).write_bytes(data)


def one_each(photos: Path) -> None:
    for path in photos.rglob("[1-9].jpg"):
        path.unlink()
    put(photos, "ajar", "0.jpg", jpeg("open", 7))


def many_classes(photos: Path) -> None:
    for number in range(10_000):
        put(photos, f"class{number:05}", "a.jpg", jpeg("open", number) if number < 70 else b"never read")


def many_photos(photos: Path) -> None:
    data = jpeg("open", 0)
    for number in range(5001):
        put(photos, "open", f"x{number}.jpg", data + number.to_bytes(2, "big"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda photos: put(photos, "open", "bad.jpg", b"no picture"), "1 photos cannot be read.*open/bad.jpg"),
        (lambda photos: put(photos, "open", "empty.jpg", b""), "open/empty.jpg"),
        (lambda photos: shutil.rmtree(photos / "open"), "all photos are of the class 'closed': add"),
        (lambda photos: put(photos, "open", "x.jpg", jpeg("closed", 0)), "closed/0.jpg and open/x.jpg are the same"),
        (lambda photos: (photos / "x.jpg").write_bytes(jpeg("open", 9)), "x.jpg is in no folder: want class/name.jpg"),
        (lambda photos: put(photos, "o" * 65, "x.jpg", jpeg("open", 9)), "1 to 64 printable characters"),
        (lambda photos: put(photos, 'an "open" one', "x.jpg", jpeg("open", 9)), "without quotes"),
        (many_classes, "more than 64 classes"),
    ],
)
def test_photos_that_cannot_teach_are_refused_with_what_to_do(
    photos: Path, board_bundle: Bundle, capsys, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(photos)
    assert teach(photos, board_bundle) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not (photos.parent / "gate.safetensors").exists()


def test_all_unreadable_photos_are_named_at_once(photos: Path, board_bundle: Bundle, capsys) -> None:
    for number in range(7):
        put(photos, "open", f"bad{number}.jpg", b"no picture %d" % number)
    assert teach(photos, board_bundle) == 1
    said = capsys.readouterr().err
    assert "7 photos cannot be read" in said
    assert said.count("open/bad") == 5
    assert "and 2 more" in said


def test_fewer_than_three_photos_are_refused_and_three_teach(photos: Path, board_bundle: Bundle, capsys) -> None:
    for path in sorted(photos.rglob("*.jpg"))[1:]:
        path.unlink()
    put(photos, "closed", "copy.jpg", jpeg("closed", 0))  # the same file is no second photo
    put(photos, "open", "0.jpg", jpeg("open", 0))
    assert teach(photos, board_bundle) == 1
    assert "there are 2 different photos, want at least 3" in capsys.readouterr().err
    put(photos, "closed", "1.jpg", jpeg("closed", 1))
    assert teach(photos, board_bundle) == 0
    said = capsys.readouterr().out
    assert "| open | 1 | - |" in said
    assert "class open has too few photos for a reliable accuracy: 1," in said
    assert re.search(r"expected accuracy [01]\.\d+ \(without open: one photo", said)  # nothing was measured of it
    assert "1 photos left out" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda photos: shutil.rmtree(photos / "open"), "all photos are of the class 'closed'"),
        (lambda photos: put(photos, "open", "x.jpg", jpeg("closed", 5)), "are the same file in two classes"),
        (lambda photos: (photos / "x.jpg").write_bytes(jpeg("open", 9)), "x.jpg is in no folder"),
        (lambda photos: [path.unlink() for path in photos.rglob("[1-9].jpg")], "2 different photos"),
        (one_each, "each of the 3 classes has one photo.*want two different"),
        (many_photos, "more than 5000 photos"),
        (many_classes, "more than 64 classes"),
    ],
)
def test_what_names_and_bytes_tell_is_told_before_the_networks_see_the_first_photo(
    photos: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(photos)
    seen: list[str] = []
    with pytest.raises(AiflowError, match=said):
        read_class_photos([photos], lambda picture: seen.append(picture.name))
    assert seen == []


def test_classes_of_one_photo_each_write_no_file(photos: Path, board_bundle: Bundle, capsys) -> None:
    one_each(photos)
    assert teach(photos, board_bundle) == 1
    assert "each of the 3 classes has one photo" in capsys.readouterr().err
    assert not (photos.parent / "gate.safetensors").exists()


def test_a_photo_that_changes_while_photos_are_read_is_named(photos: Path) -> None:
    with pytest.raises(AiflowError, match=r"1 photos changed while they were read: open/5.jpg"):
        read_class_photos([photos], lambda picture: put(photos, "open", "5.jpg", jpeg("open", 50)))


def test_a_server_with_a_question_of_another_bundle_is_refused_before_it_runs(
    photos: Path, board_bundle: Bundle, tmp_path: Path, capsys
) -> None:
    assert teach(photos, board_bundle) == 0
    other = tmp_path / "other"
    shutil.copytree(board_bundle.path, other)
    manifest = msgspec.json.decode((other / MANIFEST).read_bytes())
    (other / MANIFEST).write_bytes(msgspec.json.encode(manifest | {"training_commit": "another"}))
    for bundle, code in ((board_bundle.path, 0), (other, cli.EXIT_CONFIG)):
        (tmp_path / "server.toml").write_text(
            f'[server]\nid = "s1"\nbundle = "{bundle}"\n[questions]\ngate = "{tmp_path / "gate.safetensors"}"\n'
        )
        assert cli.main(["validate", str(tmp_path / "server.toml")]) == code
    assert "teach it again" in capsys.readouterr().err


def test_a_cameras_events_have_the_answers_and_its_trigger_tells(
    photos: Path, board_bundle: Bundle, broker, tmp_path: Path
) -> None:
    assert teach(photos, board_bundle) == 0
    stream = tmp_path / "stream"
    stream.mkdir()
    kinds = ["closed", "open", "open", "closed", "open"]
    for number, kind in enumerate(kinds):
        (stream / f"{number}.jpg").write_bytes(jpeg(kind, number))  # photos that it was taught
    (tmp_path / "board.toml").write_text(
        f'[board]\nid = "b1"\nbundle = "{board_bundle.path}"\nbackend = "onnx"\ndeadline_ms = 60000\n[mqtt]\n'
        f'port = {broker.port}\n[[cameras]]\nname = "yard"\nsource = "{stream}"\ninterval_s = 2\n'
        'questions = ["gate"]\n[[cameras.triggers]]\nwhen = "gate == open"\n'
    )
    server = Config(
        ServerConfig("s1", str(board_bundle.path)),
        MqttConfig(port=broker.port),
        {"gate": str(tmp_path / "gate.safetensors")},
    )
    stop, events = threading.Event(), list[Event]()
    serving = threading.Thread(target=run_server, args=(server, stop))
    serving.start()
    try:
        with board_of(broker, "watcher") as watcher:
            watcher.wait_for_status(state="online", share_proven=True)
        numbers = run_board(load_toml(tmp_path / "board.toml", RuntimeConfig), threading.Event(), events.append)
    finally:
        stop.set()
        serving.join(PATIENCE_S)
    updates = [event for event in events if event.type == "update"]
    assert [max(event.answers["gate"], key=event.answers["gate"].get) for event in updates] == kinds
    told = [event for event in events if event.type == "trigger"]
    assert [event.picture for event in told] == ["1.jpg", "4.jpg"]
    assert [(event.trigger, event.final) for event in told] == [("gate == open", False)] * 2
    assert numbers["triggered"] == 2
