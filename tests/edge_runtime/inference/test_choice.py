"""Backends are tried in child processes; the choice is kept while nothing that it depends on changes."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest

from edge_runtime.app import fastest_networks
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig
from edge_runtime.cores import usable_cores
from edge_runtime.errors import RestartError
from edge_runtime.inference import choice
from edge_runtime.inference.backends import BackendError, load_model, onnx
from edge_runtime.inference.bundle import BundleError
from edge_runtime.inference.choice import Setup, choose
from tests import runtimes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "aiflow"


def broken(tmp_path, monkeypatch, module, code):
    runtimes.install(tmp_path / "packages", monkeypatch, module, code)


@pytest.fixture
def measured(monkeypatch):
    """By backend and providers: what a child finds. Remembers what was asked of children."""
    table, asked = {}, []

    def probe(arguments, limit_s, stop):
        _, backend, threads, providers = arguments
        asked.append((backend, threads, providers))
        return table[f"{backend} {providers}".strip()]

    monkeypatch.setattr(choice, "_probe", probe)
    monkeypatch.setattr(choice, "usable_cores", lambda: 4)
    return table, asked


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (runtimes.SIGILL, "onnx was ended by SIGILL: it was built for another processor"),
        (runtimes.HANGS, "onnx hangs: no result within 2 s"),
        (runtimes.RAISES, "onnx fails: the runtime for onnx is installed but broken: built for another numpy; pip "),
    ],
)
def test_a_runtime_that_does_not_work_leaves_the_work_to_the_other_and_is_named(
    tmp_path, monkeypatch, board_bundle, cache, code, reason
):
    broken(tmp_path, monkeypatch, "onnxruntime", code)
    limits = iter([2.0, 120.0])  # the working one may need longer on a busy machine
    setup = choose(board_bundle, threads=1, tell=lambda _: monkeypatch.setattr(choice, "PROBE_S", next(limits)))
    assert setup == Setup("litert", 1)
    (kept,) = cache.iterdir()
    assert reason in json.loads(kept.read_text())["why"]


def test_a_trial_that_a_terminal_ends_blames_no_runtime_and_keeps_nothing(tmp_path, monkeypatch, board_bundle, cache):
    broken(tmp_path, monkeypatch, "onnxruntime", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    with pytest.raises(BackendError, match="the trial of onnx was ended by SIGTERM: start again"):
        choose(board_bundle)
    assert not cache.exists()


def test_if_no_runtime_works_the_error_names_each_and_says_what_to_do(tmp_path, monkeypatch, board_bundle, cache):
    broken(tmp_path, monkeypatch, "onnxruntime", runtimes.SIGILL)
    broken(tmp_path, monkeypatch, "ai_edge_litert", runtimes.RAISES)
    with pytest.raises(BackendError) as raised:
        choose(board_bundle)
    for said in ("onnx was ended by SIGILL", "litert fails: ", "install another version", "pip install", "doctor"):
        assert said in str(raised.value)
    assert not cache.exists()  # the next start tries again


def test_runtimes_that_are_not_ready_in_time_are_worth_another_start(tmp_path, monkeypatch, board_bundle, cache):
    broken(tmp_path, monkeypatch, "onnxruntime", runtimes.HANGS)
    broken(tmp_path, monkeypatch, "ai_edge_litert", runtimes.RAISES)
    monkeypatch.setattr(choice, "PROBE_S", 2.0)
    with pytest.raises(RestartError, match=r"onnx hangs: no result within 2 s; litert (hangs|fails)"):
        choose(board_bundle)
    assert not cache.exists()


def test_a_kept_choice_starts_no_child_until_a_runtime_is_installed_anew(
    tmp_path, monkeypatch, board_bundle, cache, measured
):
    table, asked = measured
    table |= {"onnx": {1: 5.0, 2: 5.0}, "litert": {1: 4.0, 2: 4.0}}
    broken(tmp_path, monkeypatch, "ai_edge_litert", "")
    first = choose(board_bundle, threads=1)
    assert (choose(board_bundle, threads=1), len(asked)) == (first, 2)
    choose(board_bundle, threads=2)
    assert len(asked) == 4  # other settings have a choice of their own
    broken(tmp_path, monkeypatch, "ai_edge_litert", "# another build of the same version")
    choose(board_bundle, threads=1)
    assert (len(asked), len(list(cache.iterdir()))) == (6, 3)


def test_a_board_with_a_quota_of_one_core_measures_one_thread(tmp_path, monkeypatch, board_bundle, measured):
    table, asked = measured
    table |= {"onnx": {1: 5.0}, "litert": {1: 4.0}}
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(choice, "usable_cores", partial(usable_cores, tmp_path))
    assert choose(board_bundle) == Setup("litert", 1)
    assert {threads for _, threads, _ in asked} == {"1"}


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b'{"key": {}, "setup": {"backend": "x", "threads": 1}}'])
def test_a_damaged_file_is_measured_again(board_bundle, cache, measured, content):
    table, asked = measured
    table |= {"onnx": {1: 5.0}, "litert": {1: 4.0}}
    choose(board_bundle, threads=1)
    (kept,) = cache.iterdir()
    kept.write_bytes(content)
    assert (choose(board_bundle, threads=1), len(asked)) == (Setup("litert", 1), 4)
    assert json.loads(kept.read_bytes())["setup"]["backend"] == "litert"


def test_a_choice_that_cannot_be_kept_is_used_all_the_same(tmp_path, monkeypatch, board_bundle, measured, caplog):
    measured[0].update({"onnx": {1: 3.0}, "litert": {1: 4.0}})
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose(board_bundle, threads=1) == Setup("onnx", 1)
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(
    ("onnx", "litert", "setup"),
    [
        ({1: 10.0, 2: 9.0, 4: 6.0}, {1: 8.0, 2: 8.0, 4: 8.0}, Setup("onnx", 4)),
        ({1: 10.0, 2: 7.1, 4: 7.1}, {1: 8.0, 2: 8.0, 4: 8.0}, Setup("litert", 1)),
        ({1: 10.0, 2: 6.0, 4: 5.0}, {1: 8.0, 2: 8.0, 4: 8.0}, Setup("onnx", 2)),
    ],
)
def test_the_fastest_backend_runs_with_as_many_threads_as_are_worth_it(board_bundle, measured, onnx, litert, setup):
    measured[0].update({"onnx": onnx, "litert": litert})
    assert choose(board_bundle) == setup
    assert {threads for _, threads, _ in measured[1]} == {"1,2,4"}


def test_a_child_measures_what_it_is_asked(board_bundle):
    assert choose(board_bundle, "litert", 3) == Setup("litert", 3)


@pytest.mark.filterwarnings("ignore")  # of onnxruntime: this machine has no TensorRT
def test_tensorrt_finds_the_folder_for_its_compiled_networks(board_bundle, cache, monkeypatch):
    monkeypatch.setattr(onnx.onnxruntime, "get_available_providers", lambda: list(onnx.PROVIDERS.values()))
    with pytest.raises(BackendError):
        load_model(board_bundle.file("head.onnx"), providers=("tensorrt",))
    assert cache.is_dir()


def test_a_board_whose_kept_setup_loads_no_more_finds_another(board_bundle, cache):
    choose(board_bundle, "onnx", 1)
    (kept,) = cache.iterdir()
    before = json.loads(kept.read_bytes())
    lost = {**before, "setup": {**before["setup"], "providers": ["cuda"]}}  # as when its libraries are removed
    kept.write_text(json.dumps(lost))
    board = BoardConfig("b1", str(board_bundle.path), backend="onnx", threads=1)
    assert fastest_networks(RuntimeConfig(board, (CameraConfig("door", "mqtt"),)), board_bundle).head
    assert json.loads(kept.read_bytes())["setup"] == before["setup"]


@pytest.mark.parametrize(
    ("works", "setup"),
    [
        ({"onnx tensorrt,cuda"}, Setup("onnx", 1, ("tensorrt", "cuda"))),
        ({"onnx cuda", "onnx"}, Setup("onnx", 1, ("cuda",))),
        ({"onnx", "litert"}, Setup("litert", 1)),
    ],
)
def test_providers_that_work_are_used_and_the_others_are_left_out(board_bundle, measured, caplog, works, setup):
    table, _ = measured
    speeds = {"onnx tensorrt,cuda": 9.0, "onnx cuda": 8.0, "onnx": 7.0, "litert": 6.0}
    table |= {name: {1: ms} if name in works else "fails" for name, ms in speeds.items()}
    assert choose(board_bundle, threads=1, providers=("tensorrt", "cuda")) == setup
    assert ("onnx with tensorrt and cuda does not work" in caplog.text) == ("onnx tensorrt,cuda" not in works)


def test_a_provider_that_this_onnxruntime_lacks_is_named_and_the_cpu_is_used(board_bundle, caplog):
    assert choose(board_bundle, "onnx", 1, ["cuda"]) == Setup("onnx", 1)
    assert "onnx with cuda does not work: fails: this onnxruntime has no CUDAExecutionProvider: " in caplog.text
    assert "bundle again" not in caplog.text


@pytest.mark.parametrize("name", ["head.onnx", "draft_step.onnx", "draft_look.tflite"])
def test_a_bundle_without_a_file_is_named_and_no_runtime_is_blamed(tmp_path, board_bundle, name):
    shutil.copytree(board_bundle.path, tmp_path / "bundle")
    (tmp_path / "bundle" / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        choose(replace(board_bundle, path=tmp_path / "bundle"))
