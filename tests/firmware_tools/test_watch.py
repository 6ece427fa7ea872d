"""The lines that people read while a board runs."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone

import msgspec
import pytest

from edge_runtime.mqtt import MqttClient, MqttConfig
from edge_runtime.wire import AnsweredBy, Event, Explain, encode_event
from firmware_tools.watch import MAX_WAITING, Lines, line

NEW = Event(
    type="new",
    frame="0123",
    camera="door",
    captured=datetime(2024, 5, 1, 12, 30, 5, tzinfo=timezone.utc),
    text="a dog runs",
    answered_by=AnsweredBy("device"),
    bytes_up=412,
    after_ms=11.2,
    explain=Explain("speculative", "speculative: draft 3 ms saves 5 passes of 2 ms"),
)


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch):
    """In a time zone two hours east of Greenwich, in summer."""
    monkeypatch.setenv("TZ", "CET-1CEST")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_new_event_says_what_was_chosen_and_why_in_local_time():
    assert line("b1", NEW) == (
        "14:30:05  b1/door  new     a dog runs  [device, 412 B, 11 ms]  speculative: draft 3 ms saves 5 passes of 2 ms"
    )


def test_an_update_that_is_not_final_says_so_and_the_reason_is_not_repeated():
    update = msgspec.structs.replace(NEW, type="update", answered_by=AnsweredBy("edge", "e1"), after_ms=60.0)
    assert line("b1", update).endswith("update  a dog runs  [for now, edge, 412 B, 60 ms]")
    assert line("b1", msgspec.structs.replace(update, final=True)).endswith("[edge, 412 B, 60 ms]")
    assert line("b1", msgspec.structs.replace(update, final=True, unsure=True)).endswith("[edge, unsure, 412 B, 60 ms]")
    assert line("b1", msgspec.structs.replace(update, final=True, cut=True)).endswith("[edge, cut, 412 B, 60 ms]")


@pytest.mark.parametrize(("valid", "mark"), [(None, ""), (True, ""), (False, ", not valid")])
def test_an_answer_that_does_not_match_the_schema_of_its_prompt_is_marked(valid, mark):
    update = msgspec.structs.replace(NEW, type="update", final=True, after_ms=60.0, valid=valid)
    assert line("b1", update).endswith(f"[device{mark}, 412 B, 60 ms]")


@pytest.mark.parametrize(("text", "shown"), [("", "(no text)"), ("a dog runs", "a dog runs")])
def test_a_loss_says_why(text, shown):
    lost = msgspec.structs.replace(NEW, type="lost", final=True, text=text, why="no reply to 2 sent")
    assert f"lost    {shown}  [device, " in line("b1", lost)
    assert line("b1", lost).endswith("]  no reply to 2 sent")


def test_a_draft_that_was_accepted_says_so_and_an_answer_how_much_of_the_draft_it_kept():
    accepted = msgspec.structs.replace(NEW, final=True, paradigm="device", why="draft accepted: confidence 0.91")
    assert line("b1", accepted).endswith("]  draft accepted: confidence 0.91")
    verified = msgspec.structs.replace(NEW, type="update", final=True, accepted=3, proposed=5)
    assert line("b1", verified).endswith("]  3 of 5 proposed tokens accepted")


def test_labels_and_taught_answers_are_shown_by_the_likeliest():
    scores, answers = {"tabby cat": 0.7, "sink": 0.2}, {"gate": {"open": 0.1, "shut": 0.9}}
    shown = line("b1", msgspec.structs.replace(NEW, scores=scores, answers=answers))
    assert "a dog runs  label: tabby cat 70 %  gate: shut 90 %  [device" in shown


@pytest.mark.parametrize("field", ["text", "camera"])
def test_what_a_stranger_wrote_cannot_steer_the_terminal(field):
    assert "\x1b" not in line("b1", msgspec.structs.replace(NEW, **{field: "\x1b[2J"}))


def test_an_event_is_one_line_where_the_output_is_no_terminal(broker):
    text = "a dog runs " * 30
    settings = MqttConfig(port=broker.port).settings("board")
    with MqttClient(settings) as board:
        event = encode_event(msgspec.structs.replace(NEW, text=text))
        board.publish("aiflow/home/b1/up/event", event, retain=True)  # there, whenever the watcher comes
        assert board.wait_online(20.0)
        command = [sys.executable, "-m", "firmware_tools", "watch", "--broker-port", str(broker.port), "--count", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (shown,) = done.stdout.splitlines()
    assert text in shown
    assert shown.endswith("(retained by the broker, not live)")


@pytest.mark.parametrize("year", [1, 9999])
@pytest.mark.parametrize("zone", ["AAA12", "AAA-12"])
def test_a_forged_time_that_no_zone_can_show_is_shown_as_it_is(year, zone, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    for moment in (datetime(year, 1, 1, tzinfo=timezone.utc), datetime(year, 12, 31, 23, tzinfo=timezone.utc)):
        assert "b1/door" in line("b1", msgspec.structs.replace(NEW, captured=moment))


FORGED = [b"", b"\xff", b"[]", b'{"type":"new"}', b"[" * 50_000, encode_event(NEW).replace(b"2024", b"0001")]


def test_forged_events_do_not_end_it(broker):
    command = [sys.executable, "-m", "firmware_tools", "watch", "--broker-port", str(broker.port), "--count", "2"]
    topics = [f"aiflow/home/b{number}/up/event" for number in range(len(FORGED) + 1)]
    with MqttClient(MqttConfig(port=broker.port).settings("board")) as board:
        assert board.wait_online(20.0)
        for topic, event in zip(topics, [*FORGED, encode_event(NEW)], strict=True):
            board.publish(topic, event, retain=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Traceback" not in done.stderr
    assert sum("a dog runs" in shown for shown in done.stdout.splitlines()) == 2


def test_it_ends_quietly_when_its_reader_does(broker):
    command = [sys.executable, "-m", "firmware_tools", "watch", "--broker-port", str(broker.port)]
    with (
        MqttClient(MqttConfig(port=broker.port).settings("board")) as board,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch,
    ):
        board.publish("aiflow/home/b1/up/event", encode_event(NEW), retain=True)
        assert watch.stdout is not None
        assert b"a dog runs" in watch.stdout.readline()
        watch.stdout.close()
        while watch.poll() is None:
            board.publish("aiflow/home/b1/up/event", encode_event(NEW))
            time.sleep(0.01)
        assert watch.stderr is not None
        assert (watch.returncode, watch.stderr.read()) == (0, b"")


def test_a_site_where_nobody_publishes_is_told_with_its_topic(broker):
    command = [sys.executable, "-m", "firmware_tools", "watch", "--broker-port", str(broker.port), "--site", "hmoe"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stderr is not None
        assert "nothing has been published on aiflow/hmoe/+/up/event yet" in watch.stderr.readline()
        watch.kill()


def test_a_broker_that_is_never_reached_is_told_with_its_address():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and says nothing
        port = silent.getsockname()[1]
        command = [sys.executable, "-m", "firmware_tools", "watch", "--broker-port", str(port)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watch:
            assert watch.stderr is not None
            assert f"no connection to 127.0.0.1:{port} yet: are --broker" in watch.stderr.readline()
            watch.kill()


def test_a_reader_that_stops_holds_up_nobody_and_is_told_what_it_missed(monkeypatch):
    read, write = os.pipe()
    with os.fdopen(write, "w") as stdout, os.fdopen(read) as reader:
        monkeypatch.setattr(sys, "stdout", stdout)
        with Lines() as lines:
            text = "x" * 4096  # so that the pipe is full long before the queue
            for _ in range(2 * MAX_WAITING):
                lines.put(text)  # and returns
            shown: list[str] = []
            reading = threading.Thread(target=lambda: shown.extend(reader), daemon=True)
            reading.start()
            while len(shown) < MAX_WAITING:
                time.sleep(0.01)
            lines.put("the last line")
        stdout.close()
        reading.join(20.0)
    missed = [int(found[1]) for text in shown if (found := re.match(r"\((\d+) lines were not shown", text))]
    assert sum(missed) + sum(text.startswith("x") for text in shown) == 2 * MAX_WAITING
    assert shown[-1] == "the last line\n"


def test_what_a_terminal_cannot_spell_is_replaced(broker):
    event = encode_event(msgspec.structs.replace(NEW, text="Straße \N{DOG}"))
    command = [sys.executable, "-m", "firmware_tools", "watch", "--broker-port", str(broker.port), "--count", "1"]
    with MqttClient(MqttConfig(port=broker.port).settings("board")) as board:
        board.publish("aiflow/home/b1/up/event", event, retain=True)
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment)
    assert b"Stra?e ?" in done.stdout


@pytest.mark.parametrize("board", ["a/b", "#", ""])
def test_a_board_that_cannot_be_one_is_refused(board):
    command = [sys.executable, "-m", "firmware_tools", "watch", "--board", board]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "want 1 to 32 of the characters a-z, 0-9 and -" in done.stderr
