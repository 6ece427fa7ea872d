"""A whole board against a real broker, with a server that says the same to everything."""

import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime import pipeline
from edge_runtime.app import Board, run_board
from edge_runtime.capture import Frame
from edge_runtime.config import (
    BoardConfig,
    CameraConfig,
    KeptFramesConfig,
    MetricsConfig,
    RuntimeConfig,
    TriggerConfig,
)
from edge_runtime.errors import ConfigError
from edge_runtime.inference.backends import BackendError
from edge_runtime.inference.bundle import DRAFT_LABELS, INTER_TABLES, TABLES, Bundle, BundleError
from edge_runtime.mqtt import Message, MqttConfig
from edge_runtime.requests.lifecycle import FEW_UNKNOWN_BUNDLE
from edge_runtime.wire import Event, Reply, Status, decode_event, decode_request, encode_reply, topics
from tests.brokers import PLAIN, Mosquitto
from tests.listener import PATIENCE_S, Listener, until

SITE, BOARD = "home", "b1"


def photo(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.imencode(".jpg", coarse.repeat(40, 0).repeat(40, 1))[1].tobytes()


@pytest.fixture
def photos(tmp_path: Path) -> str:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    return str(folder)


def configuration(bundle: Bundle, port: int, source: str, *, repeat: bool = False, **board: Any) -> RuntimeConfig:
    return RuntimeConfig(
        BoardConfig(BOARD, str(bundle.path), **{"deadline_ms": 60_000, **board}),
        (CameraConfig("door", source, interval_s=0.01, repeat=repeat),),
        MqttConfig(port=port, keepalive_s=2),
    )


def server(port: int, may_answer: Callable[[], bool] = lambda: True) -> Listener:
    def answer(payload: bytes) -> bytes:
        until(may_answer)
        return encode_reply(Reply(id=decode_request(payload).id, status=Status.OK, text="verified", server="s1"))

    return Listener(port, topics.request(SITE, BOARD), answer=answer, to=topics.reply(SITE, BOARD))


class Running:
    """A board on a thread of its own."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.summary: dict[str, Any] = {}
        self.error: Exception | None = None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(config,))

    def _run(self, config: RuntimeConfig) -> None:
        try:
            self.summary = dict(run_board(config, self.stop, self.events.put))
        except Exception as error:
            self.error = error

    def next(self, kind: str) -> Event:
        """The next event of a type; others are passed over."""
        while (event := self.events.get(timeout=PATIENCE_S)).type != kind:
            pass
        return event

    def wait_ended(self) -> dict[str, Any]:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        assert self.error is None
        return self.summary

    def __enter__(self) -> "Running":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


def status(port: int) -> dict[str, Any]:
    """The retained status of the board."""
    with Listener(port, topics.status(SITE, BOARD)) as listener:
        return json.loads(listener.next())


@pytest.mark.parametrize("backend", ["onnx", "litert"])
def test_photos_become_drafts_and_verified_texts_and_the_board_ends(board_bundle, broker, photos, backend):
    with Listener(broker.port, topics.event(SITE, BOARD)) as user, server(broker.port, lambda: user.heard.qsize() >= 3):
        summary = run_board(configuration(board_bundle, broker.port, photos, backend=backend), threading.Event())
        events = [decode_event(user.next()) for _ in range(6)]
    assert (summary["accepted"], summary["answered"], summary["lost"], summary["open"]) == (3, 3, 0, 0)
    assert (summary["frames_failed"], summary["unreadable"], summary["mqtt"]["servers"]["dropped"]) == (0, 0, 0)
    for name in {event.frame for event in events}:
        new, update = (event for event in events if event.frame == name)
        assert (new.type, update.type, update.text, update.final) == ("new", "update", "verified", True)
    assert status(broker.port)["state"] == "offline"


@pytest.mark.parametrize("labels", ["send", "alone", "never"])
def test_a_board_alone_labels_its_frames_unless_it_is_told_not_to(board_bundle, broker, photos, labels):
    with Running(configuration(board_bundle, broker.port, photos, paradigm="device", labels=labels)) as board:
        event = board.next("new")
    has_labels = labels != "never"
    assert (event.label in board_bundle.manifest.classes, "labels" in event.timings_ms) == (has_labels, has_labels)


@pytest.mark.parametrize(
    ("label", "fires", "advice"),
    [
        ('"Egyptian cat"', True, ""),
        ("n02124075", True, ""),
        ("cat", False, "want one of them, such as 'tabby cat', 'tiger cat', 'Persian cat'"),
        ("fish-like", False, "want one of them, such as 'tench'"),
    ],
)
def test_a_trigger_takes_a_label_by_name_or_id_and_warns_of_another(broker, photos, caplog, label, fires, advice):
    camera = CameraConfig("door", photos, triggers=(TriggerConfig(f"label == {label}"),))
    board = Board(
        RuntimeConfig(
            BoardConfig(BOARD, "models/zoo/everyday-lite0", paradigm="offload"), (camera,), MqttConfig(port=broker.port)
        )
    )
    seen = {"label": "Egyptian cat", "scores": {"Egyptian cat": 0.9}}
    captured = datetime(2026, 1, 1, tzinfo=timezone.utc)
    board.events.publish(Event(type="update", frame="1", camera="door", captured=captured, final=True, **seen))
    (stop := threading.Event()).set()
    board.run(stop)
    assert board.events.triggered == int(fires)
    warning = f"camera door has a trigger on the label {label!r}, which is no class of the bundle: {advice}"
    assert (warning in caplog.text) == (not fires)


def test_until_an_answer_was_measured_a_board_asks_for_no_copy_that_another_server_would_be_paid_for(
    board_bundle, broker, photos
):
    board = Board(configuration(board_bundle, broker.port, photos, resend_ms=20, paradigm="offload"))
    board.servers.close()
    assert board.tracker._lifecycle._resend.interval(0, left_s=60.0) >= 10.0


def asking(config: RuntimeConfig, prompt: str) -> RuntimeConfig:
    (camera,) = config.cameras
    return msgspec.structs.replace(config, cameras=(msgspec.structs.replace(camera, prompt=prompt),))


def test_a_picture_goes_a_few_times_to_a_server_of_which_nothing_is_known_and_that_lacks_its_prompt(
    board_bundle, broker, photos
):
    def refuse(payload: bytes) -> bytes:
        request_id = decode_request(payload).id
        return encode_reply(Reply(id=request_id, status=Status.UNKNOWN_BUNDLE, server="s1", retry_after_ms=1))

    config = asking(configuration(board_bundle, broker.port, photos, paradigm="offload"), "gate")
    with Listener(broker.port, topics.request(SITE, BOARD), answer=refuse, to=topics.reply(SITE, BOARD)) as server:
        with Running(config) as board:
            assert all("unknown_bundle" in board.next("lost").why for _ in range(3))
            board.wait_ended()
        assert server.heard.qsize() == 3 * FEW_UNKNOWN_BUNDLE


def test_no_picture_is_sent_if_a_retained_status_says_that_its_prompt_is_missing(board_bundle, broker):
    said = json.dumps({"state": "online", "server": "s1", "target": {"prompts": ["door"]}}).encode()
    topic = topics.server_status(SITE, "s1")
    with Listener(broker.port, topic) as server:
        server.client.publish(topic, said, qos=1, retain=True)
        server.next()  # the broker has it
    board = Board(asking(configuration(board_bundle, broker.port, "mqtt", paradigm="offload"), "gate"))
    with board.servers:
        until(lambda: board.measurements.takes(time.monotonic(), "gate").lacking)
        assert board.measurements._statuses._received["s1"].is_retained
        event = board.pipeline.handle(Frame("door", np.zeros((8, 8, 3), np.uint8), 1.6e9, time.monotonic()))
    assert event is not None
    assert (event.why, event.final) == ("device: no server has the prompt gate", True)


def test_a_running_board_is_online_and_says_what_it_is(board_bundle, broker, photos):
    with Running(configuration(board_bundle, broker.port, photos, repeat=True)) as board:
        board.next("new")
        online = status(broker.port)
        assert (online["state"], online["bundle"], online["paradigm"]) == (
            "online",
            board_bundle.id.hex(),
            "auto",
        )
        board.stop.set()
        board.wait_ended()
        offline = status(broker.port)
        assert (offline["state"], offline["boot"]) == ("offline", online["boot"])


@pytest.fixture
def hold_photos(monkeypatch):
    """An event until which no photo is handled, so that the board is online before they end."""
    may_go, resize = threading.Event(), pipeline.to_input
    monkeypatch.setattr(pipeline, "to_input", lambda *of: may_go.wait(PATIENCE_S) and resize(*of))
    return may_go


def test_the_status_says_what_each_camera_does_now(board_bundle, broker, photos, hold_photos):
    with Listener(broker.port, topics.status(SITE, BOARD)) as user:
        with Running(configuration(board_bundle, broker.port, photos, paradigm="device")) as board:
            told = ["starting"]
            while told[-1] != "live":
                told.append(json.loads(user.next())["cameras"]["door"])
            hold_photos.set()
            board.wait_ended()
        while (now := json.loads(user.next()))["state"] == "online":
            told.append(now["cameras"]["door"])
    assert told[-2:] == ["live", "ended"]


def test_a_board_starts_without_its_broker_and_is_answered_when_it_appears(board_bundle, tmp_path, photos):
    absent = Mosquitto(tmp_path)
    with Running(configuration(board_bundle, absent.port, photos, repeat=True, resend_ms=200)) as board:
        for _ in range(3):
            board.next("new")
        with absent as broker, server(broker.port):
            assert board.next("update").text == "verified"
            board.stop.set()
            board.wait_ended()


def test_a_board_whose_login_is_refused_goes_on_with_its_drafts(board_bundle, start_broker, photos):
    broker = start_broker(PLAIN.replace("allow_anonymous true", "allow_anonymous false"))
    with Running(configuration(board_bundle, broker.port, photos, repeat=True, deadline_ms=200)) as board:
        assert "no connection to the broker" in board.next("lost").why
        board.next("new")
        while "refused the login" not in board.next("lost").why:
            pass


def test_pictures_arrive_over_mqtt_and_garbage_is_counted(board_bundle, broker, caplog):
    config = configuration(board_bundle, broker.port, "mqtt")
    with server(broker.port) as camera, Running(config) as board:
        until(lambda: status(broker.port)["state"] == "online")
        camera.client.publish(topics.frame(SITE, BOARD), photo(1), qos=0)
        assert board.next("update").camera == "door"
        camera.client.publish(topics.frame(SITE, BOARD), b"garbage", qos=0)
        until(lambda: "picture unreadable" in caplog.text)
        camera.client.publish(topics.reply(SITE, BOARD), b"garbage")
        camera.client.publish(topics.frame(SITE, BOARD), photo(2), qos=0)
        assert board.next("update").camera == "door"
        board.stop.set()
        summary = board.wait_ended()
    assert summary["accepted"] == summary["answered"] == 2
    assert (summary["unreadable"], summary["reply"]["unreadable"]) == (1, 1)


def test_a_camera_may_have_a_topic_of_other_software_whose_retained_pictures_are_ignored(board_bundle, broker):
    topic = "frigate/front door/person/snapshot"
    config = configuration(board_bundle, broker.port, "mqtt", paradigm="device")
    own = msgspec.structs.replace(config, cameras=(CameraConfig("door", "mqtt", topic=topic),))
    with Listener(broker.port) as frigate:
        frigate.client.publish(topic, photo(1), retain=True)
        with Running(own) as board:
            until(lambda: status(broker.port)["state"] == "online")
            frigate.client.publish(topic, photo(2), qos=0)
            assert board.next("new").camera == "door"
            frigate.client.publish(topics.frame(SITE, BOARD, "door"), photo(3), qos=0)  # not subscribed to
            frigate.client.publish(topic, photo(4), qos=0)
            board.next("new")
            board.stop.set()
            summary = board.wait_ended()
    assert (summary["frames"], summary["rejected"]["retained"], summary["rejected"]["no_route"]) == (2, 1, 0)


def test_what_a_broker_had_kept_is_neither_answered_as_captured_now_nor_taken_as_a_reply(board_bundle, broker, caplog):
    config = configuration(board_bundle, broker.port, "mqtt", paradigm="device")
    with Listener(broker.port, topics.setting(SITE, BOARD, "paused")) as user:
        for topic, payload in (
            (topics.frame(SITE, BOARD), photo(1)),
            (topics.reply(SITE, BOARD), b"garbage"),
            (topics.setting(SITE, BOARD, "paused"), b"ON"),
        ):
            user.client.publish(topic, payload, retain=True)
        user.next()
        with Running(config) as board:
            until(lambda: caplog.text.count("reason=retained") == 2)  # the 1st and the 2nd are logged
            user.client.publish(topics.frame(SITE, BOARD), photo(2), qos=0)
            assert board.next("new").camera == "door"
            assert board.events.empty()
            board.stop.set()
            summary = board.wait_ended()
    assert (summary["frames"], summary["rejected"]["retained"], summary["reply"]) == (1, 3, {})
    assert summary["setting"]["set"] == 0


def test_each_of_several_mqtt_cameras_has_a_topic_and_what_names_none_is_counted(board_bundle, broker, caplog):
    config = configuration(board_bundle, broker.port, "mqtt", paradigm="device")
    config = msgspec.structs.replace(config, cameras=tuple(CameraConfig(n, "mqtt") for n in ("front", "back")))
    with Running(config) as board, Listener(broker.port) as user:
        until(lambda: status(broker.port)["state"] == "online")
        for camera in (None, "attic", "back"):
            user.client.publish(topics.frame(SITE, BOARD, camera), photo(1), qos=0)
        assert board.next("new").camera == "back"
        user.client.publish(topics.frame(SITE, BOARD, "front"), photo(1), qos=0)
        assert board.next("new").camera == "front"
        board.stop.set()
        summary = board.wait_ended()
    assert (summary["frames"], summary["rejected"]["no_camera"]) == (2, 2)
    assert "publish pictures on aiflow/home/b1/down/frame/front or aiflow/home/b1/down/frame/back" in caplog.text


def test_both_brokers_have_the_same_status(board_bundle, start_broker, photos, hold_photos):
    far, near = start_broker(), start_broker()
    config = configuration(board_bundle, far.port, photos, paradigm="device")
    config = msgspec.structs.replace(config, local=MqttConfig(port=near.port, keepalive_s=2))
    with (
        Listener(far.port, topics.status(SITE, BOARD)) as far_user,
        Listener(near.port, topics.status(SITE, BOARD)) as near_user,
    ):
        with Running(config) as board:
            for user in (far_user, near_user):
                user.next()
            hold_photos.set()
            board.wait_ended()
        for user in (far_user, near_user):
            told = []
            while (now := json.loads(user.next()))["state"] == "online":
                told.append(now["cameras"]["door"])
            assert told[-1] == "ended"
    assert [status(broker.port)["state"] for broker in (far, near)] == ["offline", "offline"]


@pytest.mark.parametrize(("local", "connections"), [({}, 1), ({"host": "localhost"}, 1), ({"username": "b1-local"}, 2)])
def test_both_tables_may_name_one_broker(board_bundle, broker, photos, local, connections):
    near = MqttConfig(**{"port": broker.port, "keepalive_s": 2, **local})
    config = msgspec.structs.replace(configuration(board_bundle, broker.port, photos), local=near)
    with server(broker.port), Running(config) as board:
        summary = board.wait_ended()
    assert summary["answered"] == 3
    ends = summary["mqtt"].values()
    assert [(end["connects"], end["evictions"], end["losses"]) for end in ends] == connections * [(1, 0, 0)]
    assert status(broker.port)["state"] == "offline"


def test_a_changed_setting_is_applied_to_its_camera(board_bundle):
    board = Board(configuration(board_bundle, 1883, "mqtt"))

    def change(name: str, value: bytes) -> None:
        board.routers[-1].message_arrived(
            Message(topics.setting(SITE, BOARD, name), value, 1, False, None, lambda: None)
        )

    door = board.cameras["door"]
    change("door_motion", b"ON")
    assert door.gate.enabled
    change("door_enabled", b"OFF")
    assert not door.is_on
    change("door_enabled", b"ON")
    change("paused", b"ON")
    assert not door.is_on
    change("paused", b"OFF")
    assert door.is_on
    board.servers.close()


def test_a_metrics_port_that_is_taken_is_in_the_status_and_stops_no_camera(board_bundle, broker, photos, monkeypatch):
    monkeypatch.setattr("edge_runtime.reporting.metrics.MAX_PAUSE_S", 1.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        metrics = MetricsConfig(port=other.getsockname()[1])
        config = configuration(board_bundle, broker.port, photos, repeat=True, paradigm="device")
        with Running(msgspec.structs.replace(config, metrics=metrics)) as board:
            board.next("new")
            wanted = {"metrics": f"127.0.0.1:{metrics.port}: Address already in use"}
            until(lambda: status(broker.port).get("problems") == wanted)
            other.close()
            until(lambda: status(broker.port).get("problems") == {})


def test_frames_that_cannot_be_kept_are_in_the_status_and_stop_no_camera(board_bundle, broker, photos, tmp_path):
    place = tmp_path / "frames"
    place.write_text("a file")
    config = configuration(board_bundle, broker.port, photos, repeat=True, paradigm="device")
    with Running(msgspec.structs.replace(config, kept_frames=KeptFramesConfig(str(place), 0.0, 2))) as board:
        camera = board.next("new").camera
        wanted = {"kept_frames": f"{place / camera} takes no frames: Not a directory"}
        until(lambda: status(broker.port).get("problems") == wanted)
        place.unlink()
        until(lambda: status(broker.port).get("problems") == {})
        until(lambda: len(list((place / camera).glob("*.jpg"))) == 2)


def test_no_problem_is_forgotten_or_kept_when_two_parts_report_at_once(board_bundle):
    board = Board(configuration(board_bundle, 1, "mqtt", paradigm="offload"))
    board.report_problem("link", "no connection")
    other = threading.Thread(target=board.report_problem, args=("link", ""))

    class SlowText(str):
        def __bool__(self) -> bool:  # while the problems are written anew
            if other.ident is None:
                other.start()
                other.join(1.0)
            return True

    board.report_problem("metrics", SlowText("the port is taken"))
    other.join()
    assert board.problems == {"metrics": "the port is taken"}
    board.servers.close()


def test_a_stop_does_not_wait_for_answers(board_bundle, broker, photos):
    with Running(configuration(board_bundle, broker.port, photos, deadline_ms=600_000)) as board:
        until(lambda: board.events.qsize() == 3)
        board.stop.set()
        summary = board.wait_ended()
        assert all(board.next("lost").why.startswith("the board stops: no server") for _ in range(3))
    assert (summary["accepted"], summary["lost"]) == (3, 3)


def test_what_is_open_at_a_stop_is_still_published_as_lost(board_bundle, broker, photos):
    with Listener(broker.port, topics.event(SITE, BOARD)) as user:
        with Running(configuration(board_bundle, broker.port, photos)) as board:
            until(lambda: board.events.qsize() == 3)
        assert [decode_event(user.next()).type for _ in range(6)] == 3 * ["new"] + 3 * ["lost"]


@pytest.mark.parametrize(
    "name", [TABLES, INTER_TABLES, DRAFT_LABELS, "vocabulary.txt", "head.onnx", "draft_look.onnx", "draft_step.onnx"]
)
def test_a_missing_or_altered_file_is_found_at_start(board_bundle, tmp_path, photos, name):
    copy = Path(shutil.copytree(board_bundle.path, tmp_path / "copy"))
    config = configuration(replace(board_bundle, path=copy), 1883, photos, backend="onnx")
    before_any_frame = threading.Event()
    before_any_frame.set()
    (copy / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=f"{name} is not the file that the manifest names"):
        run_board(config, before_any_frame)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}: copy"):
        run_board(config, before_any_frame)


def test_a_source_that_can_never_work_ends_the_board_with_its_error(board_bundle, broker):
    with pytest.raises(ConfigError, match="is no tar"):
        run_board(configuration(board_bundle, broker.port, __file__), threading.Event())
    assert status(broker.port)["state"] == "offline"


def test_what_breaks_a_board_after_its_start_is_no_error_of_its_configuration(
    board_bundle, broker, photos, monkeypatch
):
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("edge_runtime.pipeline.to_input", broken)
    with pytest.raises(RuntimeError, match="the board broke while it ran"):
        run_board(configuration(board_bundle, broker.port, photos), threading.Event())
    assert status(broker.port)["state"] == "offline"


@pytest.fixture
def config_file(board_bundle: Bundle, broker: Mosquitto, photos: str, tmp_path: Path) -> Path:
    path = tmp_path / "board.toml"
    path.write_text(
        f'[board]\nid = "{BOARD}"\nbundle = "{board_bundle.path}"\n'
        f'[[cameras]]\nname = "door"\nsource = "{photos}"\nrepeat = true\ninterval_s = 0.05\n'
        f"[mqtt]\nport = {broker.port}\n"
    )
    return path


def aiflow_run(config_file: Path) -> "subprocess.Popen[bytes]":
    code = "import sys; from firmware_tools.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, "run", config_file], stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_aiflow_run_stops_cleanly_on_a_signal(config_file, broker, number):
    with Listener(broker.port, topics.event(SITE, BOARD)) as user, aiflow_run(config_file) as process:
        try:
            user.next()
            process.send_signal(number)
            _, log = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == os.EX_OK
    assert re.search(rb"board stopped accepted=\d+ .*mqtt\{servers,published\}=\d+", log)
    assert not re.search(rb"board stopped .*=0( |$)", log, re.MULTILINE)
    assert b"Traceback" not in log
    assert status(broker.port)["state"] == "offline"


@pytest.mark.parametrize("state", ["broker away", "login refused"])
def test_aiflow_run_stops_cleanly_in_every_state_of_its_connection(config_file, broker, state, start_broker):
    if state == "login refused":
        other = start_broker(PLAIN.replace("allow_anonymous true", "allow_anonymous false"))
        config_file.write_text(config_file.read_text().replace(str(broker.port), str(other.port)))
    else:
        broker.kill()
    with aiflow_run(config_file) as process:
        try:
            assert process.stderr is not None
            seen = b""
            while b"mqtt offline" not in seen:
                seen += process.stderr.readline()
            process.send_signal(signal.SIGHUP)
            _, log = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == os.EX_OK
    assert b"board stopped" in log


def test_a_backend_that_is_not_installed_is_named(board_bundle, photos, monkeypatch):
    monkeypatch.setattr("edge_runtime.inference.backends.find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"pip install '.*\[litert\]'"):
        run_board(configuration(board_bundle, 1883, photos, backend="litert"), threading.Event())
