"""Each benchmark runs and tells what it is asked for; how fast anything is, no test can say."""

import json
from pathlib import Path
from typing import Any

import cv2
import pytest

from firmware_tools import cli
from models import SHIPPED_BUNDLE
from testbed.sample_photos import frames
from tests.bundles import tiny_bundle
from tests.exports import pictures

pytestmark = pytest.mark.timeout(400)  # processes that load torch, on a machine that may be busy


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle where there is one."""
    if (SHIPPED_BUNDLE / "manifest.json").is_file():
        return SHIPPED_BUNDLE
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", board=True).path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, pixels in enumerate(pictures(4, seed=11).numpy()):
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
    return tmp_path


def bench(bundle: Path, photos: Path, *arguments: str) -> dict[str, Any]:
    path = photos / "figures.json"
    assert cli.main(["bench", *arguments, "--bundle", str(bundle), "--images", str(photos), "--json", str(path)]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def test_codec_codes_every_photo_s_symbols(bundle: Path, photos: Path) -> None:
    figures = bench(bundle, photos, "codec", "--limit", "3")
    assert figures["frames"] == 3
    assert figures["mean_bytes"] >= figures["ideal_bytes"] > 0


def test_static_compares_frames_of_a_scene(tmp_path: Path, photos: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny", board=True).path
    figures = bench(bundle, photos, "static", "--limit", "2", "--frames", "3", "--reuse-distance", "0.5")
    assert list(figures) == ["noise", "drift", "shake", "object", "cut", "object of 12%", "object of 20%"]
    assert figures["noise"]["bytes"] <= figures["noise"]["alone_bytes"]
    assert 0 <= figures["noise"]["reused_share"] <= 0.667  # the first frame is always asked about
    assert figures["cut"]["ratio"] <= 1


def test_capture_compares_a_board_and_ways_to_read_a_camera_with_converting_every_frame(
    bundle: Path, photos: Path
) -> None:
    figures = bench(bundle, photos, "capture", "--seconds", "1", "--interval", "5", "--rounds", "1")
    for stream in ("mjpeg", "video"):
        assert min(figures[stream].values()) >= 0
        assert figures[stream]["all_converted_ratio"] == 1
        assert figures[stream]["whole_board_mb"] > figures[stream]["own_process_mb"]
        assert figures[stream]["still_board_cpu_share"] < 1
    assert figures["video"]["whole_key_frames_board_ratio"] > 0


def test_stops_ends_boards_in_each_state(bundle: Path, photos: Path) -> None:
    figures = bench(bundle, photos, "stops", "--boards", "1")
    assert list(figures) == ["boards", "live", "opening", "stalled", "broker-away", "folder"]
    for state in list(figures)[1:]:
        assert figures[state]["exit_codes"] == {"0": 1}
        assert 0 < figures[state]["median_s"] <= figures[state]["longest_s"]


def test_users_of_a_board_and_a_page_that_stays_below_50_mb(bundle: Path, photos: Path) -> None:
    figures = bench(bundle, photos, "users", "--seconds", "1", "--boards", "1")
    assert figures["events"] == 10_000
    assert 10 < figures["page"]["first_mb"] <= figures["page"]["last_mb"] <= 50
    assert list(figures["boards"]) == ["events-only", "discovery-metrics", "pictures-too"]
    for board in figures["boards"].values():
        assert board["resident_mb"] > 10


@pytest.mark.parametrize("backend", ["onnx", "litert"])
def test_device_times_stages_and_watches_a_board(bundle: Path, photos: Path, backend: str) -> None:
    figures = bench(bundle, photos, "device", "--backend", backend, "--frames", "5")[backend]
    assert list(figures["stages_ms"]) == ["resize", "head", "labels", "draft", "encode", "publish"]
    assert 0 < figures["other_share"] < 1
    assert list(figures["resident_mb"]) == ["after 1", "after 5"]
    assert min(figures["resident_mb"].values()) > 10
    assert figures["first_event_s"] > 0


def test_speculation_compares_ways_that_write_the_same_tokens(bundle: Path, photos: Path, capsys) -> None:
    figures = bench(bundle, photos, "speculation", "--limit", "3", "--rounds", "1")
    assert figures["captions"] == 3
    for ways in figures["batches"].values():
        assert list(ways) == ["alone", "board's draft", "server's proposals", "both"]
        assert {way["same_tokens"] for way in ways.values()} == {1.0}
        assert max(way["passes"] for way in ways.values()) == ways["alone"]["passes"]
        for name, way in ways.items():
            at_once, later = way["ms_at_delay"]["0"], way["ms_at_delay"]["30"]
            assert later - at_once == pytest.approx(60)
            assert (at_once > figures["draft_ms"]) or name in ("alone", "server's proposals")
    assert "server's proposals" in capsys.readouterr().out


def test_speculation_compares_a_model_of_transformers_with_its_assisted_generation(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.server.targets.tiny_models import SMOLVLM_MARKS, language_model, smolvlm, words

    smolvlm(folder := tmp_path / "model")
    language_model("Llama", words(SMOLVLM_MARKS))(small := tmp_path / "assistant")
    models = ("--target", f"hf:{folder}", "--assistant", str(small))
    figures = bench(bundle, photos, "speculation", *models, "--limit", "3", "--rounds", "1")
    names = ["alone", "board's draft", "server's proposals", "assisted generation", "both"]
    for size, ways in figures["batches"].items():
        assert list(ways) == [*names, "server's and assistant's proposals"], size
        assert {way["same_tokens"] for way in ways.values()} == {1.0}
        assert ways["server's proposals"]["passes"] <= ways["assisted generation"]["passes"] < ways["alone"]["passes"]


def test_speculation_refuses_a_target_of_another_kind(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "speculation", "--target", "openai:http://127.0.0.1/v1"])
    assert "want hf:FOLDER" in capsys.readouterr().err
    assert cli.main(["bench", "speculation", "--assistant", "small"]) != 0
    assert "name it with --target hf:FOLDER" in capsys.readouterr().err


def test_gateway_answers_every_board(bundle: Path, photos: Path) -> None:
    figures = bench(bundle, photos, "gateway", "--seconds", "1")
    for asked in (figures["alone"], figures["16 boards"]):
        assert list(asked["statuses"]) == ["ok"]
        assert asked["unanswered"] == 0
    assert figures["16 boards"]["statuses"]["ok"] >= 16  # each of them


def test_scale_asks_a_server_and_watches_the_broker(bundle: Path, photos: Path) -> None:
    arguments = ("--boards", "4", "--interval", "0.5", "--seconds", "2", "--replicas", "0")
    figures = bench(bundle, photos, "scale", *arguments)["without Ray"]
    assert figures["answered"] == figures["asked"] > 0
    assert figures["lost"] == figures["boards_without_answer"] == 0
    assert 0 < figures["reply_ms_p50"] <= figures["reply_ms_p95"]
    assert figures["broker_ms_per_answer"] > 0


def test_without_photos_there_are_those_of_the_demo_in_many_views() -> None:
    views = list(frames(None, limit=10))
    whole, mirrored = views[:2]
    assert len(views) == 10
    assert (whole[:, ::-1] == mirrored).all()
    assert views[2].shape[0] == whole.shape[0] // 2
