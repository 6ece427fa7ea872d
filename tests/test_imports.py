"""Who may import whom, beyond the layers in setup.cfg; and the board's code runs without torch and on old Pythons."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLDEST = (3, 10)
# What Python 3.11 and later added, as far as anybody is likely to reach for it.
NEWER = {
    "tomllib",
    "datetime.UTC",
    "hashlib.file_digest",
    "enum.StrEnum",
    "enum.ReprEnum",
    "asyncio.TaskGroup",
    "asyncio.timeout",
    "asyncio.Runner",
    "contextlib.chdir",
    "itertools.batched",
    "operator.call",
    "typing.Self",
    "typing.Never",
    "typing.LiteralString",
    "typing.assert_never",
    "typing.assert_type",
    "typing.NotRequired",
    "typing.Required",
    "typing.Unpack",
    "typing.override",
    "ExceptionGroup",
    "BaseExceptionGroup",
}
BOARD_FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "edge_runtime").rglob("*.py"))


OURS = {"edge_runtime", "server", "models", "firmware_tools", "benchmarks", "testbed"}
# Folder: everything it may import besides itself and the standard library; for the others only modules of this project.
WIRE = {"numpy", "msgspec", "edge_runtime.errors"}
MAY_IMPORT = {
    "server": {
        *(
            "edge_runtime.wire",
            "edge_runtime.mqtt",
            "edge_runtime.requests",
            "edge_runtime.config",
            "edge_runtime.logs",
        ),
        *("edge_runtime.errors", "edge_runtime.shutdown", "edge_runtime.reporting", "edge_runtime.sd_notify"),
        *("edge_runtime.inference.preprocess", "edge_runtime.inference.bundle", "edge_runtime.inference.sampling"),
        *("edge_runtime.bounded_file", "edge_runtime.disk"),
        "edge_runtime.cores",
        "edge_runtime.picture_checks",
        "edge_runtime.http_call",
        "edge_runtime.packages",
        "edge_runtime.password_file",
        *(
            "models.backbone",
            "models.captions",
            "models.family",
            "models.labels",
            "models.language_model",
            "models.lookahead",
            "models.questions",
            "models.stored_weights",
        ),
        "models.tower_tail",
        "edge_runtime.__version__",
    },
    "testbed": {"edge_runtime"},
    "models": {"edge_runtime"},
}


def imports(folder: str) -> set[str]:
    """Every name that a folder's files import, at the top or inside functions, as `module.name`."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def outside(names: set[str], allowed: set[str]) -> set[str]:
    """The names that are not one of the allowed modules or part of one."""
    return {name for name in names if not any(f"{name}.".startswith(f"{module}.") for module in allowed)}


def test_wire_imports_only_numpy_msgspec_and_the_errors() -> None:
    assert not outside(imports("edge_runtime/wire"), WIRE | {"edge_runtime.wire"} | set(sys.stdlib_module_names))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    ours = {name for name in imports(folder) if name.split(".")[0] in OURS - {folder}}
    assert not outside(ours, MAY_IMPORT[folder])


def test_a_forbidden_import_would_be_seen() -> None:
    assert outside({"edge_runtime.wired.x", "cv2"}, {"edge_runtime.wire"}) == {"edge_runtime.wired.x", "cv2"}
    assert not outside({"edge_runtime.wire", "edge_runtime.wire.topics.request"}, {"edge_runtime.wire"})
    assert "edge_runtime.wire.errors.BitstreamError" in imports("edge_runtime/wire")


def loaded_by(statements: str) -> set[str]:
    """The modules in a fresh process after these statements."""
    code = f"{statements}\nimport sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["edge_runtime.pipeline", "edge_runtime.app"])
def test_the_boards_code_loads_nothing_of_the_rest_and_nothing_that_few_boards_need(module):
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert not {"torch", "safetensors", "server", "models", "firmware_tools", "benchmarks", "rich"} & loaded
    assert not {"sqlite3", "tarfile", "difflib"} & loaded


def test_the_boards_commands_load_without_torch():
    loaded = loaded_by(
        "from firmware_tools.cli import main\n"
        "for command in ('run', 'validate', 'watch'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass"
    )
    assert {"firmware_tools.run", "firmware_tools.validate", "firmware_tools.watch"} <= loaded
    assert not {"torch", "safetensors", "server", "models"} & loaded


def test_the_live_page_loads_nothing_large():
    parts = ", ".join(f"firmware_tools.ui.{part}" for part in ("command", "history", "live", "meaning", "site", "web"))
    loaded = loaded_by(f"import firmware_tools.cli, edge_runtime.mqtt, edge_runtime.shutdown, {parts}")
    assert "firmware_tools.ui.web" in loaded
    assert not {"numpy", "cv2", "rich", "torch"} & loaded


def test_onnxruntimes_telemetry_is_off_before_it_is_imported():
    code = """
import os, sys
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime": print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
import edge_runtime.app, edge_runtime.inference.backends.onnx
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == ["1"]


@pytest.mark.parametrize("path", BOARD_FILES, ids=str)
def test_the_boards_code_is_for_the_oldest_python(path):
    tree = ast.parse((ROOT / path).read_text(), str(path), feature_version=OLDEST)
    assert not names_used(tree) & NEWER


def test_newer_names_would_be_seen():
    source = (
        "import tomllib\nfrom datetime import UTC\nimport hashlib\nhashlib.file_digest\nraise ExceptionGroup('', [])"
    )
    assert names_used(ast.parse(source)) >= {"tomllib", "datetime.UTC", "hashlib.file_digest", "ExceptionGroup"}
    with pytest.raises(SyntaxError):
        ast.parse("type Id = str", feature_version=OLDEST)


def names_used(tree: ast.AST) -> set[str]:
    """Modules imported and names taken from modules, as `module.name`; and bare names."""
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Name):
            used.add(node.id)
    return used
