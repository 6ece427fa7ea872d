"""The estimates over told traffic, lying servers and arbitrary values."""

import json
import math
import threading
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.measurements import MAX_STATUS, OPEN, QUEUE, SERVERS, Estimates, StatusError, decode_status
from edge_runtime.planning.thermal import Vitals
from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.wire import Hop, Reply, Status, Tier, encode_tokens, topics

STAGES = {"resize": 1.0, "head": 4.0, "draft": 3.0, "encode": 0.5}
TEXT = tuple(range(4, 14))


def reply_to(number: int, *, hops: tuple[Hop, ...] | None = None, **fields_of: object) -> Reply:
    if hops is None:
        hops = (Hop(Tier.EDGE, "server", 2.0, 20.0, {"tail": 4.0, "passes": 16.0}),)
    values = {"tokens": encode_tokens(TEXT), "passes": 10} | fields_of
    return Reply(id=number.to_bytes(8, "big"), status=Status.OK, hops=hops, **values)


def exchange(estimates: Estimates, number: int, paradigm="split", size=430, total_ms=100.0, draft=(), **reply_of):
    """A request at second `number` and its answer."""
    estimates.sent(number.to_bytes(8, "big"), paradigm, size, float(number))
    estimates.facts(float(number))
    estimates.answered(reply_to(number, **reply_of), number + total_ms / 1e3, draft)
    return estimates.facts(number + total_ms / 1e3)


def status_of(server: str = "a", state: str = "online", **others: object) -> bytes:
    return json.dumps({"state": state, "server": server, **others}).encode()


def topic(server: str) -> str:
    return topics.server_status("home", server)


def test_nothing_is_known_at_the_start():
    facts = Estimates().facts(0.0)
    assert facts.is_online
    assert all(getattr(facts, f.name) in (None, 0, {}) for f in fields(facts) if f.name != "is_online")


def test_an_answers_time_is_parted_into_network_queue_work_and_passes():
    facts = exchange(Estimates(), 0, total_ms=122.0)
    assert facts.link.likely_ms(430) == pytest.approx(100.0)
    assert (facts.queue_ms, facts.server_ms, facts.pass_ms) == pytest.approx((2.0, 4.0, 1.6))
    assert facts.kind_pass_ms == {"plain": pytest.approx(1.6)}
    assert (facts.plain_passes, facts.drafted_passes, facts.answers) == (10, None, 1)


def test_a_picture_costs_a_server_something_else_than_a_latent():
    estimates = Estimates()
    exchange(estimates, 0)
    hop = Hop(Tier.EDGE, "server", 0.0, 30.0, {"passes": 16.0})
    facts = exchange(estimates, 1, "offload", 12_600, 200.0, hops=(hop,))
    assert (facts.server_ms, facts.picture_server_ms) == (4.0, 14.0)
    assert facts.request_bytes == {"split": 430, "offload": 12_600}


def test_a_servers_work_is_known_by_what_was_asked_for_a_minute_and_in_general_for_longer():
    estimates = Estimates()
    exchange(estimates, 0)
    hop = Hop(Tier.EDGE, "server", 0.0, 26.0, {"passes": 16.0})
    facts = exchange(estimates, 1, "speculative", passes=3, hops=(hop,))
    assert facts.kind_server_ms == {"plain": 4.0, "drafted": 10.0}
    later = estimates.facts(70.0)
    assert (later.kind_server_ms, later.server_ms) == ({}, 7.0)


def test_stages_are_running_medians_and_a_pictures_encoding_is_its_own():
    estimates = Estimates()
    for number in range(5):
        estimates.took("split", STAGES | {"head": 400.0 if number == 2 else 4.0}, float(number))
    estimates.took("offload", {"resize": 1.0, "encode": 7.0}, 5.0)
    facts = estimates.facts(5.0)
    assert (facts.head_ms, facts.encode_ms, facts.picture_ms, facts.interval_ms) == (4.0, 0.5, 7.0, 1000.0)
    assert facts.cpu_share == pytest.approx(0.0085)


def test_a_draft_that_was_not_sent_teaches_as_well():
    agreeing = (*TEXT[:6], 3, 3, 3, 3)
    facts = exchange(Estimates(), 0, "split", draft=agreeing)
    assert (facts.accepted_share, facts.drafted_passes, facts.tokens) == (0.6, 5.0, 10)
    facts = exchange(Estimates(), 0, "speculative", draft=agreeing, accepted=8, proposed=10, passes=3)
    assert (facts.accepted_share, facts.drafted_passes) == (0.8, 3.0)


def test_losses_count_until_an_answer_comes():
    estimates = Estimates()
    for number in range(3):
        estimates.sent(number.to_bytes(8, "big"), "split", 430, float(number))
        estimates.lost(number.to_bytes(8, "big"), number + 0.5)
    facts = estimates.facts(3.0)
    assert (facts.losses_in_row, facts.reply_loss) == (3, 1.0)
    facts = exchange(estimates, 3)
    assert (facts.losses_in_row, facts.reply_loss) == (0, 0.75)
    assert estimates.facts(100.0).reply_loss is None  # too long ago to say anything


