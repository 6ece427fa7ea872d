"""`aiflow validate --connect`: a line per broker and camera, and what is wrong with each."""

import argparse
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime.errors import AiflowError, ConfigError
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.wire import topics
from firmware_tools import probes, validate
from models import SHIPPED_BUNDLE
from testbed.chat_server import ChatServer
from tests.brokers import PLAIN, Mosquitto
from tests.listener import Listener


@pytest.fixture
def board(tmp_path: Path, board_bundle: Bundle) -> Callable[..., Path]:
    """A function that writes board.toml."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    (tmp_path / "0.jpg").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())

    def write(port: int, *, source: str = str(tmp_path / "0.jpg"), more: str = "") -> Path:
        path = tmp_path / "board.toml"
        path.write_text(
            f'[board]\nid = "b1"\nbundle = "{board_bundle.path}"\nbackend = "onnx"\n'
            f'[[cameras]]\nname = "door"\nsource = "{source}"\n[mqtt]\nport = {port}\n{more}'
        )
        return path

    return write


@pytest.fixture
def deaf() -> Iterator[int]:
    """The port of somebody who closes every connection, as a TLS port or an old broker does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, _ = listening.accept()
                    connection.recv(1000)
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def connect(path: Path) -> None:
    validate.run(argparse.Namespace(path=path, connect=True))


def test_brokers_and_cameras_in_order_have_a_line_each(
    board: Callable[..., Path],
    broker: Mosquitto,
    start_broker: Callable[..., Mosquitto],
    capsys: pytest.CaptureFixture[str],
) -> None:
    local = start_broker()
    connect(board(broker.port, more=f"[local]\nport = {local.port}\n"))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"OK      [mqtt] 127.0.0.1:{broker.port}: connected in plain text, without a login; 2 subscription(s) granted",
        f"OK      [local] 127.0.0.1:{local.port}: connected in plain text, without a login; 1 subscription(s) granted",
        "OK      camera door: a frame of 64 x 48 pixels",
    ]


def test_a_camera_of_frigates_is_checked_as_far_as_that_is_possible(
    board: Callable[..., Path], broker: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f'[frigate]\nurl = "http://127.0.0.1:1"\ntoken_file = "{tmp_path}/token"\n'
    with pytest.raises(ConfigError, match=r"\[frigate\] token_file = .*: cannot be read"):
        connect(board(broker.port, source="frigate", more=more))
    (tmp_path / "token").write_text("token")
    connect(board(broker.port, source="frigate", more=more))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"OK      [mqtt] 127.0.0.1:{broker.port}: connected in plain text, without a login; 6 subscription(s) granted",
        "OK      camera door: waits for events of Frigate over MQTT, which are not checked",
    ]


