"""The demo, end to end: processes, broker, page; and that nothing of it stays behind."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import cv2
import msgspec
import numpy as np
import psutil
import pytest

from edge_runtime.inference.bundle import open_bundle
from edge_runtime.mqtt import MqttClient, MqttSettings
from edge_runtime.picture_checks import PictureError
from edge_runtime.wire import AnsweredBy, Event, EventHop, encode_event, topics
from firmware_tools.demo import answers_at_levels
from firmware_tools.demo_page import JUDGED, AtLevel, PhotoResult, Results, TaughtQuestion, page, summary
from firmware_tools.event_parts import marked, stages
from models import SHIPPED_BUNDLE
from testbed.sample_photos import TAUGHT, Photo, collect, shipped
from tests.bundles import tiny_bundle
from tests.exports import pictures

CAPTURED = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
PATIENCE_S = 240  # processes that load torch, on a machine that may be busy

pytestmark = pytest.mark.timeout(2 * PATIENCE_S)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle where there is one."""
    if (SHIPPED_BUNDLE / "manifest.json").is_file():
        return SHIPPED_BUNDLE
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", board=True).path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in zip(
        ("<b>one<b>.png", "three.png", "two & a half.png"), pictures(3, seed=11).numpy(), strict=True
    ):
        cv2.imwrite(str(folder / name), pixels)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def start_demo(folder: Path, *arguments: object) -> "subprocess.Popen[str]":
    """In a temporary directory of its own, so that what stays behind is seen."""
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "firmware_tools", "demo", "--html", folder / "page.html", *arguments]
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