def test_an_open_request_says_how_slow_the_link_is_before_its_answer():
    estimates = Estimates()
    for number in range(5):
        exchange(estimates, number, total_ms=30.0)
    estimates.sent(b"overdue!", "split", 430, 5.0)
    assert estimates.facts(5.01).link.likely_ms(430) < 20
    assert estimates.facts(6.0).link.likely_ms(430) > 900


def test_what_was_spent_is_a_fact():
    ledger = ByteBudget()
    for now in (10.0, 12.0):
        assert ledger.take(400, now)
    facts = Estimates(ledger).facts(26.0)
    assert (facts.bytes_last_minute, facts.bytes_last_quarter) == (800, 400)


def test_a_text_in_more_passes_than_it_has_tokens_is_counted_and_ignored():
    estimates = Estimates()
    before = exchange(estimates, 0)
    after = exchange(estimates, 1, passes=4_000_000_000)
    assert (after.plain_passes, after.pass_ms) == (before.plain_passes, before.pass_ms)
    assert estimates.counts["passes_refused"] == 1


def test_a_server_that_was_slow_with_pictures_is_worth_a_try_a_minute_later():
    estimates = Estimates()
    slow = Hop(Tier.EDGE, "server", 0.0, 900.0, {"passes": 16.0})
    assert exchange(estimates, 0, "offload", 12_600, 1000.0, hops=(slow,)).picture_server_ms == 884.0
    assert estimates.facts(62.0).picture_server_ms is None


def test_a_server_that_claims_longer_work_than_the_whole_way_took_is_counted_and_ignored():
    estimates = Estimates()
    facts = exchange(estimates, 0, total_ms=50.0, hops=(Hop(Tier.EDGE, "liar", 0.0, 1e9),))
    assert (facts.link, facts.server_ms, facts.answers) == (None, None, 1)
    assert estimates.counts["hops_refused"] == 1


def test_a_status_serves_until_there_are_answers():
    estimates = Estimates()
    estimates.status_arrived(topic("a"), status_of(price_ms={"batch": 50.0, "pass": 3.0}, queue={"waiting": 2}), 0.0)
    facts = estimates.facts(1.0)
    assert (facts.pass_ms, facts.queue_ms) == (3.0, 50.0)
    facts = exchange(estimates, 2)
    assert (facts.pass_ms, facts.queue_ms) == (1.6, 2.0)


def test_a_status_that_contradicts_what_was_measured_is_counted_and_changes_nothing(caplog):
    estimates = Estimates()
    before = exchange(estimates, 0)
    for second in range(3):
        estimates.status_arrived(topic("liar"), status_of("liar", price_ms={"batch": 1e9, "pass": 1e9}), 1.0 + second)
    after = estimates.facts(4.0)
    assert (after.pass_ms, after.queue_ms) == (before.pass_ms, before.queue_ms)
    assert estimates.counts["status_contradicted"] == 3
    assert [record.message for record in caplog.records if "liar" in record.message] != []
    assert len(caplog.records) == 1  # a fault that repeats is logged once


def test_servers_that_all_left_are_no_link_until_one_answers():
    estimates = Estimates()
    for server in "ab":
        estimates.status_arrived(topic(server), status_of(server), 0.0)
    estimates.status_arrived(topic("a"), status_of("a", "offline"), 1.0)
    assert estimates.facts(1.0).is_online
    estimates.status_arrived(topic("b"), status_of("b", "offline"), 1.5)
    assert not estimates.facts(2.0).is_online
    assert exchange(estimates, 3).is_online  # whatever they say


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 10_000,
        b" " * (MAX_STATUS + 1),
        status_of("someone-else"),
        status_of(state="perhaps"),
        status_of(price_ms={"pass": -1.0}),
        status_of(price_ms={"pass": 1e300}),
        status_of(queue={"waiting": -5}),
        b'{"state": "online", "server": "a", "price_ms": {"pass": NaN}}',
    ],
)
def test_a_hostile_status_is_counted_and_changes_nothing(payload):
    estimates = Estimates()
    estimates.status_arrived(topic("a"), payload, 0.0)
    assert estimates.counts["status_refused"] == 1
    assert estimates.facts(0.0) == Estimates().facts(0.0)


@pytest.mark.parametrize("topic", ["aiflow/home/server/EVIL/status", "aiflow/home/server/s1/status/more", "status", ""])
def test_a_status_on_a_topic_of_no_server_is_counted_and_told_once(topic, caplog):
    estimates = Estimates()
    for _ in range(3):
        estimates.status_arrived(topic, status_of(), 0.0)
    assert estimates.counts["status_refused"] == 3
    assert len(caplog.records) == 1
    assert estimates.facts(0.0) == Estimates().facts(0.0)


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(repr).map(str.encode)
)
def test_any_bytes_are_a_status_or_a_named_error(payload):
    with pytest.raises(StatusError):
        decode_status(payload)


