"""What people read while a board runs."""

import subprocess
import sys
from datetime import datetime, timezone

import msgspec
import pytest

from edge_runtime.config import MqttConfig
from edge_runtime.mqtt.client import MqttClient
from edge_runtime.wire import AnsweredBy, Event, Explain, encode_event
from firmware_tools.watch import line

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


def test_a_new_event_says_what_was_chosen_and_why():
    assert line("b1", NEW) == (
        "12:30:05  b1/door  new     a dog runs  [device, 412 B, 11 ms]  speculative: draft 3 ms saves 5 passes of 2 ms"
    )


def test_an_update_that_is_not_final_says_so_and_the_reason_is_not_repeated():
    update = msgspec.structs.replace(NEW, type="update", answered_by=AnsweredBy("edge", "e1"), after_ms=60.0)
    assert line("b1", update).endswith("update  a dog runs  [for now, edge, 412 B, 60 ms]")
    assert line("b1", msgspec.structs.replace(update, final=True)).endswith("[edge, 412 B, 60 ms]")


def test_a_loss_without_a_draft_says_why():
    lost = msgspec.structs.replace(NEW, type="lost", final=True, text="", answered_by=None, why="no reply to 2 sent")
    assert "lost    (no reply to 2 sent)  [nobody," in line("b1", lost)


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
        command = [sys.executable, "-m", "firmware_tools", "watch", "--port", str(broker.port), "--count", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (shown,) = done.stdout.splitlines()
    assert text in shown
