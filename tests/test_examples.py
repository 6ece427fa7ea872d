"""Each set-up of examples/ works with its files as they are: brokers, servers, board, and somebody who watches."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from edge_runtime.config import RuntimeConfig, load_toml
from server.config import Config
from tests.brokers import mosquitto_or_skip
from tests.camera_programs import Programs

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/board.toml"))
NAMESPACES = ["unshare", "--map-root-user", "--mount", "--net"]
each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)


def test_there_are_five_and_the_page_has_each():
    page = (ROOT / "examples" / "README.md").read_text()
    assert [example.name for example in EXAMPLES] == ["frigate", "home", "jetson", "trap", "two-tier"]
    assert all(f"]({example.name}/README.md)" in page for example in EXAMPLES)


@each
def test_its_files_are_in_order_and_its_page_names_them(example):
    page = (example / "README.md").read_text()
    for path in example.glob("*.toml"):
        load_toml(path, RuntimeConfig if path.name == "board.toml" else Config)
        assert f"`{path.name}`" in page
    links = re.findall(r"\]\(([^)#:]+)\)", page)
    assert [link for link in links if not (example / link).exists()] == []


def test_the_server_with_replicas_joins_the_cluster_of_its_file_and_finds_its_bundle_there():
    folder = ROOT / "examples" / "ray"
    server, cluster = load_toml(folder / "server.toml", Config), yaml.safe_load((folder / "cluster.yaml").read_text())
    assert server.ray
    assert server.ray.address == f"{cluster['provider']['head_ip']}:6379"
    assert cluster["min_workers"] == cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    assert (ROOT / cluster["file_mounts"][server.server.bundle] / "manifest.json").exists()


@each
@pytest.mark.timeout(600)
def test_it_answers_from_the_camera_to_the_person_who_watches(example, board_bundle, tmp_path, monkeypatch):
    mosquitto_or_skip()
    if (
        not shutil.which("unshare")
        or subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs namespaces of an unprivileged user")
    (programs := tmp_path / "programs").mkdir()
    Programs(programs, monkeypatch).do("shows")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    (folder := tmp_path / "site").mkdir()
    module = [sys.executable, "-m", "tests.whole_site", str(example), str(board_bundle.path), str(folder)]
    done = subprocess.run([*NAMESPACES, *module], capture_output=True, text=True, check=False, timeout=580)
    logs = {path.name: path.read_text()[-1500:] for path in folder.glob("*.log")}
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
