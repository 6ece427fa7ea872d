"""The measurements, over known traffic, lying servers and arbitrary values."""

import json
import math
import threading
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning import Measurements, Snapshot
from edge_runtime.planning.link_estimator import MAX_OPEN
from edge_runtime.planning.measurements import QUEUE
from edge_runtime.planning.server_status import CLAIM_AGE_S
from edge_runtime.planning.thermal import ThermalState
from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.wire import Hop, Reply, Status, Tier, encode_tokens, topics

STAGES = {"resize": 1.0, "head": 4.0, "draft": 3.0, "encode": 0.5}
TEXT = tuple(range(4, 14))


def reply_to(number: int, *, hops: tuple[Hop, ...] | None = None, **fields_of: object) -> Reply:
    if hops is None:
        server = str(fields_of.get("server", "server"))
        hops = (Hop(Tier.EDGE, server, 2.0, 20.0, {"tail": 4.0, "passes": 16.0}),)
    values = {"tokens": encode_tokens(TEXT), "passes": 10} | fields_of
    return Reply(id=number.to_bytes(8, "big"), status=Status.OK, hops=hops, **values)


def exchange(measurements: Measurements, number: int, paradigm="split", size=430, total_ms=100.0, draft=(), **reply_of):
    """A request at second `number` and its answer."""
    measurements.sent(number.to_bytes(8, "big"), paradigm, size, float(number))
    measurements.snapshot(float(number))
    measurements.answered(reply_to(number, **reply_of), number + total_ms / 1e3, draft)
    return measurements.snapshot(number + total_ms / 1e3)


def values_of(snapshot: Snapshot) -> list[object]:
    """All numbers of its parts."""
    parts = (snapshot.link, snapshot.server, snapshot.board)
    return [getattr(part, field.name) for part in parts for field in fields(part)]


def status_of(server: str = "a", state: str = "online", **others: object) -> bytes:
    return json.dumps({"state": state, "server": server, **others}).encode()


def topic(server: str) -> str:
    return topics.server_status("home", server)


def test_nothing_is_known_at_the_start():
    snapshot = Measurements().snapshot(0.0)
    assert snapshot == Snapshot()
    assert all(value in (None, 0, {}) for value in values_of(snapshot))


def test_the_time_of_a_reply_is_split_into_network_queue_work_and_passes():
    snapshot = exchange(Measurements(), 0, total_ms=122.0)
    assert snapshot.link.estimate.likely_ms(430) == pytest.approx(100.0)
    assert (snapshot.server.queue_ms, snapshot.server.server_ms, snapshot.server.pass_ms) == pytest.approx(
        (2.0, 4.0, 1.6)
    )
    assert snapshot.server.kind_pass_ms == {"plain": pytest.approx(1.6)}
    assert (snapshot.server.plain_passes, snapshot.server.drafted_passes, snapshot.link.answers) == (10, None, 1)


def test_a_servers_work_on_pictures_is_measured_separately():
    measurements = Measurements()
    exchange(measurements, 0)
    hop = Hop(Tier.EDGE, "server", 0.0, 30.0, {"passes": 16.0})
    snapshot = exchange(measurements, 1, "offload", 12_600, 200.0, hops=(hop,))
    assert (snapshot.server.server_ms, snapshot.server.picture_server_ms) == (4.0, 14.0)
    assert snapshot.link.request_bytes == {"split": 430, "offload": 12_600}


def test_a_servers_work_is_known_by_way_of_decoding_for_a_minute_and_in_general_for_longer():
    measurements = Measurements()
    exchange(measurements, 0)
    hop = Hop(Tier.EDGE, "server", 0.0, 26.0, {"passes": 16.0})
    snapshot = exchange(measurements, 1, "speculative", passes=3, hops=(hop,))
    assert snapshot.server.kind_server_ms == {"plain": 4.0, "drafted": 10.0}
    later = measurements.snapshot(70.0)
    assert (later.server.kind_server_ms, later.server.server_ms) == ({}, 7.0)


def test_stages_are_running_medians_and_the_encoding_of_pictures_is_separate():
    measurements = Measurements()
    for number in range(5):
        measurements.frame_handled("split", STAGES | {"head": 400.0 if number == 2 else 4.0}, float(number))
    measurements.frame_handled("offload", {"resize": 1.0, "encode": 7.0}, 5.0)
    snapshot = measurements.snapshot(5.0)
    assert (
        snapshot.board.head_ms,
        snapshot.board.encode_ms,
        snapshot.board.picture_ms,
        snapshot.board.interval_ms,
    ) == (4.0, 0.5, 7.0, 1000.0)
    assert snapshot.board.cpu_share == pytest.approx(0.0085)