def test_more_servers_than_a_site_has_are_forgotten_and_counted():
    estimates = Estimates()
    for number in range(SERVERS + 5):
        estimates.status_arrived(topic(f"s{number}"), status_of(f"s{number}", price_ms={"pass": 1.0 + number}), 0.0)
    assert estimates.counts["servers_forgotten"] == 5
    assert estimates.facts(0.0).pass_ms == 1.0 + 5 + (SERVERS - 1) / 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 1e300])
def test_bad_values_are_counted_and_change_nothing(bad):
    estimates, fresh = Estimates(), Estimates()
    for told in (estimates, fresh):
        exchange(told, 0)
    estimates.sent(b"12345678", "split", 430, bad)
    estimates.lost(b"12345678", bad)
    estimates.answered(reply_to(1), bad)
    estimates.took("split", STAGES, bad)
    assert estimates.counts["bad_value"] == 4
    estimates.took("split", {"head": bad}, 1.0)
    fresh.took("split", {}, 1.0)
    assert estimates.facts(2.0) == fresh.facts(2.0)
    assert estimates.counts["bad_value"] == 5


def test_what_comes_from_the_future_is_as_of_now():
    estimates = Estimates()
    estimates.sent(b"12345678", "split", 430, 1e6)
    estimates.status_arrived(topic("a"), status_of(price_ms={"pass": 9.0}), 1e6)
    assert estimates.facts(10.0).pass_ms is None
    assert estimates._open[b"12345678"].sent_at == 10.0


def test_replies_to_nothing_and_second_replies_teach_nothing():
    estimates = Estimates()
    exchange(estimates, 0)
    estimates.answered(reply_to(0), 0.2)
    estimates.answered(reply_to(77), 0.3)
    estimates.lost(b"unknown!", 0.4)
    assert (estimates.facts(1.0).answers, estimates.facts(1.0).losses_in_row) == (1, 0)


def test_memory_is_bounded_whatever_is_told():
    estimates = Estimates()
    for number in range(3 * QUEUE):
        estimates.sent(number.to_bytes(8, "big"), "split", 430, number / 100)
    assert estimates.counts["overflow"] == 2 * QUEUE
    estimates.facts(31.0)
    assert len(estimates._open) == OPEN


def test_several_threads_may_tell_while_the_frame_path_reads():
    estimates = Estimates()
    told = 200

    def tell(thread: int) -> None:
        for number in range(told):
            estimates.sent((1000 * thread + number).to_bytes(8, "big"), "split", 10, 0.0)

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        estimates.facts(0.0)
    for thread in threads:
        thread.join()
    estimates.facts(0.0)
    assert len(estimates._sizes["split"].values(0.0)) > 0
    assert estimates.counts.total() == 0


def test_vitals_and_the_connection_pass_through():
    estimates = Estimates()
    estimates.measured(Vitals(71.5, True))
    estimates.connected(False)
    for stands in (True, False, False, False):
        estimates.drafted(stands, 0.0)
    facts = estimates.facts(0.0)
    assert (facts.temperature_c, facts.throttled, facts.is_online, facts.stands_share) == (71.5, True, False, 0.25)


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-10, 10**12)
told = st.one_of(
    st.tuples(
        st.just("sent"), st.integers(0, 5), st.sampled_from(["split", "speculative", "offload"]), numbers, numbers
    ),
    st.tuples(st.just("answered"), st.integers(0, 5), st.floats(0, 1e9), st.floats(0, 1e9), numbers),
    st.tuples(st.just("lost"), st.integers(0, 5), numbers),
    st.tuples(st.just("took"), st.dictionaries(st.sampled_from(list(STAGES)), numbers), numbers),
    st.tuples(st.just("facts"), numbers),
)


@given(st.lists(told, max_size=40))
def test_whatever_is_told_the_facts_are_numbers_within_reason(calls):
    estimates = Estimates()
    for name, *values in calls:
        if name == "sent":
            estimates.sent(values[0].to_bytes(8, "big"), *values[1:])
        elif name == "answered":
            hop = Hop(Tier.EDGE, "server", values[1], values[2], {"passes": values[1]})
            estimates.answered(reply_to(values[0], hops=(hop,)), values[3], TEXT)
        elif name == "lost":
            estimates.lost(values[0].to_bytes(8, "big"), values[1])
        elif name == "took":
            estimates.took("split", *values)
        else:
            estimates.facts(values[0])
    facts = estimates.facts(1e6)
    for value in (getattr(facts, f.name) for f in fields(facts)):
        if isinstance(value, int | float):
            assert 0 <= value <= 1e13