def test_a_trigger_on_a_label_that_the_bundle_does_not_have_is_a_warning(
    board: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    trigger = "[[cameras.triggers]]\nwhen = 'label == {}'\n[mqtt]"
    path, warned = board(1), {}
    text = path.read_text()
    for label in ("nobody", "dog"):
        path.write_text(text.replace("[mqtt]", trigger.format(label)))
        check(path)
        warned[label] = "warning: camera door has a trigger on the label" in capsys.readouterr().out
    assert warned == {"nobody": True, "dog": False}


def test_a_limit_that_hardly_any_features_fit_is_a_warning(
    board: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = board(1)
    head = f'[board]\nmax_bytes = 40\nid = "b1"\nbundle = "{SHIPPED_BUNDLE}"\n'
    path.write_text(head + path.read_text().partition('backend = "onnx"\n')[2])
    check(path)
    coarsest = open_bundle(SHIPPED_BUNDLE).manifest.latent.level_bytes[0]
    assert "warning: max_bytes = 40 in [board] is less than " in (said := capsys.readouterr().out)
    assert f"coarsest level, {coarsest:.0f} bytes" in said


def check(path: Path) -> None:
    validate.run(argparse.Namespace(path=path, connect=False))


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ('[outbox]\nfile = "{0}/board.toml/outbox.sqlite"\n', "board.toml is a file, not a folder"),
        ('[outbox]\nfile = "{0}"\n', "is a folder: name a file in it"),
        ('[kept_frames]\nfolder = "{0}/board.toml"\n', "board.toml is a file, not a folder"),
        ('[updates]\nfolder = "{0}/board.toml"\n', "board.toml is a file, not a folder"),
    ],
)
def test_a_place_that_nobody_can_write_is_refused(
    board: Callable[..., Path], tmp_path: Path, kept: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(board(1, more=kept.format(tmp_path)))


@pytest.mark.parametrize(
    ("more", "warning"),
    [
        (
            '[kept_frames]\nfolder = "/proc/x"\n',
            "folder in [kept_frames] = /proc/x: /proc is not writable for this user",
        ),
        ('[outbox]\nfile = "/proc/x/outbox.sqlite"\n', "file in [outbox] = .*: /proc is not writable for this user"),
        ('[updates]\nfolder = "/proc/x"\n', "folder in [updates] = .*: /proc is not writable for this user"),
        ('[metrics]\nport = 1\nhost = "192.0.2.1"\n', "host in [metrics] = 192.0.2.1: Cannot assign"),
        ('[frigate]\nurl = "http://127.0.0.1/x/api"\n', "url in [frigate] has the path /x/api: remove it"),
        ('[outbox]\nfile = "{0}/a/b/outbox.sqlite"\n[metrics]\nport = 1\n', ""),
    ],
)
def test_what_may_work_later_or_elsewhere_is_a_warning(
    board: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, warning: str
) -> None:
    source = "frigate" if "frigate" in more else str(tmp_path / "0.jpg")
    check(board(1, source=source, more=more.format(tmp_path)))
    said = capsys.readouterr().out
    assert ("warning:" in said) == bool(warning)
    assert re.search(warning.replace("[", r"\["), said)
    assert not (tmp_path / "a").exists()


def test_a_server_has_its_places_and_its_metrics_checked(
    board_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.toml"
    openai = '[openai]\nmodel = "m"\ninput_price = 1.0\nbudget_per_day = 1.0\nspent_file = "{}/spent.json"\n'
    head = '[server]\nid = "s1"\ntarget = "openai:http://127.0.0.1:1/v1"\n[metrics]\nport = 1\nhost = "192.0.2.1"\n'
    path.write_text(head + openai.format("/proc/x"))
    check(path)
    said = capsys.readouterr().out
    assert "warning: spent_file in [openai] = /proc/x/spent.json: /proc is not writable for this user" in said
    assert "warning: host in [metrics] = 192.0.2.1: " in said
    path.write_text(head + openai.format(path))
    with pytest.raises(ConfigError, match=r"spent_file in \[openai\] = .* is a file, not a folder"):
        check(path)


@pytest.mark.parametrize(
    ("stop_s", "more", "is_warned"),
    [(10, "output_price = 1.0\n", True), (60, "output_price = 1.0\n", False), (10, "", False)],
)
def test_a_stop_that_cuts_off_paid_calls_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stop_s: int, more: str, is_warned: bool
) -> None:
    path = tmp_path / "server.toml"
    head = f'[server]\nid = "s1"\ntarget = "openai:http://127.0.0.1:1/v1"\nstop_s = {stop_s}\n'
    path.write_text(head + '[openai]\nmodel = "m"\n' + more)
    check(path)
    warning = "warning: stop_s = 10 in [server] is shorter than timeout_s = 60 in [openai]"
    assert (warning in capsys.readouterr().out) == is_warned


def test_it_does_not_disconnect_the_board_that_runs(board: Callable[..., Path], broker: Mosquitto) -> None:
    connect(board(broker.port))
    assert "as b1-validate " in broker.said()
    assert "as b1 " not in broker.said()


@pytest.mark.parametrize(
    ("more", "cause"),
    [("", "is this a TLS port .* does it speak MQTT 5"), ("tls = true\n", "does this port speak TLS")],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho leaves its socket open
def test_a_broker_that_hangs_up_gets_a_likely_cause(
    board: Callable[..., Path], deaf: int, capsys: pytest.CaptureFixture[str], more: str, cause: str
) -> None:
    with pytest.raises(AiflowError, match=r"1 of 2 connections failed: \[mqtt\]"):
        connect(board(deaf, more=more))
    broker, camera = capsys.readouterr().out.splitlines()[-2:]
    assert broker.startswith(f"FAILED  [mqtt] 127.0.0.1:{deaf}: ")
    assert re.search(cause, broker)
    assert camera.startswith("OK      camera door")


def test_a_refused_login_names_the_settings_that_have_it(
    board: Callable[..., Path],
    start_broker: Callable[..., Mosquitto],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broker = start_broker(PLAIN.replace("allow_anonymous true", "allow_anonymous false"))
    (tmp_path / "password").write_text("pa55\n")
    login = f'username = "b1"\npassword_file = "{tmp_path / "password"}"\n'
    for more, advice in (
        ("", "set username and password_file"),
        (login, f"check username = b1 with the first line of {tmp_path / 'password'}"),
    ):
        with pytest.raises(AiflowError, match="1 of 2 connections failed"):
            connect(board(broker.port, more=more))
        said = capsys.readouterr().out
        assert "the broker refused the login: Not authorized" in said
        assert advice in said
        assert "pa55" not in said


def test_a_camera_without_a_frame_is_named(
    board: Callable[..., Path], broker: Mosquitto, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "FRAME_S", 1.0)
    with pytest.raises(AiflowError, match="1 of 2 connections failed: camera door"):
        connect(board(broker.port, source="0"))
    assert "FAILED  camera door: no frame within 1 s" in capsys.readouterr().out


def test_a_server_connects_without_joining_the_share(
    board_bundle: Bundle, broker: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.toml"
    path.write_text(
        f'[server]\nid = "s1"\nbundle = "{board_bundle.path}"\n[mqtt]\nport = {broker.port}\n'
        f'[upstream]\nsite = "city"\n[upstream.mqtt]\nport = {broker.port}\n'
    )
    connect(path)
    ways = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert ways == ["OK      [mqtt] 127.0.0.1", "OK      [upstream.mqtt] 127.0.0.1"]
    assert "$share" not in broker.said()


def test_a_server_with_another_server_as_target_is_in_order_without_a_bundle_and_its_key_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, key = tmp_path / "server.toml", tmp_path / "key"
    path.write_text(
        f'[server]\nid = "s1"\ntarget = "openai:http://127.0.0.1:8080/v1"\n[openai]\nmodel = "m"\nkey_file = "{key}"\n'
    )
    with pytest.raises(ConfigError, match="key: cannot be read: No such file"):
        validate.run(argparse.Namespace(path=path, connect=False))
    key.write_text("sk-secret\n")
    validate.run(argparse.Namespace(path=path, connect=False))
    assert "server s1 of site home is in order" in capsys.readouterr().out


@pytest.fixture
def other() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


def server_toml(folder: Path, url: str, port: int, model: str = "fake", kind: str = "openai") -> Path:
    (folder / "key").write_text("sk-secret\n")
    path = folder / "server.toml"
    path.write_text(
        f'[server]\nid = "s1"\ntarget = "{kind}:{url}"\n[mqtt]\nport = {port}\n'
        f'[openai]\nmodel = "{model}"\nkey_file = "{folder}/key"\n'
    )
    return path


@pytest.mark.parametrize("kind", ["openai", "vllm"])
def test_an_address_with_the_path_of_the_api_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    for path in ("/v1/chat/completions", "/v1/chat/completions/"):
        with pytest.raises(ConfigError, match="leave out /chat/completions"):
            check(server_toml(tmp_path, f"http://127.0.0.1:1{path}", 1, kind=kind))


@pytest.mark.parametrize("kind", ["openai", "vllm"])
def test_a_target_that_lists_the_model_is_in_order(
    tmp_path: Path, broker: Mosquitto, other: ChatServer, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    connect(server_toml(tmp_path, other.url, broker.port, kind=kind))
    assert capsys.readouterr().out.splitlines()[-1] == f"OK      [openai] {other.url}: it has the model fake"
    assert other.asked == []  # nothing was paid


def test_a_model_that_the_target_does_not_list_is_a_warning(
    tmp_path: Path, broker: Mosquitto, other: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = server_toml(tmp_path, other.url, broker.port, "mistaken")
    for models, listed in (
        (["fake", "b\x1b"], "it lists fake, b\ufffd"),
        ([str(n) for n in range(10)], "it lists 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"),
        ([], "its list is empty"),
    ):
        other.models = [{"id": name} for name in models]
        connect(path)
        assert f"'mistaken' in [openai] is not in its list of models: {listed}" in capsys.readouterr().out
    other.models = [{"name": "fake"}]
    connect(path)
    assert "warning: its list of models cannot be read" in capsys.readouterr().out
    connect(server_toml(tmp_path, other.url.removesuffix("/v1"), broker.port))
    assert "warning: it lists no models: the other server says 404 Not Found: does the address end" in (
        capsys.readouterr().out
    )


def test_a_target_that_refuses_the_key_or_is_not_there_is_named(
    tmp_path: Path, broker: Mosquitto, other: ChatServer, deaf: int, capsys: pytest.CaptureFixture[str]
) -> None:
    other.key = "another"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    for url, cause in (
        (other.url, "the other server says 401 Unauthorized: is the key in key_file right?"),
        (nobody, "no connection to 127.0.0.1: Connection refused"),
        (f"http://127.0.0.1:{deaf}/v1", "the response broke off"),
    ):
        with pytest.raises(AiflowError, match=r"1 of 2 connections failed: \[openai\]"):
            connect(server_toml(tmp_path, url, broker.port))
        said = capsys.readouterr().out
        assert f"FAILED  [openai] {url}: {cause}" in said
        assert "sk-secret" not in said


def test_the_file_of_the_budget_is_not_written(tmp_path: Path, broker: Mosquitto, other: ChatServer) -> None:
    path = server_toml(tmp_path, other.url, broker.port)
    budget = f'input_price = 1.0\nbudget_per_day = 1.0\nspent_file = "{tmp_path}/spent.json"\n'
    path.write_text(path.read_text() + budget)
    connect(path)
    assert not (tmp_path / "spent.json").exists()


def test_a_prompt_that_no_server_has_is_a_warning(
    board: Callable[..., Path], broker: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    path = board(broker.port)
    path.write_text(path.read_text().replace('name = "door"', 'name = "door"\nprompt = "drive"'))
    with Listener(broker.port, topics.server_statuses("home")) as servers:

        def warned(server: str, **status: object) -> str:
            sent = json.dumps({"server": server, "state": "online", **status}).encode()
            servers.client.publish(topics.server_status("home", server), sent, retain=True)
            assert servers.next() == sent
            connect(path)
            return "\n".join(line for line in capsys.readouterr().out.splitlines() if "has prompt = " in line)

        assert warned("s1", state="offline") == ""
        assert warned("s1", target={}).endswith("they have no prompts: add [prompts.drive] to a server.toml")
        assert warned("s2", target={"prompts": ["yard", "door"]}) == (
            "warning: camera door has prompt = 'drive', but no server that is online has it: want one of door, yard, "
            "or add [prompts.drive] to a server.toml"
        )
        assert warned("s1", target={"prompts": ["drive"]}) == ""