def test_a_draft_that_was_not_sent_is_compared_with_the_verified_text():
    agreeing = (*TEXT[:6], 3, 3, 3, 3)
    snapshot = exchange(Measurements(), 0, "split", draft=agreeing)
    assert (snapshot.server.accepted_share, snapshot.server.drafted_passes, snapshot.server.tokens) == (0.6, 5.0, 10)
    snapshot = exchange(Measurements(), 0, "speculative", draft=agreeing, accepted=8, proposed=10, passes=3)
    assert (snapshot.server.accepted_share, snapshot.server.drafted_passes) == (0.8, 3.0)


def test_passes_of_a_text_without_tokens_are_learned_with_and_without_a_draft_that_went_with_the_picture():
    measurements, foreign = Measurements(), {"tokens": b"", "text": "a text of another vocabulary"}
    exchange(measurements, 0, "offload", passes=30, **foreign)
    snapshot = exchange(measurements, 1, "offload", passes=4, proposed=7, accepted=6, **foreign)
    assert (snapshot.server.plain_passes, snapshot.server.drafted_passes) == (30.0, 4.0)
    assert set(snapshot.server.kind_pass_ms) == {"plain", "drafted"}
    assert measurements.counts["passes_refused"] == 0
    exchange(measurements, 2, "offload", passes=5000, **foreign)
    assert measurements.counts["passes_refused"] == 1


def test_losses_count_until_a_reply_comes():
    measurements = Measurements()
    for number in range(3):
        measurements.sent(number.to_bytes(8, "big"), "split", 430, float(number))
        measurements.lost(number.to_bytes(8, "big"), number + 0.5)
    snapshot = measurements.snapshot(3.0)
    assert (snapshot.link.losses_in_row, snapshot.link.reply_loss) == (3, 1.0)
    snapshot = exchange(measurements, 3)
    assert (snapshot.link.losses_in_row, snapshot.link.reply_loss) == (0, 0.75)
    assert measurements.snapshot(100.0).link.reply_loss is None  # too long ago to say anything


def test_an_open_request_shows_how_slow_the_link_is_before_its_reply():
    measurements = Measurements()
    for number in range(5):
        exchange(measurements, number, total_ms=30.0)
    measurements.sent(b"overdue!", "split", 430, 5.0)
    assert measurements.snapshot(5.01).link.estimate.likely_ms(430) < 20
    assert measurements.snapshot(6.0).link.estimate.likely_ms(430) > 900


def test_the_snapshot_has_the_bytes_spent():
    budget = ByteBudget()
    for now in (10.0, 12.0):
        assert budget.take(400, now)
    snapshot = Measurements(budget.spent).snapshot(26.0)
    assert (snapshot.link.bytes_last_minute, snapshot.link.bytes_last_quarter) == (800, 400)


def test_a_reply_with_more_passes_than_tokens_is_counted_and_its_passes_are_ignored():
    measurements = Measurements()
    before = exchange(measurements, 0)
    after = exchange(measurements, 1, passes=4_000_000_000)
    assert (after.server.plain_passes, after.server.pass_ms) == (before.server.plain_passes, before.server.pass_ms)
    assert measurements.counts["passes_refused"] == 1


def test_a_server_that_was_slow_with_pictures_is_forgotten_after_a_minute():
    measurements = Measurements()
    slow = Hop(Tier.EDGE, "server", 0.0, 900.0, {"passes": 16.0})
    assert exchange(measurements, 0, "offload", 12_600, 1000.0, hops=(slow,)).server.picture_server_ms == 884.0
    assert measurements.snapshot(62.0).server.picture_server_ms is None


def test_a_server_that_claims_to_have_worked_longer_than_the_board_waited_is_counted_and_ignored():
    measurements = Measurements()
    snapshot = exchange(measurements, 0, total_ms=50.0, hops=(Hop(Tier.EDGE, "liar", 0.0, 1e9),))
    assert (snapshot.link.estimate, snapshot.server.server_ms, snapshot.link.answers) == (None, None, 1)
    assert measurements.counts["hops_refused"] == 1


