"""Which snapshot belongs to which event of Frigate, and that each event ends once."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.capture.frigate_events import MAX_EVENTS, MAX_SNAPSHOT_BYTES, MAX_SNAPSHOTS, FrigateEvents
from edge_runtime.capture.frigate_messages import (
    MAX_MESSAGE,
    FrigateMessageError,
    ObjectChange,
    ReviewChange,
    read_message,
)
from tests.frigate import change, review

ONE, TWO = "1607123955.475377-mxklsc", "1607123957.120000-abcdef"


def events(wait_s: float = 5.0) -> FrigateEvents:
    return FrigateEvents(wait_s)


def tell(frigate: FrigateEvents, now: float, kind: str, event: str, label: str = "person", age_s: float = 1.0) -> None:
    frigate.object_changed(read_message(change(kind, event, label, age_s=age_s), ObjectChange), now)


def taken(frigate: FrigateEvents, now: float) -> list[tuple[str, bytes]]:
    """Every event that is due, with its snapshot."""
    found = []
    while pair := frigate.take(now):
        found.append((pair[0].event, pair[1].data))
    return found


def test_an_event_waits_for_its_best_snapshot_and_is_taken_once():
    frigate = events(wait_s=5.0)
    frigate.snapshot_arrived("person", b"first", 99.2)  # before Frigate was sure that it is a person
    tell(frigate, 100.0, "new", ONE, age_s=1.0)
    frigate.snapshot_arrived("person", b"better", 101.0)
    assert (taken(frigate, 104.9), frigate.next_due()) == ([], 105.0)
    assert taken(frigate, 105.0) == [(ONE, b"better")]
    frigate.snapshot_arrived("person", b"later", 106.0)
    tell(frigate, 107.0, "update", ONE)
    tell(frigate, 108.0, "end", ONE)
    assert taken(frigate, 1000.0) == []
    assert frigate.counts == {"begun": 1, "taken": 1, "no_snapshot": 0, "dropped": 0, "missed": 0}


def test_a_snapshot_from_before_frigate_was_sure_of_the_object_is_the_events():
    frigate = events(wait_s=0.0)
    frigate.snapshot_arrived("person", b"only", 97.1)
    tell(frigate, 100.0, "new", ONE, age_s=3.0)
    assert taken(frigate, 100.0) == [(ONE, b"only")]


def test_an_event_that_ends_is_taken_at_once():
    frigate = events(wait_s=600.0)
    tell(frigate, 100.0, "new", ONE)
    frigate.snapshot_arrived("person", b"best", 100.5)
    tell(frigate, 101.0, "end", ONE)
    assert frigate.next_due() < 101.0
    assert taken(frigate, 101.0) == [(ONE, b"best")]
    assert frigate.open == 0


@pytest.mark.parametrize(
    ("label", "arrived"), [("car", 100.5), ("person", 98.0)], ids=["another label", "before it came into view"]
)
def test_a_snapshot_of_something_else_is_not_the_events(label, arrived):
    frigate = events()
    frigate.snapshot_arrived(label, b"other", arrived)
    tell(frigate, 100.0, "new", ONE, age_s=1.0)
    assert taken(frigate, 200.0) == []
    tell(frigate, 201.0, "end", ONE)
    assert frigate.counts["no_snapshot"] == 1


def test_an_event_without_a_snapshot_is_taken_with_the_first_that_comes():
    frigate = events(wait_s=1.0)
    tell(frigate, 100.0, "new", ONE)
    assert taken(frigate, 150.0) == []
    frigate.snapshot_arrived("person", b"late", 160.0)  # it has entered one of the zones that Frigate requires
    assert taken(frigate, 160.0) == [(ONE, b"late")]


def test_of_two_objects_with_one_label_each_has_its_own_snapshot():
    frigate = events(wait_s=5.0)
    tell(frigate, 100.0, "new", ONE, age_s=1.0)
    frigate.snapshot_arrived("person", b"one", 100.1)
    frigate.snapshot_arrived("person", b"two", 102.5)
    tell(frigate, 103.0, "new", TWO, age_s=0.5)
    assert taken(frigate, 200.0) == [(ONE, b"one"), (TWO, b"two")]


def test_two_objects_that_come_into_view_together_share_a_snapshot():
    frigate = events()
    tell(frigate, 100.0, "new", ONE, age_s=1.0)
    tell(frigate, 100.01, "new", TWO, age_s=1.0)
    frigate.snapshot_arrived("person", b"both", 100.2)
    assert taken(frigate, 200.0) == [(ONE, b"both"), (TWO, b"both")]


def test_an_event_has_its_review_item_and_its_severity():
    frigate = events(wait_s=0.0)
    frigate.review_changed(read_message(review("1718987129.3-fqk5ka", ONE, severity="detection"), ReviewChange))
    frigate.review_changed(read_message(review("1718987129.3-fqk5ka", ONE, TWO), ReviewChange))
    tell(frigate, 100.0, "new", ONE)
    frigate.snapshot_arrived("person", b"x", 100.0)
    found = frigate.take(100.0)
    assert found
    assert (found[0].review, found[0].severity, found[0].label) == ("1718987129.3-fqk5ka", "alert", "person")


def test_what_a_hostile_broker_sends_is_bounded():
    frigate = events(wait_s=600.0)
    unused = 0
    for number in range(3 * MAX_EVENTS):
        tell(frigate, 100.0, "new", f"1.{number}-a")
        unused += frigate.snapshot_arrived("person", bytes(MAX_SNAPSHOT_BYTES // 4), 100.0)
    assert (frigate.open, frigate.counts["dropped"]) == (MAX_EVENTS, 2 * MAX_EVENTS)
    assert unused == 3 * MAX_EVENTS - 4
    for _ in range(2 * MAX_SNAPSHOTS):
        unused += frigate.snapshot_arrived("person", b"", 100.0)
    assert unused + frigate.clear() == 3 * MAX_EVENTS + 2 * MAX_SNAPSHOTS


def test_the_end_of_an_event_that_began_before_the_board_is_counted():
    frigate = events()
    tell(frigate, 100.0, "update", ONE)
    tell(frigate, 101.0, "end", ONE)
    assert (frigate.counts["begun"], frigate.counts["missed"]) == (0, 1)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["new", "update", "end", "snapshot", "take", "clear"]),
        st.integers(0, 4),
        st.sampled_from(["person", "car"]),
        st.floats(0, 3),
    ),
    max_size=60,
)


@given(STEPS, st.sampled_from([0.0, 2.0, 600.0]))
@settings(max_examples=200)
def test_every_event_and_every_snapshot_ends_once(steps, wait_s):
    frigate, now, arrived, unused, used = events(wait_s), 100.0, 0, 0, set()
    for kind, number, label, passed in steps:
        now += passed
        if kind == "snapshot":
            arrived += 1
            unused += frigate.snapshot_arrived(label, b"%d" % arrived, now)
        elif kind == "take":
            used |= {data for _, data in taken(frigate, now)}
        elif kind == "clear":
            unused += frigate.clear()
        else:
            tell(frigate, now, kind, f"1.{number}-a", label)
        counts = frigate.counts
        assert counts["begun"] == counts["taken"] + counts["no_snapshot"] + counts["dropped"] + frigate.open
    assert unused + frigate.clear() + len(used) == arrived


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_named_error(payload):
    for kind in (ObjectChange, ReviewChange):
        with suppress(FrigateMessageError):
            read_message(payload, kind)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"new"', b'"old"'),
        (ONE.encode(), b"../../login"),
        (ONE.encode(), b"x" * 65),
        (b'"person"', b'"' + b"p" * 65 + b'"'),
        (b'"start_time": 1607123955.475377', b'"start_time": -1'),
        (b'"camera"', b'"kamera"'),
    ],
)
def test_a_message_with_a_field_out_of_its_bounds_is_refused(old, new):
    message = change("new", ONE)
    read_message(message, ObjectChange)
    assert old in message
    with pytest.raises(FrigateMessageError, match="not a message of Frigate's"):
        read_message(message.replace(old, new), ObjectChange)


def test_a_message_that_is_too_long_is_refused_unread():
    with pytest.raises(FrigateMessageError, match="at most 262144 are read"):
        read_message(b" " * (MAX_MESSAGE + 1), ObjectChange)
