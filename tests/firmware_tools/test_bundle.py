"""`aiflow bundle`: from a key to a board that runs the new bundle, and back, with real processes and a real broker."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.firmware.signature import read_signature
from edge_runtime.firmware.store import INCOMING, MAX_STARTS
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttSettings
from edge_runtime.wire import topics
from edge_runtime.wire.update import (
    CHUNK_BYTES,
    WINDOW_BYTES,
    UpdateState,
    decode_chunk,
    decode_update_state,
    encode_update_state,
)
from firmware_tools import push
from firmware_tools.cli import EXIT_RESTART, main
from testbed.link_simulator import LinkSimulator
from testbed.shaping import named
from tests.brokers import Mosquitto
from tests.edge_runtime.capture.helpers import write_photos
from tests.edge_runtime.firmware.helpers import rewritten, variant
from tests.listener import Listener

SITE, BOARD = "home", "b1"
pytestmark = pytest.mark.timeout(600)  # a bundle is tested in a process of its own, and a board starts several times
CONFIG = """
[board]
id = "b1"
bundle = "{bundle}"
paradigm = "device"
backend = "onnx"
[updates]
folder = "{folder}/bundles"
{trust}
[mqtt]
port = {port}
keepalive_s = 2
[[cameras]]
name = "door"
source = "{folder}/photos"
repeat = true
interval_s = 0.02
"""
RUN = "import sys; from firmware_tools.cli import main; sys.exit(main(sys.argv[1:]))"
# Before the command: a bundle called "crashes" ends the process at its first frame, as a lack of memory does.
CRASHES = """
import os, signal
from edge_runtime.pipeline import Pipeline
answer = Pipeline.answer
def crash(self, frame):
    if self.bundle.manifest.name == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, frame)