def test_the_prices_of_a_status_are_used_until_there_are_replies():
    measurements = Measurements()
    measurements.status_arrived(topic("a"), status_of(price_ms={"batch": 50.0, "pass": 3.0}, queue={"waiting": 2}), 0.0)
    snapshot = measurements.snapshot(1.0)
    assert (snapshot.server.pass_ms, snapshot.server.queue_ms) == (3.0, 50.0)
    snapshot = exchange(measurements, 2)
    assert (snapshot.server.pass_ms, snapshot.server.queue_ms) == (1.6, 2.0)


def test_a_status_that_contradicts_what_was_measured_is_counted_and_changes_nothing(caplog):
    measurements = Measurements()
    before = exchange(measurements, 0)
    for second in range(3):
        measurements.status_arrived(
            topic("liar"), status_of("liar", price_ms={"batch": 1e9, "pass": 1e9}), 1.0 + second
        )
    after = measurements.snapshot(4.0)
    assert (after.server.pass_ms, after.server.queue_ms) == (before.server.pass_ms, before.server.queue_ms)
    assert measurements.counts["status_contradicted"] == 3
    assert [record.message for record in caplog.records if "liar" in record.message] != []
    assert len(caplog.records) == 1  # a fault that repeats is logged once


def test_the_link_is_offline_if_all_servers_left_until_one_answers():
    measurements = Measurements()
    for server in "ab":
        measurements.status_arrived(topic(server), status_of(server), 0.0)
    measurements.status_arrived(topic("a"), status_of("a", "offline"), 1.0)
    assert measurements.snapshot(1.0).is_online
    measurements.status_arrived(topic("b"), status_of("b", "offline"), 1.5)
    assert not measurements.snapshot(2.0).is_online
    assert exchange(measurements, 3).is_online


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 1e300])
def test_bad_values_are_counted_and_change_nothing(bad):
    measurements, fresh = Measurements(), Measurements()
    for told in (measurements, fresh):
        exchange(told, 0)
    measurements.sent(b"12345678", "split", 430, bad)
    measurements.lost(b"12345678", bad)
    measurements.answered(reply_to(1), bad)
    measurements.frame_handled("split", STAGES, bad)
    assert measurements.counts["bad_value"] == 4
    measurements.frame_handled("split", {"head": bad}, 1.0)
    fresh.frame_handled("split", {}, 1.0)
    assert measurements.snapshot(2.0) == fresh.snapshot(2.0)
    assert measurements.counts["bad_value"] == 5


def test_a_time_in_the_future_counts_as_now():
    measurements = Measurements()
    measurements.sent(b"12345678", "split", 430, 1e6)
    measurements.status_arrived(topic("a"), status_of(price_ms={"pass": 9.0}), 1e6)
    assert measurements.snapshot(10.0).server.pass_ms is None
    assert measurements._link._open[b"12345678"].sent_at == 10.0


def test_a_reply_that_waited_for_the_broker_says_nothing_of_the_link_but_that_it_is_back():
    measurements = Measurements()
    for number in range(5):
        exchange(measurements, number)
    known = measurements.snapshot(5.0).link.estimate
    measurements.sent((9).to_bytes(8, "big"), "split", 430, 5.0)
    assert measurements.snapshot(45.0).link.estimate.ms > 30_000  # overdue
    measurements.answered(reply_to(9), 45.0, is_timed=False)
    after = measurements.snapshot(45.0)
    assert (after.link.estimate, after.link.answers) == (known, 6)


def test_a_server_that_answers_is_not_offline_because_it_repeats_that_its_share_is_not_proven():
    measurements = Measurements()
    measurements.status_arrived(topic("a"), status_of(share_proven=False), 0.0)
    assert not measurements.snapshot(0.5).is_online
    assert exchange(measurements, 1).is_online
    measurements.status_arrived(topic("a"), status_of(share_proven=False), 10.0)
    assert measurements.snapshot(10.5).is_online


def test_a_server_that_leaves_still_answers_what_it_has_and_says_when_it_is_back():
    measurements = Measurements()
    measurements.status_arrived(topic("a"), status_of("a"), 0.0)
    measurements.sent((1).to_bytes(8, "big"), "split", 430, 1.0)
    measurements.snapshot(1.0)
    refusal = status_of("a", accepting=False, why="the budget of the day is spent")
    measurements.status_arrived(topic("a"), refusal, 2.0)
    measurements.answered(reply_to(1, server="a"), 3.0)
    snapshot = measurements.snapshot(4.0)
    assert not snapshot.is_online
    assert snapshot.why_offline == "no server takes requests: a (the budget of the day is spent)"
    assert snapshot.awaited
    assert not measurements.snapshot(2.0 + CLAIM_AGE_S + 1).awaited  # it may have died
    measurements.status_arrived(topic("a"), refusal, 100.0)
    measurements.connected(False)
    assert not measurements.snapshot(101.0).awaited


