"""`aiflow serve` before it serves."""

import shutil
import signal
import subprocess
import sys

import pytest

from edge_runtime import packages
from firmware_tools import cli

# Stands for a start test, which takes up to a minute and cannot be interrupted between its steps.
LOADING = """
import signal, sys, time
import server.app
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs this test may ignore it
def load(config, folder):
    print("loading", flush=True)
    time.sleep(600)
server.app.load = load
from firmware_tools.cli import main
sys.exit(main(["serve", sys.argv[1]]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_a_server_that_still_loads_at_once_and_without_a_traceback(tmp_path, board_bundle, number, code):
    config = tmp_path / "server.toml"
    config.write_text(f'[server]\nid = "s1"\nbundle = "{board_bundle.path}"\n')
    command = [sys.executable, "-c", LOADING, str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "server loads and tests its target" in errors  # until then, boards say: look at the server's log


@pytest.mark.parametrize(
    ("bundle", "mqtt", "says"),
    [
        ("nowhere", "", "nowhere holds no manifest.json: name the directory of a bundle"),
        ("{bundle}", 'username = "s1"\npassword_file = "nowhere"\n', "password_file = nowhere: cannot be read"),
        ("{bundle}", 'host = "broker.lan"\n', "TLS is off"),
        ('{bundle}"\nsecond_bundle = "{bundle}', "", "are the same bundle"),
        ("{damaged}", "", "tail.safetensors"),
    ],
)
def test_a_mistake_is_named_with_its_file_before_anything_is_loaded(
    tmp_path, board_bundle, monkeypatch, capsys, bundle, mqtt, says
):
    monkeypatch.setattr("server.app.load_target", None)  # would be called
    shutil.copytree(board_bundle.path, damaged := tmp_path / "damaged")
    (damaged / "tail.safetensors").unlink()
    config = tmp_path / "server.toml"
    bundle = bundle.format(bundle=board_bundle.path, damaged=damaged)
    config.write_text(f'[server]\nid = "s1"\nbundle = "{bundle}"\n[mqtt]\n{mqtt}')
    assert cli.main(["serve", str(config)]) == cli.EXIT_CONFIG
    said = capsys.readouterr().err
    assert says in said
    assert str(config) in said


@pytest.mark.parametrize("command", ["serve", "validate"])
@pytest.mark.parametrize(
    ("module", "extra", "target", "more"),
    [
        ("ray", "ray", "bundle", "[ray]\n"),
        ("transformers", "hf", "hf:nothing", ""),
        ("torch", "pytorch", "bundle", ""),
        ("jsonschema", "json", "hf:nothing", '[prompts.gate]\nschema = {type = "object"}\n'),
    ],
)
def test_a_target_whose_package_is_missing_says_how_to_install_it_from_here(
    tmp_path, board_bundle, monkeypatch, capsys, command, module, extra, target, more
):
    monkeypatch.setattr("server.app.load_target", None)  # would be called
    monkeypatch.setitem(sys.modules, module, None)
    config = tmp_path / "server.toml"
    config.write_text(f'[server]\nid = "s1"\nbundle = "{board_bundle.path}"\ntarget = "{target}"\n{more}')
    assert cli.main([command, str(config)]) == cli.EXIT_CONFIG
    said = capsys.readouterr().err
    is_too_old = sys.version_info < packages.OLDEST_PYTHON.get(module, ())
    assert ("needs Python 3.11" if is_too_old else f"[{extra}]'") in said
    assert str(config) in said
