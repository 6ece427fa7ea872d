"""When a trigger tells, and when it does not."""

import json
import threading
from datetime import datetime, timezone

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.reporting.events import Events
from edge_runtime.reporting.trigger import Trigger
from edge_runtime.wire import Event
from edge_runtime.wire.event import MAX_EVENT, Explain, Reuse

OPEN, CLOSED = {"open": 0.95, "closed": 0.05}, {"open": 0.1, "closed": 0.9}


def answer(number: int, gate: dict[str, float] | None, **changes: object) -> Event:
    """The final answer to a frame."""
    event = Event(
        type="update",
        frame=f"{number:016x}",
        camera="yard",
        captured=datetime(2026, 1, 1, tzinfo=timezone.utc),
        final=True,
        answers={} if gate is None else {"gate": gate},
    )
    return msgspec.structs.replace(event, **changes)


def told(trigger: Trigger, gates: list[dict[str, float] | None]) -> list[int]:
    return [i for i, gate in enumerate(gates, start=1) if trigger.step(answer(i, gate))]


def test_it_tells_once_when_the_condition_becomes_true_and_again_after_it_was_false() -> None:
    gates = [CLOSED, OPEN, OPEN, OPEN, CLOSED, OPEN]
    assert told(Trigger("gate == open"), gates) == [2, 6]
    assert told(Trigger("gate == open for 2 frames"), gates) == [3]
    assert told(Trigger("gate == open for 3 frames"), gates) == [4]
    assert told(Trigger("gate == open for 4 frames"), gates) == []
    assert told(Trigger("gate == open"), [OPEN]) == [1]  # true from the start


def test_frames_without_an_answer_neither_count_nor_reset() -> None:
    trigger = Trigger("gate == open for 2 frames")
    assert not trigger.step(answer(1, OPEN))
    for i, not_an_answer in enumerate(
        [
            answer(2, None),  # a server without this question
            answer(3, {}),
            answer(4, CLOSED, type="lost"),
            answer(5, CLOSED, type="new"),  # the device alone
            answer(6, CLOSED, final=False),  # a higher tier is still asked
        ]
    ):
        assert not trigger.step(not_an_answer), i
    assert trigger.step(answer(7, OPEN))


def test_an_answer_that_is_used_again_counts_for_the_later_frame() -> None:
    trigger = Trigger("gate == open for 2 frames")
    again = answer(2, OPEN, type="new", reuse=Reuse("1", 0.1))
    assert [trigger.step(answer(1, OPEN)), trigger.step(again)] == [False, True]


def test_an_answer_that_comes_late_changes_nothing() -> None:
    trigger = Trigger("gate == open for 2 frames")
    assert [trigger.step(answer(number, gate)) for number, gate in ((5, OPEN), (3, OPEN), (4, CLOSED), (6, OPEN))] == [
        *(False, False, False),
        True,
    ]
    assert not trigger.step(answer(6, CLOSED))  # the same frame once more
    assert not trigger.step(answer(7, OPEN))  # still true


def test_labels_are_answers_too() -> None:
    trigger = Trigger("label == dog and confidence > 0.5")
    assert not trigger.step(answer(1, None))
    assert not trigger.step(answer(2, None, label="cat", scores={"cat": 0.6, "dog": 0.4}))
    assert trigger.step(answer(3, None, label="dog", scores={"dog": 0.7}))


@given(st.lists(st.sampled_from([OPEN, CLOSED, None]), max_size=40), st.integers(1, 4))
def test_it_tells_at_the_nth_true_frame_in_a_row_whatever_lies_between(gates: list, frames: int) -> None:
    counted = [(i, gate) for i, gate in enumerate(gates, start=1) if gate is not None]
    expected, row = [], 0
    for i, gate in counted:
        row = row + 1 if gate is OPEN else 0
        expected += [i] * (row == frames)
    assert told(Trigger(f"gate == open for {frames} frames"), gates) == expected


class Topic:
    """Keeps what a client was asked to publish."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict]] = []

    def publish(self, topic: str, payload: bytes, **_: object) -> None:
        self.sent.append((topic.rpartition("/")[2], json.loads(payload)))


def test_the_event_of_a_trigger_comes_before_the_frames_final_one() -> None:
    client = Topic()
    events = Events(client, "home", "b1", triggers={"yard": [Trigger("gate == open"), Trigger("gate != open")]})
    details = {"text": "a gate", "tokens": (5, 6), "explain": Explain("split", "fast"), "timings_ms": {"head": 1.0}}
    events.publish(answer(1, OPEN, **details))
    kinds = [(topic, event["type"], event.get("final", False)) for topic, event in client.sent]
    assert kinds == [
        *(("event", "trigger", False), ("last", "trigger", False)),
        *(("event", "update", True), ("last", "update", True)),
    ]
    news = client.sent[0][1]
    assert (news["trigger"], news["text"], news["answers"]) == ("gate == open", "a gate", {"gate": OPEN})
    assert not {"tokens", "explain", "timings_ms", "hops"} & news.keys()
    assert events.triggered == 1
    events.publish(answer(2, OPEN, camera="door"))  # another camera's
    assert len(client.sent) == 6


def test_two_threads_with_answers_of_one_camera_tell_a_condition_once() -> None:
    """Answers of servers come on one thread, those that are used again on another."""
    events = Events(Topic(), "home", "b1", triggers={"yard": [Trigger("gate == open")]})
    other = threading.Thread(target=events.publish, args=(answer(2, OPEN),))

    class SlowAnswer(dict[str, float]):
        def __getitem__(self, name: str) -> float:  # while the condition is looked at
            if other.ident is None:
                other.start()
                other.join(1.0)
            return super().__getitem__(name)

    events.publish(answer(1, SlowAnswer(CLOSED), type="new", reuse=Reuse("1", 0.1)))
    other.join()
    events.publish(answer(3, OPEN))
    assert events.triggered == 1


def test_an_answer_that_fills_its_event_is_told_whether_the_trigger_fits_or_not(caplog) -> None:
    client = Topic()
    events = Events(client, "home", "b1", triggers={"yard": [Trigger("gate == open" + " " * 200)]})
    text, why = "\u2764" * 8192, "\u2764" * 1024
    answers = {f"q{i}": {f"{'c' * 50}{k}": 0.5 for k in range(64)} for i in range(5)} | {"gate": OPEN}
    full = answer(1, None, text=text, why=why, answers=answers)
    pad = dict.fromkeys((f"{'z' * 40}{k}" for k in range(64)), 0.5)
    for i in range(99):
        left = MAX_EVENT - len(msgspec.json.encode(full))
        more = dict(list(pad.items())[: min(64, (left - 100) // 60)])
        if not more:
            break
        full = msgspec.structs.replace(full, answers=full.answers | {f"pad{i}": more})
    assert 0 <= left < 200  # less than the condition takes
    events.publish(full)
    assert [event["type"] for _, event in client.sent] == ["update", "update"]
    assert "trigger not told" in caplog.text


def test_a_class_that_a_question_does_not_have_is_told_once(caplog) -> None:
    events = Events(Topic(), "home", "b1", triggers={"yard": [Trigger("gate == opne or label == dog")]})
    events.publish(answer(1, None, label="cat", scores={"cat": 1.0}))
    assert not caplog.text
    for number in range(2, 5):
        events.publish(answer(number, OPEN, label="cat", scores={"cat": 1.0}))
    assert caplog.text.count("none of its classes: open, closed") == 1
