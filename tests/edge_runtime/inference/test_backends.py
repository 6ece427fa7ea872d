import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from edge_runtime.inference import backends
from edge_runtime.inference.backends import SUFFIXES, BackendError, installed, load_model
from edge_runtime.inference.backends import onnx as onnx_backend
from edge_runtime.inference.backends.onnx import sums_saturate
from models import SHIPPED_BUNDLE
from testbed.arm64 import write_pictures
from tests import exports

ROOT = Path(__file__).parents[3]
TFLITE = os.environ.get("AIFLOW_TFLITE_PYTHON", "")  # a Python with the extra `tflite`, whose numpy is an older one

each_backend = pytest.mark.parametrize("suffix", SUFFIXES.values())


def python(code: str, home: str) -> str:
    """Runs code in a fresh process whose home and cache are an empty directory."""
    environment = {"HOME": home, "XDG_CACHE_HOME": f"{home}/.cache", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout


def test_onnxruntime_leaves_no_telemetry_behind(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "head.onnx").write_bytes(exports.files()["head.onnx"])
    path = str(tmp_path / "head.onnx")
    code = (
        f"from pathlib import Path; from edge_runtime.inference.backends import load_model; load_model(Path({path!r}))"
    )
    python(code, str(home))
    assert list(home.rglob("*")) == []


def test_the_package_imports_no_runtime_before_it_is_needed(tmp_path):
    code = "import sys, edge_runtime.inference.head, edge_runtime.inference.draft; print('\\n'.join(sys.modules))"
    modules = set(python(code, str(tmp_path)).split())
    assert "edge_runtime.inference.backends" in modules
    assert not modules & {"onnxruntime", "ai_edge_litert", "torch"}


def test_auto_means_each_installed_runtime(monkeypatch):
    assert installed() == ["onnx", "litert"]
    assert installed("litert") == ["litert"]
    monkeypatch.setitem(backends.RUNTIMES, "onnx", ("no_such_runtime",))
    assert installed() == ["litert"]


def test_a_missing_runtime_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(backends.RUNTIMES, "onnx", ("no_such_runtime",))
    with pytest.raises(BackendError, match=r"no runtime for onnx is installed: pip install .*\[board\]"):
        load_model(tmp_path / "head.onnx")
    monkeypatch.setitem(backends.RUNTIMES, "litert", ("no_such_runtime",))
    with pytest.raises(BackendError, match="no runtime for onnx or litert is installed: pip install"):
        installed()


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendError, match="'tensorrt', want auto, onnx or litert"):
        installed("tensorrt")


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(BackendError, match=r"ends in '.pt', want one of .onnx, .tflite"):
        load_model(tmp_path / "head.pt")


@each_backend
def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"head{suffix}"
    with pytest.raises(BackendError, match="install the bundle again"):
        load_model(path)
    path.write_bytes(exports.files()[path.name])
    monkeypatch.setattr(backends, "MAX_MODEL_BYTES", 1000)
    with pytest.raises(BackendError, match="more than 1000 bytes"):
        load_model(path)