Pipeline.answer = crash
"""
START_S = 90.0  # of a board on a busy machine
PADDING = 5 * WINDOW_BYTES


def aiflow(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def padded(bundle: Bundle, folder: Path, name: str) -> Bundle:
    """A bundle with another vocabulary, and a head of some hundred KB more that does the same."""
    new = variant(bundle, folder, name, name=name)
    path = folder / "head.onnx"
    length, varint = PADDING, b""
    while length >= 0x80:
        varint, length = varint + bytes([length & 0x7F | 0x80]), length >> 7
    # doc_string, field 6 of ModelProto: a text that changes nothing.
    path.write_bytes(path.read_bytes() + b"\x32" + varint + bytes([length]) + b"x" * PADDING)
    return rewritten(new, folder, tuple(new.manifest.files))


class Site:
    """A board's folder, a broker, and what is said between board and sender."""

    def __init__(self, folder: Path, bundle: Bundle, port: int, stack: ExitStack) -> None:
        self.folder, self.port, self._stack, self.bundle = folder, port, stack, bundle
        self.config, self.key, self.trust = folder / "board.toml", folder / "key.pem", folder / "trust"
        write_photos(folder / "photos", 2)
        self.configure()

    def configure(self, trust: bool = True) -> None:
        line = f'trust_file = "{self.trust}"' if trust else ""
        self.config.write_text(CONFIG.format(bundle=self.bundle.path, folder=self.folder, port=self.port, trust=line))

    def listen(self) -> tuple[Listener, Listener, Listener]:
        """To the board's statuses, to what it says of updates, and to the chunks that it gets."""
        names = (topics.status, topics.bundle_state, topics.bundle_chunk)
        status, state, chunks = (self._stack.enter_context(Listener(self.port, name(SITE, BOARD))) for name in names)
        return status, state, chunks

    def run(self, before: str = "") -> "subprocess.Popen[bytes]":
        """`aiflow run`."""
        command = [sys.executable, "-c", before + RUN, "run", "--no-show", str(self.config)]
        with (self.folder / "board.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def push(self, bundle: Bundle) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", RUN, "bundle", "push", "--board", BOARD, "--broker-port", str(self.port)]
        process = subprocess.Popen(
            [*command, str(bundle.path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process


@pytest.fixture
def site(tmp_path: Path, board_bundle: Bundle, broker: Mosquitto, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(tmp_path, board_bundle, broker.port, stack)
        assert aiflow("bundle", "key", site.key) == 0
        site.trust.write_text(capsys.readouterr().out)
        yield site


@pytest.fixture
def signed(site: Site, tmp_path: Path) -> Callable[..., Bundle]:
    """A function that makes and signs a bundle."""

    def signed(name: str, version: int) -> Bundle:
        bundle = padded(site.bundle, tmp_path / "new" / name, name)
        assert aiflow("bundle", "sign", "--key", site.key, "--version", version, bundle.path) == 0
        return bundle

    return signed


def status_with(listener: Listener, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    while not wanted(status := json.loads(listener.heard.get(timeout=START_S).payload)):
        pass
    return status


def said(listener: Listener, wanted: Callable[[UpdateState], object]) -> UpdateState:
    while not wanted(state := decode_update_state(listener.heard.get(timeout=START_S).payload)):
        pass
    return state


# ---- on one machine ----


def test_a_bundle_is_signed_verified_installed_listed_and_taken_back(
    site: Site, signed: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    new = signed("new", 3)
    assert aiflow("bundle", "verify", "--trust", site.trust, new.path) == 0
    assert "new version 3" in capsys.readouterr().out
    assert aiflow("bundle", "verify", new.path) == 0
    assert "new version 3" in (said := capsys.readouterr().out)
    assert "the signature was not checked" in said
    assert aiflow("bundle", "verify", site.bundle.path) == 0
    assert "its files match; it is unsigned" in capsys.readouterr().out
    assert aiflow("bundle", "install", "--config", site.config, new.path) == 0
    (entry,) = (path.name for path in (site.folder / "bundles").iterdir() if path.is_dir())
    assert entry == f"new-3-{new.id.hex()}"
    names = {path.name for path in (site.folder / "bundles" / entry).iterdir()}
    assert "head.onnx" in names
    assert not {name for name in names if name.endswith((".safetensors", ".tflite"))}
    capsys.readouterr()
    assert aiflow("bundle", "list", "--config", site.config) == 0
    assert "on trial" in capsys.readouterr().out
    assert aiflow("bundle", "install", "--config", site.config, signed("older", 2).path) == 1
    assert "3 was installed" in capsys.readouterr().err
    assert aiflow("bundle", "install", "--force", "--config", site.config, site.folder / "new" / "older") == 0
    for _ in range(2):
        assert aiflow("bundle", "rollback", "--config", site.config) in (0, 1)
    capsys.readouterr()
    assert aiflow("bundle", "rollback", "--config", site.config) == 1
    assert "no bundle in use" in capsys.readouterr().err


def test_an_unsigned_and_a_foreign_bundle_are_installed_only_where_nobody_is_trusted(
    site: Site, signed: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = signed("new", 1)
    assert aiflow("bundle", "key", tmp_path / "other.pem") == 0
    assert aiflow("bundle", "sign", "--key", tmp_path / "other.pem", "--version", 9, new.path) == 0
    assert aiflow("bundle", "install", "--config", site.config, new.path) == 1
    assert "none of the 1 trusted keys" in capsys.readouterr().err
    (new.path / "bundle.sig").unlink()
    for command in (
        ("install", "--config", site.config),
        ("verify", "--trust", site.trust),
        ("push", "--board", BOARD),
    ):
        assert aiflow("bundle", *command, new.path) == 1
        said = capsys.readouterr().err
        assert f"{new.path} is unsigned" in said
        assert f"aiflow bundle sign --key signing.pem --version N {new.path}" in said
    site.configure(trust=False)
    subprocess.run(["tar", "-cf", tmp_path / "new.tar", "-C", new.path.parent, new.path.name], check=True)
    for path in (new.path, tmp_path / "new.tar"):
        assert aiflow("bundle", "install", "--config", site.config, path) == 0


def test_a_tar_file_is_installed_as_its_directory_is(
    site: Site, signed: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, packed = signed("new", 3), tmp_path / "new.tar"
    command = ("bundle", "install", "--config", site.config, packed)

    def pack(*more: object) -> None:
        subprocess.run(["tar", "-cf", packed, "-C", new.path, ".", *map(str, more)], check=True)

    link = tmp_path / "extra"
    link.symlink_to("/etc/passwd")
    pack("-C", tmp_path, link.name)
    assert aiflow(*command) == 1
    assert "'extra' is no plain file" in capsys.readouterr().err
    signature = (new.path / "bundle.sig").read_bytes()
    (new.path / "bundle.sig").unlink()
    pack()
    assert aiflow(*command) == 1
    assert f"{packed} is unsigned" in capsys.readouterr().err
    (new.path / "bundle.sig").write_bytes(signature)
    vocabulary = (new.path / "vocabulary.txt").read_bytes()
    (new.path / "vocabulary.txt").write_bytes(vocabulary[::-1])
    pack()
    assert aiflow(*command) == 1
    assert "vocabulary.txt has arrived, but its hash is another one than was signed" in capsys.readouterr().err
    assert {path.name for path in (site.folder / "bundles").iterdir()} == {INCOMING}
    (new.path / "vocabulary.txt").write_bytes(vocabulary)
    pack()
    assert aiflow(*command) == 0
    assert f"new-3-{new.id.hex()}" in {path.name for path in (site.folder / "bundles").iterdir()}
    assert aiflow(*command) == 1
    assert "3 was installed" in capsys.readouterr().err


def test_a_bundle_that_does_not_work_here_is_not_installed(
    site: Site, board_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = variant(board_bundle, tmp_path / "bad", "bad", name="bad")
    (bad.path / "head.onnx").write_bytes(b"no network")
    bad = rewritten(bad, bad.path, tuple(bad.manifest.files))
    assert aiflow("bundle", "sign", "--key", site.key, "--version", 1, bad.path) == 0
    assert aiflow("bundle", "install", "--config", site.config, bad.path) == 1
    assert "self-test" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "bundles").iterdir()} == {INCOMING}


def test_without_keys_a_changed_file_and_a_signature_of_another_manifest_are_found(
    signed: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = signed("one", 1).path, signed("other", 2).path
    (one / "bundle.sig").write_bytes((other / "bundle.sig").read_bytes())
    assert aiflow("bundle", "verify", one) == 1
    assert "the signature is of another manifest" in capsys.readouterr().err
    (other / "head.onnx").write_bytes(b"changed")
    assert aiflow("bundle", "verify", other) == 1
    assert "head.onnx is not the file that the manifest names" in capsys.readouterr().err


def test_a_private_key_is_its_owners_alone_and_is_not_overwritten(site: Site) -> None:
    assert site.key.stat().st_mode & 0o777 == 0o600
    before = site.key.read_bytes()
    assert aiflow("bundle", "key", site.key) == 1
    assert site.key.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "why"), [(("--version", 1 << 40), "statement"), (("--version", 1, "--days", 10**9), "at most")]
)
def test_numbers_out_of_their_range_are_refused(
    site: Site,
    board_bundle: Bundle,
    tmp_path: Path,
    arguments: tuple[object, ...],
    why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = variant(board_bundle, tmp_path / "v", "v")
    assert aiflow("bundle", "sign", "--key", site.key, *arguments, bundle.path) == 1
    assert why in capsys.readouterr().err


# ---- over MQTT ----


def test_a_broker_that_is_never_reached_is_named_and_not_the_board(
    signed: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = signed("new", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and says nothing
        port = silent.getsockname()[1]
        assert aiflow("bundle", "push", "--board", BOARD, "--timeout", 1, "--broker-port", port, bundle.path) == 1
    assert f"not done within 1 s: no connection to 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (b"", "no word from this board yet: does it run"),
        (b'{"state": "online"}', "the board is online, but does not answer: does it have [updates]"),
        (b'{"state": "offline"}', "the board is offline"),
    ],
)
def test_a_board_that_does_not_answer_is_told_with_what_may_be_wrong(
    site: Site,
    signed: Callable[..., Bundle],
    status: bytes,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(push, "FIRST_WORD_S", 0.1)
    bundle = signed("new", 2)
    with Listener(site.port) as board:
        board.client.publish(topics.status(SITE, BOARD), status, retain=True)
        assert aiflow("bundle", "push", "--board", BOARD, "--timeout", 3, "--broker-port", site.port, bundle.path) == 1
    captured = capsys.readouterr()
    assert said in captured.out
    assert f"not done within 3 s: {said}" in captured.err


def test_a_broker_that_was_away_gets_one_offer_and_not_all_that_were_due_meanwhile(
    site: Site, signed: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "FIRST_WORD_S", 0.1)
    bundle, waited = signed("new", 2), 0
    offer, state = topics.bundle_offer(SITE, BOARD), topics.bundle_state(SITE, BOARD)
    kept = encode_update_state(UpdateState("kept", bundle.id.hex()))
    with (
        LinkSimulator(("127.0.0.1", site.port), named("outage")) as link,
        Listener(site.port, offer, answer=lambda _: kept, to=state) as board,
    ):

        class SlowPush(push.Push):
            def _why_not_done(self, *known: Any) -> str:  # called each time that an offer is due
                nonlocal waited
                waited += 1
                if waited == 20:
                    link.set(named("wifi"))
                return super()._why_not_done(*known)

        settings = MqttSettings("127.0.0.1", link.port, client_id="push")
        SlowPush(bundle, read_signature(bundle.path), SITE, BOARD, lambda _: None).run(settings, START_S)
        board.client.publish(offer, b"the last one")
        offers = 0
        while board.next() != b"the last one":
            offers += 1
    assert waited >= 20
    assert offers < 5


def test_a_pushed_bundle_survives_a_killed_board_is_tried_and_kept(site: Site, signed: Callable[..., Bundle]) -> None:
    new = signed("new", 2)
    status, state, chunks = site.listen()
    board = site.run()
    first = status_with(status, lambda status: status["state"] == "online")
    assert (first["bundle"], first["bundle_version"]) == (site.bundle.id.hex(), 0)
    assert first["update"] == {"state": "idle", "failed": "", "why": "", "version": 0, "percent": 0}
    push = site.push(new)
    said(state, lambda state: state.offset >= 2 * WINDOW_BYTES)
    board.kill()
    board.wait()
    board = site.run()
    assert board.wait(START_S) == EXIT_RESTART
    board = site.run()
    last = status_with(status, lambda s: s.get("bundle_version") == 2 and s["update"]["state"] == "idle")
    assert (last["bundle"], last["bundle_name"]) == (new.id.hex(), "new")
    output, _ = push.communicate(timeout=START_S)
    assert push.returncode == 0, output
    assert "the board runs the bundle, and keeps it" in output
    # Data that was stored before the kill was not sent again: at most the window that was on its way.
    sent = [(chunk.file, chunk.offset) for chunk in map(decode_chunk, payloads(chunks))]
    assert len(sent) - len(set(sent)) <= WINDOW_BYTES // CHUNK_BYTES
    # Of the board's files, only those came that it did not have.
    changed = [new.manifest.files[name].sha256 for name in ("head.onnx", "vocabulary.txt")]
    assert {file.hex() for file, _ in sent} - set(changed) == {hash_of_manifest(new)}


def payloads(listener: Listener) -> Iterator[bytes]:
    """The bytes that have arrived so far."""
    while not listener.heard.empty():
        yield listener.heard.get().payload


def hash_of_manifest(bundle: Bundle) -> str:
    from edge_runtime.inference.bundle import MANIFEST, file_hash

    return file_hash(bundle.path / MANIFEST)


def test_a_pushed_bundle_that_crashes_goes_back_by_itself_and_is_refused_from_then_on(
    site: Site, signed: Callable[..., Bundle]
) -> None:
    status, _, _ = site.listen()
    board = site.run(CRASHES)
    status_with(status, lambda status: status["state"] == "online")
    push = site.push(signed("crashes", 1))
    assert board.wait(START_S) == EXIT_RESTART
    for _ in range(MAX_STARTS):
        assert site.run(CRASHES).wait(START_S) == -signal.SIGKILL
    site.run(CRASHES)
    back = status_with(status, lambda s: s["state"] == "online" and s["update"]["failed"])
    assert back["bundle"] == site.bundle.id.hex()
    assert "did not work" in back["update"]["why"]
    output, _ = push.communicate(timeout=START_S)
    assert push.returncode == 1
    assert "was given up here" in output


def test_a_board_that_is_stopped_and_started_on_trial_goes_on_with_it(
    site: Site, signed: Callable[..., Bundle]
) -> None:
    assert aiflow("bundle", "install", "--config", site.config, signed("new", 1).path) == 0
    os.rename(site.folder / "photos", site.folder / "later")  # no frames: it stays on trial
    (site.folder / "photos").mkdir()
    text = site.config.read_text().replace(f'source = "{site.folder}/photos"', f'source = "watch:{site.folder}/photos"')
    site.config.write_text(text.replace("repeat = true\n", ""))
    status, _, _ = site.listen()
    for _ in range(MAX_STARTS + 1):
        board = site.run()
        status_with(status, lambda s: s["state"] == "online" and s["update"]["state"] == "trial")
        board.send_signal(signal.SIGTERM)
        assert board.wait(START_S) == 0
        status_with(status, lambda s: s["state"] == "offline")
