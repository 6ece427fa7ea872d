"""Quality over bytes: hulls, intervals and ratios by hand; what is sent; and the command on a few photos."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks import rate, rate_figures
from benchmarks.quality import Chain
from benchmarks.rate_figures import Point, Sample, bootstrap, bytes_at, figures, hull, triple
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.head import Latent
from edge_runtime.inference.rate import longest_bytes
from edge_runtime.wire import bitstream
from firmware_tools import cli
from models.coded_pictures import picture_codecs
from server.engine import Job
from server.loading import load_engine
from server.numerics import prove
from tests.bundles import random_symbols
from tests.exports import pictures

PARTS = 1 + 3 + 3  # a whole default level, its prefixes and its groups


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_figures, "DRAWS", 200)


def test_points_below_the_line_between_two_others_are_not_on_the_hull() -> None:
    sizes = np.array([100, 200, 400, 400, 800, 1600])
    quality = np.array([0.2, 0.3, 0.6, 0.1, 0.65, 0.65])  # halfway in log bytes from 100 to 400, the line is at 0.4
    assert hull(sizes, quality) == [0, 2, 4]


@given(st.lists(st.tuples(st.integers(20, 20_000), st.integers(0, 100)), min_size=1, max_size=12))
def test_no_point_is_above_the_hull_and_more_bytes_on_it_are_better(points: list[tuple[int, int]]) -> None:
    sizes, quality = (np.array(column, float) for column in zip(*points, strict=True))
    on = hull(sizes, quality)
    assert (np.diff(sizes[on]) > 0).all()
    assert (np.diff(quality[on]) > 0).all()
    assert (np.interp(np.log(sizes), np.log(sizes[on]), quality[on]) >= quality - 1e-9).all()
    assert max(quality) == quality[on[-1]]
    assert min(sizes) == sizes[on[0]]


def test_bytes_are_interpolated_in_their_logarithm_and_never_extrapolated() -> None:
    sizes, quality = np.array([100.0, 400.0]), np.array([0.2, 0.6])
    found = bytes_at(sizes, quality, np.array([0.1, 0.2, 0.4, 0.6, 0.61]))
    assert found == pytest.approx([0, 100, 200, 400, np.inf])


def test_the_interval_of_a_mean_has_the_width_that_theory_says() -> None:
    values = np.random.default_rng(1).normal(5, 2, (1, 400))
    value, low, high = triple(values.mean(), bootstrap(values)[:, 0])
    assert value == pytest.approx(values.mean(), abs=1e-4)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)  # type: ignore[operator]


def test_draws_are_paired_and_the_same_each_time(few_draws: None) -> None:
    values = np.random.default_rng(1).uniform(1, 2, 50)
    assert Sample.of(np.stack([values, 3 * values])).ratio(1, 0) == [3, 3, 3]
    assert (bootstrap(values[None]) == bootstrap(values[None])).all()
    assert bootstrap(values[None]).shape == (200, 1)


def test_what_is_not_finite_is_none() -> None:
    assert triple(np.inf, np.array([1.0, np.inf])) == [None, 1, None]
    assert triple(1.0, np.array([1.0, 2.0, np.inf])) == [1, 1, None]


def of_equal_photos(column: Sequence[float]) -> np.ndarray:
    return np.array(column, float)[:, None].repeat(3, 1)


def test_ours_is_compared_at_equal_quality_with_each_codec_and_the_best(few_draws: None) -> None:
    points = [
        Point("level 0", "level"),
        Point("level 1", "level"),
        Point("half", "prefix"),
        Point("jpeg small", "jpeg"),
        Point("jpeg large", "jpeg"),
        Point("avif", "avif"),
    ]
    payload, content = of_equal_photos([100, 200, 50, 400, 1600, 900]), of_equal_photos([70, 170, 20, 370, 1570, 570])
    found = figures(points, 1, payload, content, {"top1": of_equal_photos([0.6, 0.8, 0.3, 0.4, 0.8, 0.7])})
    assert (found["photos"], found["top"], found["default"]) == (3, "level 1", "level 1")
    coarse, fine, half, *codecs = found["points"]
    assert coarse["bytes"] == [100, 100, 100]
    assert coarse["content_bytes"] == 70
    assert coarse["top1_to_top"] == [0.75, 0.75, 0.75]
    against = coarse["top1_codec_bytes"]
    assert against["jpeg"] == {"ratio": [8, 8, 8], "measured": [4, 16]}  # 0.6 is halfway from 400 to 1600 bytes
    assert against["avif"]["ratio"] == [0, 0, 0]  # its only setting is better
    assert against["avif"]["measured"] == [9, 9]
    assert against["avif-bare"]["measured"] == [5.7, 5.7]
    assert fine["top1_codec_bytes"]["avif"]["ratio"] == [None, None, None]
    assert fine["top1_codec_bytes"]["best"] == {"codec": "jpeg", "ratio": [8, 8, 8], "measured": [2, 8]}
    assert half["top1_codec_bytes"]["best"]["ratio"] == [0, 0, 0]
    assert not any("top1_codec_bytes" in point for point in codecs)
    assert [(step["from"], step["to"], step["top1"][0]) for step in found["steps"]] == [
        ("level 0", "level 1", 0.2),
        ("half", "level 1", 0.5),
    ]
    assert found["hulls"]["top1"] == {"jpeg": ["jpeg small", "jpeg large"], "avif": ["avif"], "avif-bare": ["avif"]}


@pytest.fixture(scope="module")
def sender(board_bundle: Bundle) -> rate.Sender:
    engine = load_engine(board_bundle, ["edge"])
    return rate.Sender(Chain(board_bundle, "split", "onnx", "edge", engine))


class Symbols(Latent):
    """A latent with given symbols at the finest level."""

    def __init__(self, symbols: np.ndarray) -> None:
        two = np.full((1, 1, 1), 1 << 20, np.int32)
        super().__init__(symbols, 0, (two // 2, two))


def test_a_prefix_gives_its_complete_channels_and_costs_its_share(sender: rate.Sender) -> None:
    symbols, pixels = random_symbols(1)[0], np.zeros((224, 224, 3), np.uint8)
    sent = {point.name: send(pixels, Symbols(symbols)) for point, send in sender.ways([], quick=True)}
    whole, half = sent["level 1"], sent["level 1, 50 % of its bytes"]
    assert len(bitstream.encode(symbols, sender.tables, 1)) == whole.content_bytes
    assert (whole.job.symbols == symbols).all()
    assert half.content_bytes == round(whole.content_bytes / 2)
    assert 24 < half.job.channels < 40
    assert (half.job.symbols[: half.job.channels] == symbols[: half.job.channels]).all()
    assert not half.job.symbols[half.job.channels :].any()
    assert whole.payload_bytes - half.payload_bytes == whole.content_bytes - half.content_bytes
    assert sent["level 1, groups: 2"].job.channels == 32
    assert sent["level 0"].job.level == 0
    assert len(sent) == PARTS + 1 + 6 * len(picture_codecs())


def test_a_budget_takes_the_finest_level_that_fits_and_the_least_if_none_does(sender: rate.Sender) -> None:
    latent = Symbols(random_symbols(1)[0])
    coarse = longest_bytes(latent.symbols(0), sender.tables, 0)
    chosen = [sender.choose(latent, budget) for budget in (10_000, coarse, 20)]
    assert [(features.level, features.groups) for features in chosen] == [(1, 4), (0, 4), (0, 1)]


def test_equal_jobs_are_asked_once(sender: rate.Sender) -> None:
    symbols = random_symbols(3)
    jobs = [Job(symbols[i], level, channels) for i, level, channels in ((0, 0, 64), (1, 0, 64), (0, 1, 64), (0, 0, 9))]
    asked: list[Job] = []

    def ask(_: Any, photo: int, jobs: Sequence[Job]) -> list[int]:
        asked.extend(jobs)
        return [*range(10 * photo, 10 * photo + len(jobs))]

    assert rate.ask_once(ask, None, 7, [*jobs, *reversed(jobs)]) == [70, 71, 72, 73, 73, 72, 71, 70]
    assert asked == jobs


def test_a_limit_takes_photos_of_every_class() -> None:
    assert rate.spread(range(10), 4) == [0, 2, 5, 7]
    assert rate.spread(range(3), None) == rate.spread(range(3), 8) == [0, 1, 2]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_draws: None) -> Path:
    """Three photos of two classes, with captions; and an engine that proves few shapes, since all take a while."""
    monkeypatch.setattr(rate, "QUICK_SIZES", (96,))
    for module in ("server.numerics", "benchmarks.rate"):
        monkeypatch.setattr(f"{module}.prove", partial(prove, sizes=(1, 4)))
    rows = ["image\tcaption"]
    for number, pixels in enumerate(pictures(3, seed=11).numpy()):
        path = tmp_path / "photos" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels)
        rows += [f"{number}.png\tword{number} word5 {words}" for words in ("a b", "c")]
    (tmp_path / "captions.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.timeout(300)
def test_the_command_measures_captions_and_labels_and_writes_what_it_is_asked_for(
    photos: Path, board_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: photos / f"rate.{name}" for name in ("json", "markdown", "plot")}
    files["plot"] = files["plot"].with_suffix(".svg")
    tail = photos / "codec-tail.safetensors"
    weights = load_engine(board_bundle, ["edge"]).tail.state_dict()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tail)
    arguments = ["--images", photos / "photos", "--captions", photos / "captions.tsv", "--classes", photos / "photos"]
    arguments += ["--bundle", board_bundle.path, "--codec-tail", tail, "--tier", "edge", "--quick", "--limit", 2]
    arguments += ["--budgets", 1200, 2000, *(part for name, path in files.items() for part in (f"--{name}", path))]
    assert cli.main(["bench", "rate", *map(str, arguments)]) == 0
    run = json.loads(files["json"].read_text())
    assert run["codec_tail"] == tail.name
    assert run["labels"]["classes"] == 2  # those of the photos
    assert run["labels"]["entropy_bits"] == 1  # one photo of each
    bits = [point["label_bits"][0] for point in run["labels"]["points"]]
    assert max(bits) <= 1
    for task, measures in (("captions", ["cider"]), ("labels", ["top1", "top5", "label_bits"])):
        figures = run[task]
        points = {point["name"]: point for point in figures["points"]}
        assert figures["photos"] == 2
        assert [name for name in points if name.startswith("level ")][:2] == ["level 0", "level 1"]
        assert len(points) == PARTS + 1 + 2 + 3 * len(picture_codecs())
        assert points["level 0"]["bytes"][0] < points["level 1"]["bytes"][0]
        assert points["2000 bytes"]["bytes"] == points["level 1"]["bytes"]  # it fits
        curves = {*picture_codecs(), *(["avif-bare"] if "avif" in picture_codecs() else [])}  # OpenCV may lack it
        for measure in measures:
            assert points["level 1"][f"{measure}_to_top"][0] in (1, None)  # None: 0 of 0
            assert points["2000 bytes"][measure] == points["level 1"][measure]
            assert points["level 0"][f"{measure}_codec_bytes"].keys() == {*curves, "best"}
        assert [each["level"] for each in figures["coder"]] == [0, 1]
        for each in figures["coder"]:
            assert 0 < each["overhead_without_header_percent"] < each["overhead_percent"] < 2
            assert 0 < each["zstd19_bytes"] < each["int8_bytes"] == 64 * 7 * 7
        assert [(each["budget"], each["share_above"]) for each in figures["budgets"]] == [(1200, 0), (2000, 0)]
    printed = capsys.readouterr().out
    assert "| level 1 | " in printed
    assert files["markdown"].read_text().count("| level 1, groups: 3 |") == 3  # CIDEr, top 1, bits
    assert files["plot"].read_text().startswith("<?xml")


@pytest.mark.parametrize("named", [["--images"], ["--captions"], []])
def test_photos_without_captions_or_classes_are_refused(
    named: list[str], photos: Path, board_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [part for name in named for part in (name, str(photos / "photos"))]
    assert cli.main(["bench", "rate", "--bundle", str(board_bundle.path), *arguments]) == 1
    assert "name --images and --captions, or --classes" in capsys.readouterr().err


def test_a_tail_that_is_none_is_refused(sender: rate.Sender, board_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "tail.safetensors").write_bytes(b"no tail")
    chain = Chain(board_bundle, "split", "onnx", "edge", load_engine(board_bundle, ["edge"]))
    for tail in (tmp_path / "tail.safetensors", board_bundle.path / "edge.safetensors", tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"want what `python -m models\.recipe\.codec_tail` wrote"):
            rate.engine_for_pictures(chain, tail)