class Pictures(HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.sources, self.names = "", [], []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.sources += [value for key, value in values.items() if key in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.names.append(values["alt"])


def test_each_photo_is_captioned_and_on_the_page(tmp_path: Path, bundle: Path, photos: Path) -> None:
    demo = start_demo(tmp_path, "--bundle", bundle, "--images", photos)
    out, err = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 0, err
    assert "broken.png" in err
    lines = [dict(part.split(": ", 1) for part in line.split(" | ")) for line in out.splitlines() if " | " in line]
    assert [line["photo"] for line in lines] == ["<b>one<b>.png", "three.png", "two & a half.png"]
    shown = Pictures((tmp_path / "page.html").read_text())
    assert shown.names == ["<b>one<b>.png", "three.png", "two & a half.png"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in shown.sources)
    for line in lines:
        assert line["by"] == "cloud demo-server"
        assert re.sub(r"[][]", "", line["text"]) in shown.text
    assert not list((tmp_path / "tmp").iterdir())


def test_the_question_is_taught_with_some_of_the_shipped_photos_and_asked_about_the_others(
    tmp_path: Path, bundle: Path
) -> None:
    demo = start_demo(tmp_path, "--bundle", bundle, "--limit", 2)  # one of them is taught
    out, err = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 0, err
    lines = [dict(part.split(": ", 1) for part in line.split(" | ")) for line in out.splitlines() if " | " in line]
    shown = Pictures((tmp_path / "page.html").read_text()).text
    taught = {name for names in TAUGHT.values() for name in names}
    assert len({line["photo"] for line in lines} - taught) == len({line["photo"] for line in lines} & taught) == 1
    for line in lines:
        if line["photo"] in taught:
            assert line["person"] == "taught with this photo"
        else:
            assert re.fullmatch(r"\w+ \d+ %, \w+ \d+ %", line["person"])
            assert f"person: {line['person']}" in shown
    sentence = next(line for line in out.splitlines() if line.startswith("person was taught"))
    assert all(name in sentence for name in taught)
    assert sentence in shown


def test_forged_events_do_not_end_the_demo(tmp_path: Path, bundle: Path, photos: Path) -> None:
    demo = start_demo(tmp_path, "--bundle", bundle, "--images", *[photos] * 3, "--paradigm", "device")
    assert demo.stdout is not None
    assert demo.stdout.readline().startswith("photo: ")
    port = int(re.findall(r"port = (\d+)", next((tmp_path / "tmp").glob("*/run.toml")).read_text())[0])
    with MqttClient(MqttSettings("127.0.0.1", port, client_id="somebody")) as somebody:
        assert somebody.wait_online(PATIENCE_S)
        for payload in (encode_event(msgspec.structs.replace(UPDATE, picture="zz.jpg")), b"no event"):
            somebody.publish(topics.event("demo", "demo-board"), payload)
        out, err = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 0, err
    assert out.count("photo: ") == 8
    assert "ignored_events 2" in out


def test_an_interrupt_ends_every_process_and_leaves_nothing(tmp_path: Path, bundle: Path, photos: Path) -> None:
    demo = start_demo(tmp_path, "--bundle", bundle, "--images", *[photos] * 5)
    assert demo.stdout is not None
    assert demo.stdout.readline().startswith("photo: ")  # all three run
    children = psutil.Process(demo.pid).children(recursive=True)
    port = int(re.findall(r"port = (\d+)", next((tmp_path / "tmp").glob("*/run.toml")).read_text())[0])
    assert len(children) >= 3
    demo.send_signal(signal.SIGINT)
    next(child for child in children if "run" in child.cmdline()).wait(PATIENCE_S)
    demo.send_signal(signal.SIGINT)  # a second one, as impatient people do
    _, err = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 130, err
    assert "Traceback" not in err
    assert not [child for child in children if child.is_running()]
    assert not list((tmp_path / "tmp").iterdir())
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_child_that_fails_speaks_for_itself(tmp_path: Path, bundle: Path, photos: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in bundle.iterdir():
        if file.name != "tail.safetensors":
            (damaged / file.name).symlink_to(file)
    demo = start_demo(tmp_path, "--bundle", damaged, "--images", photos)
    out, err = demo.communicate(timeout=PATIENCE_S)
    assert (demo.returncode, out) == (1, "")
    assert "`aiflow serve` ended with exit code 78" in err
    assert "lacks tail.safetensors: a server needs its part of the bundle" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "tmp").iterdir())


def test_words_that_the_other_text_lacks_are_marked() -> None:
    assert marked("a black dog runs fast", "a dog runs") == [
        ("a", False),
        ("black", True),
        ("dog runs", False),
        ("fast", True),
    ]
    assert marked("", "a dog") == []


NEW = Event(
    type="new", frame="01", camera="c", captured=CAPTURED, text="a dog", tokens=(5, 6, 2), bytes_up=300, jpeg_bytes=9000
)
UPDATE = Event(
    type="update",
    frame="01",
    camera="c",
    captured=CAPTURED,
    final=True,
    text="<script>alert(1)</script> runs",
    tokens=(7, 8, 9, 2),
    answered_by=AnsweredBy("cloud", "<s>"),
    bytes_up=300,
    jpeg_bytes=9000,
    timings_ms={"resize": 1.0, "head": 10.0, "draft": 5.0, "encode": 1.0, "publish": 1.0, "answer": 60.0},
    hops=(EventHop("cloud", "s", 2.0, 38.0),),
    accepted=1,
    proposed=3,
    passes=2,
)


PHOTO = Photo("<i>", cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes(), "by <me>")


@pytest.fixture
def result() -> PhotoResult:
    at = CAPTURED.timestamp()
    return PhotoResult(PHOTO).followed(NEW, at + 0.02).followed(UPDATE, at + 0.09)


def results_of(*photos: PhotoResult) -> Results:
    results = Results([])
    results.photos = list(photos)
    return results


def test_events_that_belong_to_no_photo_are_counted_and_do_not_end_the_demo() -> None:
    results, at = Results([PHOTO]), CAPTURED.timestamp()
    forged = [
        msgspec.structs.replace(UPDATE, picture=name) for name in ("", "zz.jpg", "0001.jpg", "-001.jpg", "0" * 200)
    ]
    for payload in (b"", b"no event", b"[" * 10_000, *map(encode_event, forged)):
        assert results.add(payload, at) is None
    assert results.ignored == summary(results)["ignored_events"] == 8
    assert not results.all_final
    assert results.add(encode_event(msgspec.structs.replace(UPDATE, picture="0000.jpg")), at) == results.photos[0]
    assert results.all_final


def test_a_result_keeps_the_draft_and_takes_the_last_text(result: PhotoResult) -> None:
    assert (result.draft, result.is_final, result.is_verified) == ("a dog", True, True)
    assert (round(result.first_ms or 0), round(result.last_ms or 0)) == (20, 90)


def test_stages_split_the_wait_into_link_queue_and_server() -> None:
    assert list(stages(UPDATE).items())[-3:] == [("link", 20.0), ("queue", 2.0), ("server", 38.0)]
    assert sum(stages(UPDATE).values()) == 17 + 60


def test_the_summary_counts_what_was_lost(result: PhotoResult) -> None:
    lost = PhotoResult(result.photo).followed(
        Event(type="lost", frame="2", camera="c", captured=CAPTURED, final=True), 0.0
    )
    figures = summary(results_of(result, lost))
    assert (figures["photos"], figures["lost"], figures["verified"]) == (2, 1, 1)
    assert (figures["accepted"], figures["proposed"], figures["passes"], figures["jpeg_to_bytes"]) == (1, 3, 2, 30)
    assert (round(figures["first_text_ms"]), round(figures["verified_text_ms"])) == (20, 90)


def test_what_came_over_the_network_is_text_on_the_page(result: PhotoResult) -> None:
    html = page(results_of(result), "<title>", "<note>")
    shown = Pictures(html)
    assert UPDATE.text.split()[0] in shown.text
    assert "<script" not in html
    assert not re.search(r"<(i|s|me|note)>", html)


def test_a_level_is_chosen_without_a_script_and_shows_its_answers(result: PhotoResult) -> None:
    coarse, fine = AtLevel(130, "a dog", {"<husky>": 0.5, "cat": 0.25}), AtLevel(420, "a dog runs", {})
    html = page(results_of(result), "demo", "", [[coarse, fine]])
    assert "<script" not in html
    assert html.count('type="radio"') == 2
    assert re.search(r'class="rate level0">.*130 B.*a dog.*&lt;husky&gt; 50 %, cat 25 %', html)
    assert re.search(r'class="rate level1">.*420 B.*a dog runs', html)
    assert "#level1:checked~main .level1{display:block}" in html
    assert 'type="radio"' not in page(results_of(result), "demo", "")


def test_a_caption_of_a_shipped_photo_is_called_wrong_where_it_is_and_only_that_caption(result: PhotoResult) -> None:
    at, (name, text) = CAPTURED.timestamp(), next(key for key, said in JUDGED.items() if said.startswith("wrong"))
    rocket, (known,) = (
        Photo(name, PHOTO.data, "somebody"),
        [said for key, said in JUDGED.items() if key == (name, text)],
    )
    for photo, said, is_judged in (
        (rocket, text, True),
        (rocket, "a rocket", False),
        (replace(rocket, credit=""), text, False),
    ):
        answered = PhotoResult(photo).followed(msgspec.structs.replace(UPDATE, text=said), at)
        assert (known in Pictures(page(results_of(answered), "demo", "")).text) is is_judged


def test_what_the_shipped_bundle_says_of_each_shipped_photo_is_judged() -> None:
    photos, bundle = list(shipped()), open_bundle(SHIPPED_BUNDLE)
    answers, level = answers_at_levels(bundle, "cloud", photos), bundle.manifest.latent.default_level
    assert set(JUDGED) == {(photo.name, row[level].text) for photo, row in zip(photos, answers, strict=True)}


def test_a_question_is_not_asked_about_the_photos_that_it_was_taught_with(result: PhotoResult) -> None:
    answers = {"person": {"nobody": 0.25, "somebody": 0.75}}
    asked = result.followed(msgspec.structs.replace(UPDATE, answers=answers), CAPTURED.timestamp())
    others = TaughtQuestion("person", {"nobody": ["tree"], "somebody": ["<king>"]}, 20)
    assert others.answer(asked) == "somebody 75 %, nobody 25 %"
    assert others.answer(result) == "-"  # a server that did not answer it
    assert "about 1 others it is 75 to 75 % sure" in others.summary([asked, result])
    same = TaughtQuestion("person", {"nobody": ["tree"], "somebody": [PHOTO.name]}, 20)
    assert same.answer(asked) == "taught with this photo"
    assert "sure" not in same.summary([asked])
    results = results_of(asked)
    results.question = others
    assert "<king>" in Pictures(page(results, "demo", "")).text


def test_nothing_to_show_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"no picture can be read.*broken\.jpg \(.+\)"):
        collect([tmp_path])


def test_the_shipped_photos_are_all_there_and_credited() -> None:
    photos = list(shipped())
    assert len(photos) >= 8
    assert all(photo.credit for photo in photos)