def test_an_answer_that_came_by_way_of_a_server_says_nothing_of_the_tier_above_it():
    measurements = Measurements()
    hops = (Hop(Tier.EDGE, "a", 2.0, 20.0), Hop(Tier.CLOUD, "above", 2.0, 20.0))
    exchange(measurements, 0, hops=hops, server="above")
    assert not measurements.find_silence()
    measurements.status_arrived(topic("a"), status_of("a", "offline"), 1.0)
    assert "a (offline)" in measurements.find_silence()


def test_a_flood_of_statuses_evicts_no_server_that_has_answered():
    measurements = Measurements()
    measurements.status_arrived(topic("real"), status_of("real"), 0.0)
    exchange(measurements, 1, server="real")
    for number in range(20):
        measurements.status_arrived(topic(f"f{number}"), status_of(f"f{number}", "offline"), 2.0)
    assert measurements.counts["servers_forgotten"] == 5
    assert measurements.snapshot(3.0).is_online


def test_second_replies_and_replies_to_unknown_requests_are_ignored():
    measurements = Measurements()
    exchange(measurements, 0)
    measurements.answered(reply_to(0), 0.2)
    measurements.answered(reply_to(77), 0.3)
    measurements.lost(b"unknown!", 0.4)
    assert (measurements.snapshot(1.0).link.answers, measurements.snapshot(1.0).link.losses_in_row) == (1, 0)


def test_memory_is_bounded():
    measurements = Measurements()
    for number in range(3 * QUEUE):
        measurements.sent(number.to_bytes(8, "big"), "split", 430, number / 100)
    assert measurements.counts["overflow"] == 2 * QUEUE
    measurements.snapshot(31.0)
    assert len(measurements._link._open) == MAX_OPEN


def test_several_threads_may_report_while_the_frame_path_reads():
    measurements = Measurements()
    told = 200

    def tell(thread: int) -> None:
        for number in range(told):
            measurements.sent((1000 * thread + number).to_bytes(8, "big"), "split", 10, 0.0)

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        measurements.snapshot(0.0)
    for thread in threads:
        thread.join()
    measurements.snapshot(0.0)
    assert measurements.snapshot(0.0).link.request_bytes == {"split": 10}
    assert measurements.counts.total() == 0


def test_the_snapshot_has_the_thermal_state_the_connection_and_the_share_of_accepted_drafts():
    measurements = Measurements()
    measurements.thermal_read(ThermalState(71.5, True))
    measurements.connected(False)
    for accepted in (True, False, False, False):
        measurements.draft_written(accepted, 0.0)
    snapshot = measurements.snapshot(0.0)
    assert (
        snapshot.board.temperature_c,
        snapshot.board.throttled,
        snapshot.is_online,
        snapshot.board.accepted_unverified_share,
    ) == (71.5, True, False, 0.25)


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-10, 10**12)
told = st.one_of(
    st.tuples(
        st.just("sent"), st.integers(0, 5), st.sampled_from(["split", "speculative", "offload"]), numbers, numbers
    ),
    st.tuples(st.just("answered"), st.integers(0, 5), st.floats(0, 1e9), st.floats(0, 1e9), numbers),
    st.tuples(st.just("lost"), st.integers(0, 5), numbers),
    st.tuples(st.just("frame_handled"), st.dictionaries(st.sampled_from(list(STAGES)), numbers), numbers),
    st.tuples(st.just("snapshot"), numbers),
)


@given(st.lists(told, max_size=40))
def test_for_any_reports_the_numbers_of_the_snapshot_are_plausible(calls):
    measurements = Measurements()
    for name, *values in calls:
        if name == "sent":
            measurements.sent(values[0].to_bytes(8, "big"), *values[1:])
        elif name == "answered":
            hop = Hop(Tier.EDGE, "server", values[1], values[2], {"passes": values[1]})
            measurements.answered(reply_to(values[0], hops=(hop,)), values[3], TEXT)
        elif name == "lost":
            measurements.lost(values[0].to_bytes(8, "big"), values[1])
        elif name == "frame_handled":
            measurements.frame_handled("split", *values)
        else:
            measurements.snapshot(values[0])
    snapshot = measurements.snapshot(1e6)
    for value in values_of(snapshot):
        if isinstance(value, int | float):
            assert 0 <= value <= 1e13
