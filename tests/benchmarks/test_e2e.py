"""The end-to-end benchmark: what it makes of events, and one short run through real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import e2e
from benchmarks.e2e_figures import PhotoOutcome, against_oracle, compared, figures_of, outcome_of, slots_of
from benchmarks.quality import EvaluationError, Photos
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.wire import AnsweredBy, Event, EventHop
from firmware_tools import cli
from testbed.sample_photos import shipped
from testbed.shaping import PROFILES

pytestmark = pytest.mark.timeout(400)  # processes that load torch, on a machine that may be busy

HOPS = (EventHop("edge", "e", 1.0, 20.0), EventHop("cloud", "c", 2.0, 30.0))


def event(kind: str, after_ms: float, **fields: Any) -> Event:
    captured = datetime(2026, 3, 1, tzinfo=timezone.utc)
    return Event(type=kind, frame="01", camera="c", captured=captured, after_ms=after_ms, **fields)  # type: ignore[arg-type]


def answered(ms: float, paradigm: str = "split", at_s: float = 0.0, photo: str = "a") -> PhotoOutcome:
    return PhotoOutcome(photo, at_s, "text", paradigm, "cloud", ms / 10, ms, server_ms=7.0, bytes_up=100)


# ---- what events say ----


def test_the_first_text_and_the_final_one_are_timed_apart() -> None:
    new = event("new", 20.0, text="a dog", paradigm="speculative", answered_by=AnsweredBy("device"))
    edge = event("update", 90.0, text="a dog", paradigm="speculative", answered_by=AnsweredBy("edge", "e"))
    cloud = event(
        "update",
        200.0,
        text="a dog runs",
        paradigm="speculative",
        final=True,
        answered_by=AnsweredBy("cloud", "c"),
        hops=HOPS,
        bytes_up=300,
    )
    assert outcome_of("a", 3.0, [new, edge, cloud]) == PhotoOutcome(
        "a", 3.0, "a dog runs", "speculative", "cloud", 20.0, 200.0, 50.0, 300, was_passed_up=True
    )


def test_a_loss_keeps_the_draft_and_has_no_final_time() -> None:
    new = event("new", 20.0, text="a dog", answered_by=AnsweredBy("device"))
    lost = event("lost", 5000.0, text="a dog", final=True, answered_by=AnsweredBy("device"))
    outcome = outcome_of("a", 0.0, [new, lost])
    assert (outcome.text, outcome.first_ms, outcome.final_ms, outcome.answered_by) == ("a dog", 20.0, None, "")


@pytest.mark.parametrize("events", [[], [event("new", 20.0, text="a dog")]])
def test_a_photo_without_a_last_word_is_lost(events: list[Event]) -> None:
    figures = figures_of("policy", [outcome_of("a", 0.0, events)], 30_000)
    assert (figures["answered"], figures["lost"], figures["verified_ms_p50"]) == (0, 1, None)


# ---- what figures say ----


def test_drafts_are_never_verified_but_where_a_policy_lets_them_stand() -> None:
    final = outcome_of("a", 0.0, [event("new", 20.0, text="a", final=True, answered_by=AnsweredBy("device"))])
    assert figures_of("device", [final], 30_000)["verified_ms_p50"] is None
    assert figures_of("policy", [final], 30_000)["verified_ms_p50"] == 20.0


def test_what_servers_answered_is_timed_apart_from_drafts_that_stand() -> None:
    stands = outcome_of("a", 0.0, [event("new", 20.0, text="a", final=True, answered_by=AnsweredBy("device"))])
    figures = figures_of("policy", [stands, answered(400), answered(600)], 30_000)
    assert (figures["verified_ms_p50"], figures["served_ms_p50"]) == (400.0, 500.0)
    assert figures_of("policy", [stands], 30_000)["served_ms_p50"] is None


def test_a_lost_photo_counts_as_one_that_took_until_its_deadline() -> None:
    lost = PhotoOutcome("a", 0.0, "draft", first_ms=20.0, bytes_up=300)  # speculative: its draft was there
    figures = figures_of("split", [answered(400), lost, PhotoOutcome("b", 0.0)], 30_000)
    assert (figures["verified_ms_p50"], figures["verified_ms_p95"]) == (30_000, 30_000)
    assert figures["first_text_ms_p50"] == 40.0  # of 20, 40 and 30,000
    assert figures["bytes_mean"] == pytest.approx(400 / 3)
    assert (figures["answered"], figures["lost"]) == (1, 2)
    assert figures_of("split", [lost], 30_000)["verified_ms_p50"] is None  # nothing to be compared with


def test_paradigms_are_told_as_ratios_to_sending_pictures() -> None:
    outcomes = {
        "offload": [answered(1000), answered(3000)],
        "split": [answered(400), answered(600)],
        "policy": [answered(400), answered(650)],
    }
    paradigms = compared({"offload": 2.0, "split": 1.9, "policy": None}, outcomes, 30_000)
    assert (paradigms["split"]["verified_ratio"], paradigms["split"]["cider_ratio"]) == (0.25, 0.95)
    assert paradigms["split"]["first_to_verified"] == pytest.approx(0.1)
    assert paradigms["policy"]["best_fixed"] == "split"
    assert paradigms["policy"]["verified_to_best_fixed"] == pytest.approx(1.05)
    assert paradigms["policy"]["cider_ratio"] is None
    assert "best_fixed" not in paradigms["split"]


def test_an_escalating_edge_is_told_against_the_cloud_alone() -> None:
    passed_up = PhotoOutcome("a", 0, "t", "speculative", "cloud", 1, 300, was_passed_up=True)
    outcomes = {"offload": [answered(1)], "speculative": [answered(200)], "escalate": [answered(100), passed_up]}
    figures = compared({"offload": 1.0, "speculative": 2.0, "escalate": 1.9}, outcomes, 30_000)["escalate"]
    assert (figures["escalated_share"], figures["cider_to_cloud"], figures["verified_to_cloud"]) == (0.5, 0.95, 1.0)


def test_an_oracle_takes_the_best_of_each_slot() -> None:
    outcomes = {
        "device": [answered(1, at_s=0), answered(1, at_s=25)],  # never verified: no oracle may choose it
        "offload": [answered(500, at_s=0), answered(100, at_s=25)],
        "split": [answered(200, at_s=19.9), PhotoOutcome("b", 20.0)],  # lost
        "policy": [answered(220, at_s=0), answered(100, at_s=39)],
    }
    slots = slots_of([(0, "lte-m"), (20, "wifi")], 40, outcomes, lost_ms=30_000)
    assert [slot["best_fixed"] for slot in slots] == ["split", "offload"]
    assert [slot["policy_to_best"] for slot in slots] == [pytest.approx(1.1), pytest.approx(1.0)]
    assert slots[1]["verified_ms_p50"] == {"offload": 100, "split": 30_000, "policy": 100}
    assert slots[0]["photos"] == {"device": 1, "offload": 1, "split": 1, "policy": 1}
    assert against_oracle(slots)["policy_to_oracle"] == pytest.approx(320 / 300)
    assert against_oracle(slots)["policy_to_oracle_geometric"] == pytest.approx(1.1**0.5)


def test_a_trace_without_a_policy_has_no_ratio() -> None:
    slots = slots_of([(0, "wifi")], 20, {"offload": [answered(1)]}, lost_ms=1)
    assert set(against_oracle(slots).values()) == {None}


def test_the_last_moment_of_a_trace_lasts_as_long_as_the_one_before() -> None:
    wifi = PROFILES["wifi"]
    assert e2e.trace_end([(0, wifi), (20, wifi), (35, wifi)]) == 50
    assert e2e.trace_end([(0, wifi)]) == e2e.SLOT_S


def test_the_smallest_picture_that_keeps_the_quality_is_searched_from_below() -> None:
    ciders = {75: 1.0, 50: 1.0, 35: 0.99, 25: 0.97, 15: 0.5, 10: 0.5, 5: 0.1}
    assert e2e.smallest_quality(ciders.__getitem__) == 35
    assert e2e.smallest_quality(lambda quality: float(quality == 75)) == 75


def test_texts_are_scored_on_photos_that_every_paradigm_has_seen() -> None:
    case = e2e.Case([], {"a": ["a dog runs fast"], "b": ["two cats sleep here"], "c": ["nothing of that at all"]})
    words = {name: texts[0] for name, texts in case.captions.items()}
    seen = {
        "offload": [PhotoOutcome(n, 0, words[n]) for n in "abc"],
        "policy": [PhotoOutcome(n, 0, words[n]) for n in "ab"],
    }
    scores = e2e.ciders(case, seen)
    assert scores["offload"] == scores["policy"]
    assert scores["policy"] is not None
    assert scores["policy"] > 5
    assert e2e.ciders(case, {"offload": [PhotoOutcome("a", 0)], "policy": []}) == {"offload": None, "policy": None}


# ---- what is asked for ----


def test_the_baseline_and_what_is_compared_are_always_played() -> None:
    assert e2e.ordered(["policy"]) == ["offload", "policy"]
    assert e2e.ordered(["escalate", "offload"]) == ["offload", "speculative", "escalate"]
    with pytest.raises(e2e.E2eError, match="there is no paradigm spilt: want some of device, offload"):
        e2e.ordered(["spilt"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four photos, and captions for three of them beside it."""
    (folder := tmp_path / "photos").mkdir()
    rows = ["split\timage\tcaption"]
    for number, photo in enumerate([photo for photo in shipped() if len(photo.data) < 600_000][:4]):
        (folder / f"{number}.jpg").write_bytes(photo.data)
        rows += [f"{'dev' if number else 'train'}\t{number}.jpg\tword{number + 5} word5 {word}" for word in "ab"]
    (tmp_path / "captions.tsv").write_text("\n".join(rows) + "\n")
    return folder