def test_a_model_that_takes_weights_from_another_file_is_refused(tmp_path, monkeypatch):
    """onnxruntime would read it, even for a model that it gets as bytes: from the working directory."""
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    ends = [helper.make_tensor_value_info(name, 1, [1, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "one.onnx")
    monkeypatch.chdir(tmp_path)
    assert load_model(tmp_path / "one.onnx").run(np.ones((1, 8), np.float32))[0].sum() == 8
    onnx.save_model(model, "head.onnx", save_as_external_data=True, location="other.bin", size_threshold=0)
    with pytest.raises(BackendError, match="takes weights from other files"):
        load_model(tmp_path / "head.onnx")


OVERWRITTEN = """
import sys
from pathlib import Path
import numpy as np
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.inference.choice import Setup
from edge_runtime.inference.networks import load_networks

folder, pixels = Path(sys.argv[1]), np.zeros((224, 224, 3), np.uint8)
head, draft, _ = load_networks(open_bundle(folder), Setup(sys.argv[2], 1), has_labels=True)
symbols = head.symbols(pixels)
text = draft.write(symbols)
for path in folder.iterdir():
    path.write_bytes(b"a new bundle")  # as cp does it
print((head.symbols(pixels) == symbols).all(), draft.write(symbols) == text)
"""


@pytest.mark.parametrize("backend", SUFFIXES)
def test_the_files_of_a_bundle_may_be_overwritten_in_place_while_its_networks_are_used(tmp_path, backend):
    bundle = shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundle", ignore=shutil.ignore_patterns("*.safetensors"))
    command = [sys.executable, "-c", OVERWRITTEN, str(bundle), backend]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr


@pytest.mark.parametrize(("suffix", "copies"), [(".onnx", 0), (".tflite", 1)])  # LiteRT computes with the file's bytes
def test_a_loaded_network_keeps_its_file_once_at_most(tmp_path, suffix, copies):
    exports.loaded(tmp_path, f"head{suffix}")  # imports the runtime
    tracemalloc.start()
    try:
        _model = exports.loaded(tmp_path, f"head{suffix}")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < (copies + 0.5) * len(exports.files()[f"head{suffix}"])


def test_a_network_whose_provider_fails_can_fall_back_to_the_cpu(tmp_path, monkeypatch):
    (tmp_path / "head.onnx").write_bytes(exports.files()["head.onnx"])
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no second provider that needs no hardware")
    monkeypatch.setitem(onnx_backend.PROVIDERS, "azure", "AzureExecutionProvider")
    session = load_model(tmp_path / "head.onnx", providers=["azure"])._session
    session.set_providers(["CPUExecutionProvider"])  # as onnxruntime does it
    assert session.get_providers() == ["CPUExecutionProvider"]


@each_backend
@pytest.mark.parametrize("kept", [0, 100, 300_000])
def test_a_damaged_file_is_refused(tmp_path, suffix, kept):
    data = exports.files()[f"head{suffix}"][:kept]
    for damaged in (data, data[::-1]):
        with pytest.raises(BackendError, match="install the bundle again"):
            exports.loaded(tmp_path, f"head{suffix}", damaged)


@each_backend
@pytest.mark.parametrize("shape", [(1, 100, 100, 3), (224, 224, 3)])
def test_an_input_of_another_shape_is_refused(tmp_path, suffix, shape):
    model = exports.loaded(tmp_path, f"head{suffix}")
    with pytest.raises(BackendError, match="refused its input"):
        model.run(np.zeros(shape, np.uint8))
    with pytest.raises(BackendError, match="refused its input"):
        model.run()


@each_backend
def test_outputs_outlive_the_next_run(tmp_path, suffix):
    model = exports.loaded(tmp_path, f"head{suffix}")
    first = model.run(exports.pictures(1, seed=1).numpy())[0]
    kept = first.copy()
    model.run(exports.pictures(1, seed=2).numpy())
    assert (first == kept).all()


@pytest.mark.parametrize(
    ("machine", "cpu_info", "saturates"),
    [
        ("x86_64", "flags : sse4_2 avx2", True),
        ("x86_64", "flags : avx512_vnni", False),
        ("x86_64", "flags : avx_vnni", False),
        ("aarch64", "Features : asimddp", False),
    ],
)
def test_only_x86_without_vnni_needs_the_exact_path(machine, cpu_info, saturates):
    assert sums_saturate(machine, cpu_info) == saturates


@pytest.mark.skipif(not TFLITE, reason="AIFLOW_TFLITE_PYTHON names no Python with the extra `tflite`")
def test_tflite_runtime_gives_nearly_the_symbols_of_litert(tmp_path):
    """Its older kernels round differently: 2 % of the symbols differ, by one step."""
    pictures = write_pictures(tmp_path / "pictures")
    program = ["-m", "testbed.board_outputs", str(SHIPPED_BUNDLE), "litert", str(pictures)]
    (theirs, ours) = (
        json.loads(subprocess.run([python, *program], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
        for python in (TFLITE, sys.executable)
    )
    symbols = [np.frombuffer(b"".join(bytes.fromhex(o["symbols"]) for o in found), np.int8) for found in (theirs, ours)]
    distance = np.abs(symbols[0].astype(int) - symbols[1])
    assert distance.max() <= 1
    assert np.count_nonzero(distance) < 0.05 * distance.size