def arguments(photos: Path, bundle: Bundle, *more: str) -> list[str]:
    captions = ["--captions", str(photos.parent / "captions.tsv")]
    return ["bench", "e2e", "--images", str(photos), *captions, "--bundle", str(bundle.path), *more]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--profile", "wifi", "--split", "test"], "no photo is in split test: want one of dev, train"),
        (["--profile", "wire"], "no link profile 'wire'"),
        (["--profile", "wifi", "--plot", "e2e.xyz"], "no picture format '.xyz'"),
        (["--profile", "wifi", "--paradigms", "spilt"], "there is no paradigm spilt"),
        (["--profile", "wifi", "--board-slowdown", "0.5"], "board slowdown = 0.5, want 1 to 100"),
        (["--profile", "wifi", "--trace", "/nowhere/trace"], "No such file or directory"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    photos: Path, board_bundle: Bundle, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert cli.main(arguments(photos, board_bundle, *more)) == 1
    assert says in capsys.readouterr().err


def case_of(photos: Path, *names: str) -> e2e.Case:
    captions = {name: ["a"] for name in names}
    return e2e.case_of(Photos([photos], captions), captions, 1.0)


def test_a_damaged_picture_is_left_out_named_and_counted(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "3.jpg").write_bytes(b"no picture")
    case = case_of(photos, "2.jpg", "3.jpg")
    assert ([photo.name for photo in case.photos], case.unreadable) == (["2.jpg"], 1)
    assert "picture unreadable name=3.jpg" in caplog.text
    with pytest.raises(EvaluationError, match=r"no picture can be read, name others: 3\.jpg"):
        case_of(photos, "3.jpg")


def test_a_picture_that_no_board_takes_is_shrunk(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = case_of(photos, "1.jpg").photos[0]
    monkeypatch.setattr(e2e, "MAX_FRAME_BYTES", 30_000)
    after = case_of(photos, "1.jpg").photos[0]
    assert (before.name, before.data) == ("1.jpg", (photos / "1.jpg").read_bytes())
    assert len(after.data) < len(before.data)


# ---- the real thing ----


def test_every_photo_goes_through_real_processes_and_none_stays_behind(
    photos: Path, board_bundle: Bundle, tmp_path: Path
) -> None:
    json_file, picture = tmp_path / "e2e.json", tmp_path / "e2e.png"
    more = ["--profile", "wifi", "--split", "dev", "--paradigms", "device,speculative"]
    command = [sys.executable, "-m", "firmware_tools", *arguments(photos, board_bundle, *more)]
    command += ["--json", str(json_file), "--plot", str(picture), "--markdown", str(json_file.with_suffix(".md"))]
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(json_file.read_text())
    assert (figures["profile"], figures["images"], list(figures["paradigms"])) == (
        "wifi",
        3,
        ["offload", "device", "speculative"],
    )
    for name, each in figures["paradigms"].items():
        assert (each["answered"], each["lost"], each["chosen"]) == (3, 0, {name: 1.0})
        assert each["answered_by"] == {"device" if name == "device" else "cloud": 1.0}
    offload, device, speculative = figures["paradigms"].values()
    assert offload["first_text_ms_p50"] == offload["verified_ms_p50"] > 0
    assert offload["server_ms_mean"] > 0
    assert (device["bytes_mean"], device["verified_ms_p50"], device["server_ms_mean"]) == (0, None, 0)
    # Equal where a random draft is empty, and the verified text the first one.
    assert 0 < speculative["first_text_ms_p50"] <= speculative["verified_ms_p50"] <= speculative["verified_ms_p95"]
    assert speculative["bytes_ratio"] < 0.5
    assert ran.stdout.startswith(json_file.with_suffix(".md").read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = json_file.with_suffix(".md").read_text().splitlines()
    assert [row.split(" | ")[1] for row in table[2:]] == ["`offload`", "`device`", "`speculative`"]
    assert {row.count(" | ") for row in table} == {7}
    assert not list((tmp_path / "tmp").iterdir())


def test_a_policy_and_an_escalating_edge_are_measured_on_a_link_that_changes(
    photos: Path, board_bundle: Bundle, tmp_path: Path
) -> None:
    (trace := tmp_path / "trace.tsv").write_text("0\twifi\n1\t4g\n")
    json_file = tmp_path / "e2e.json"
    more = ["--profile", "wifi", "--limit", "2", "--paradigms", "policy,escalate", "--trace", str(trace)]
    more += ["--board-slowdown", "2", "--json", str(json_file)]
    assert cli.main(arguments(photos, board_bundle, *more)) == 0
    figures = json.loads(json_file.read_text())
    assert (figures["images"], figures["board_slowdown"], figures["unreadable"]) == (2, 2.0, 0)
    assert list(figures["paradigms"]) == ["offload", "speculative", "policy", "escalate"]
    slots = figures["trace"]["slots"]
    assert [(slot["profile"], slot["from_s"], slot["to_s"]) for slot in slots] == [("wifi", 0, 1), ("4g", 1, 2)]
    for name, each in figures["paradigms"].items():
        assert each["lost"] == 0
        assert 0 < sum(slot["photos"][name] for slot in slots) <= each["answered"]  # the last may come behind the end
    policy, escalate = figures["paradigms"]["policy"], figures["paradigms"]["escalate"]
    assert policy["best_fixed"] in ("offload", "speculative")
    assert policy["verified_to_best_fixed"] > 0
    assert set(escalate["answered_by"]) <= {"edge", "cloud"}
    assert 0 <= escalate["escalated_share"] <= 1


def test_an_interrupt_ends_every_process_and_leaves_nothing(photos: Path, board_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    more = ["--profile", "outage", "--paradigms", "split"]  # nothing is ever answered: it would take minutes
    command = [sys.executable, "-m", "firmware_tools", *arguments(photos, board_bundle, *more)]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    bench = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, env=environment)
    children: list[psutil.Process] = []
    while not any("run" in child.cmdline() for child in children):
        assert bench.poll() is None
        time.sleep(0.01)  # another process's children give no event
        children = psutil.Process(bench.pid).children(recursive=True)
    bench.send_signal(signal.SIGINT)
    _, err = bench.communicate(timeout=120)
    assert (bench.returncode, "Traceback" in err) == (130, False), err
    assert len(children) >= 4  # two brokers, a server, a board
    assert not [child for child in children if child.is_running()]
    assert not list((tmp_path / "tmp").iterdir())


def test_a_server_that_cannot_start_speaks_for_itself(
    photos: Path, board_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged := tmp_path / "damaged").mkdir()
    for file in board_bundle.path.iterdir():
        if file.name != "tail.safetensors":
            (damaged / file.name).symlink_to(file)
    assert cli.main(arguments(photos, open_bundle(damaged), "--profile", "wifi", "--paradigms", "split")) == 1
    assert "`aiflow serve` ended with exit code 78" in capsys.readouterr().err
