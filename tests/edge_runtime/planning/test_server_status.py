"""The statuses of servers: genuine, hostile and forged."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.server_status import (
    CLAIM_AGE_S,
    MAX_STATUS,
    MAX_WHY,
    SERVERS,
    ServerStatuses,
    StatusError,
    Takes,
    decode_status,
)
from edge_runtime.wire import topics


def status_of(server: str = "a", state: str = "online", **others: object) -> bytes:
    return json.dumps({"state": state, "server": server, **others}).encode()


class Statuses(ServerStatuses):
    """With its counters."""

    def __init__(self, bundle: str = "") -> None:
        self.counts: Counter[str] = Counter()
        super().__init__(self.counts, bundle)

    def receive(self, server: str, now: float, is_retained: bool = False, **status: object) -> None:
        self.arrived(topics.server_status("home", server), status_of(server, **status), now, is_retained)


def test_a_server_whose_retained_status_is_deleted_is_forgotten():
    statuses = Statuses()
    statuses.receive("a", 0.0, state="offline")
    assert "a (offline)" in statuses.find_silence()
    for server in ("a", "b"):
        statuses.arrived(topics.server_status("home", server), b"", 1.0)
    assert statuses.find_silence().startswith("no server has been heard")
    assert not statuses.counts


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b"\xff\xfe",
        b"[" * 10_000,
        b" " * (MAX_STATUS + 1),
        status_of("someone-else"),
        status_of(state="perhaps"),
        status_of(share_proven="no"),
        status_of(price_ms={"pass": -1.0}),
        status_of(price_ms={"pass": 1e300}),
        status_of(queue={"waiting": -5}),
        b'{"state": "online", "server": "a", "price_ms": {"pass": NaN}}',
    ],
)
def test_a_hostile_status_is_counted_and_changes_nothing(payload):
    statuses = Statuses()
    statuses.arrived(topics.server_status("home", "a"), payload, 0.0)
    assert statuses.counts == {"status_refused": 1}
    assert statuses.claims(0.0) == Statuses().claims(0.0)
    assert not statuses.all_refuse(0.0, -math.inf)


@pytest.mark.parametrize("topic", ["aiflow/home/server/EVIL/status", "aiflow/home/server/s1/status/more", "status", ""])
def test_a_status_on_a_topic_of_no_server_is_counted_and_logged_once(topic, caplog):
    statuses = Statuses()
    for _ in range(3):
        statuses.arrived(topic, status_of(), 0.0)
    assert statuses.counts == {"status_refused": 3}
    assert len(caplog.records) == 1


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(repr).map(str.encode)
)
def test_any_bytes_are_a_status_or_a_named_error(payload):
    with pytest.raises(StatusError):
        decode_status(payload)


def test_if_more_servers_publish_a_status_than_are_remembered_the_stalest_is_forgotten_and_counted():
    statuses = Statuses()
    for number in range(SERVERS + 5):
        statuses.receive(f"s{number}", 0.0, price_ms={"pass": 1.0 + number})
    assert statuses.counts == {"servers_forgotten": 5}
    assert statuses.claims(0.0).pass_ms == 1.0 + 5 + (SERVERS - 1) / 2


def test_a_server_that_has_answered_is_never_forgotten():
    statuses = Statuses()
    statuses.receive("real", 0.0)
    statuses.answered("real")
    for number in range(100):
        statuses.receive(f"forged{number}", 1.0 + number, state="offline")
    assert not statuses.all_refuse(101.0, 0.0)
    assert len(statuses._received) == SERVERS
    assert statuses.counts == {"servers_forgotten": 100 - (SERVERS - 1)}


def test_if_all_remembered_servers_have_answered_a_further_one_waits_for_its_first_answer():
    statuses = Statuses()
    for number in range(SERVERS):
        statuses.receive(f"s{number}", 0.0)
        statuses.answered(f"s{number}")
    statuses.receive("new", 1.0)
    assert "new" not in statuses._received
    statuses.answered("new")
    statuses.receive("new", 2.0)
    assert "new" in statuses._received
    assert len(statuses._received) == SERVERS
    assert statuses.counts == {"servers_forgotten": 2}


@pytest.mark.parametrize("away", [{"state": "offline"}, {"share_proven": False}, {"accepting": False}])
def test_servers_count_as_offline_only_if_all_of_them_take_no_requests(away):
    statuses = Statuses()
    assert not statuses.all_refuse(0.0, -math.inf)
    statuses.receive("a", 1.0, **away)
    statuses.receive("b", 1.0)
    assert not statuses.all_refuse(2.0, -math.inf)
    statuses.receive("b", 3.0, **away)
    assert statuses.all_refuse(3.0, -math.inf)
    assert statuses.all_refuse(3.0, 0.5)  # answered before
    assert not statuses.all_refuse(5.0, 4.0)  # answered since
    statuses.receive("a", 6.0)
    assert not statuses.all_refuse(6.0, -math.inf)


def test_a_repeated_refusal_is_no_news_but_a_repeated_offline_is():
    """A server publishes its status every 10 s while it is online, and "offline" only when it leaves."""
    statuses = Statuses()
    for now in (1.0, 11.0):
        statuses.receive("a", now, accepting=False)
    assert not statuses.all_refuse(11.0, 5.0)
    statuses.receive("a", 12.0, state="offline")
    assert statuses.all_refuse(12.0, 5.0)


def test_what_one_server_takes_is_possible_whatever_the_others_take():
    statuses = Statuses()
    assert statuses.takes(0.0) == Takes()  # nobody has said anything
    statuses.receive("pictures", 1.0, target={"latents": False})
    assert statuses.takes(1.0) == Takes(latents=False)
    statuses.receive("features", 1.0, target={"latents": True}, pictures=False)
    assert statuses.takes(1.0) == Takes()
    statuses.receive("features", 2.0, target={"latents": True}, pictures=False, accepting=False)
    assert statuses.takes(2.0) == Takes(latents=False)
    statuses.receive("older", 2.0)  # of a version that says nothing of it
    assert statuses.takes(2.0) == Takes()


def test_features_of_a_bundle_that_no_server_has_are_not_sent():
    statuses = Statuses("aa")
    statuses.receive("one", 1.0, bundles={"bb": "another"})
    assert statuses.takes(1.0) == Takes(latents=False)
    statuses.receive("two", 1.0, bundles={"aa": "ours", "bb": "another"})
    assert statuses.takes(1.0) == Takes()


def test_with_a_prompt_only_servers_that_have_it_count():
    statuses = Statuses()
    assert statuses.takes(0.0, "gate") == Takes()  # nobody has said anything
    statuses.receive("bundle", 1.0)
    statuses.receive("one", 1.0, target={"latents": False, "prompts": ["door", "drive"]})
    assert statuses.takes(1.0, "drive") == Takes(latents=False, wanted="the prompt drive")
    assert statuses.takes(1.0, "gate") == Takes(False, False, "the prompt gate")
    assert statuses.takes(1.0) == Takes()
    statuses.receive("one", 2.0, target={"latents": False, "prompts": ["drive"]}, accepting=False)
    assert statuses.takes(2.0, "drive") == Takes(False, False, "the prompt drive", later="one (online)")


def test_for_sampled_texts_only_servers_that_sample_count():
    statuses = Statuses()
    assert statuses.takes(0.0, samples=True) == Takes()  # nobody has said anything
    statuses.receive("older", 1.0)
    assert statuses.takes(1.0, samples=True) == Takes(False, False, "a target that samples")
    assert statuses.takes(1.0, "gate", True) == Takes(False, False, "the prompt gate and a target that samples")
    statuses.receive("bundle", 1.0, target={"sample": True}, pictures=False)
    assert statuses.takes(1.0, samples=True) == Takes(True, False, "a target that samples")


@pytest.mark.parametrize(
    ("status", "prompt", "drafts"),
    [
        ({"target": {"drafts": True}, "bundles": {"aa": "ours"}}, "", True),
        ({"target": {"drafts": True}, "bundles": {"bb": "another"}}, "", False),
        ({"target": {"drafts": True}}, "", False),
        ({"target": {"drafts": False}, "bundles": {"aa": "ours"}}, "", False),
        ({"target": {"drafts": True}, "bundles": {"aa": "ours"}, "pictures": False}, "", False),
        ({"target": {"drafts": True, "prompts": ["gate"]}, "bundles": {"aa": "ours"}}, "gate", False),
    ],
)
def test_drafts_go_with_pictures_only_to_servers_that_say_that_they_verify_those_of_the_bundle(status, prompt, drafts):
    statuses = ServerStatuses(Counter(), bundle="aa")
    assert not statuses.takes(0.0, prompt).drafts
    statuses.arrived(topics.server_status("home", "a"), status_of("a", **status), 0.0)
    assert statuses.takes(0.0, prompt).drafts is drafts


def test_what_servers_took_a_minute_ago_counts_no_more():
    statuses = Statuses()
    statuses.receive("a", 0.0, target={"latents": False})
    assert statuses.takes(CLAIM_AGE_S + 1) == Takes()


@pytest.mark.parametrize("target", [None, 1, {"latents": "no"}, []])
def test_a_target_that_is_none_is_refused(target):
    statuses = Statuses()
    statuses.receive("a", 0.0, target=target)
    assert statuses.counts == {"status_refused": 1}


def test_no_server_can_answer_while_all_are_offline_unless_one_answered_without_a_status():
    statuses = Statuses()
    assert "no server has been heard" in statuses.find_silence()
    statuses.receive("a", 0.0, state="offline")
    statuses.answered("a")
    assert "a (offline)" in statuses.find_silence()
    statuses.answered("b")
    assert not statuses.find_silence()


BUDGET = "the budget of the day is spent, the next day begins at 2026-12-02 00:00 UTC"


def test_the_reason_for_silence_is_the_servers_own_words():
    statuses = Statuses()
    statuses.receive("attic", 0.0, accepting=False, why=BUDGET)
    assert statuses.find_silence() == f"no server takes requests: attic ({BUDGET})"
    statuses.receive("barn", 0.0, state="offline", why="ignored: it cannot be the present reason")
    expected = f"no server takes requests: attic ({BUDGET}), barn (offline): look at the server's log"
    assert statuses.find_silence() == expected


def test_a_servers_words_are_bounded_and_printable():
    statuses = Statuses()
    statuses.receive("attic", 0.0, accepting=False, why="\x1b[2J\n" + 1000 * "x")
    assert statuses.find_silence().isprintable()
    assert len(statuses.find_silence()) < MAX_WHY + 100


@pytest.mark.parametrize("why", [None, 7, {"a": 1}])
def test_a_reason_that_is_no_text_is_left_out(why):
    statuses = Statuses()
    statuses.receive("attic", 0.0, accepting=False, why=why)
    assert statuses.find_silence() == "no server takes requests: attic (online): look at the server's log"


@pytest.mark.parametrize(
    ("others", "will_say"),
    [
        ({}, True),
        ({"b": {"accepting": False}}, True),
        ({"b": {"state": "offline"}}, True),
        ({"b": {"share_proven": False}}, False),
        ({"b": {}}, False),
        ({"a": {"state": "offline"}}, False),
    ],
)
def test_servers_that_are_online_and_do_not_accept_say_when_they_do(others, will_say):
    statuses = Statuses()
    assert not statuses.will_say(0.0)
    statuses.receive("a", 1.0, accepting=False)
    for server, status in others.items():
        statuses.receive(server, 1.0, **status)
    assert statuses.will_say(1.0) is will_say


def test_a_server_that_answers_without_a_status_will_not_say_when_it_takes_requests():
    statuses = Statuses()
    statuses.receive("a", 1.0, accepting=False)
    statuses.answered("b")
    assert not statuses.will_say(1.0)


def test_a_refusal_that_its_server_no_longer_repeats_is_not_waited_for():
    statuses = Statuses()
    for now in (0.0, 50.0):
        statuses.receive("a", now, accepting=False)
    assert statuses.will_say(50.0 + CLAIM_AGE_S)
    assert not statuses.will_say(51.0 + CLAIM_AGE_S)


def test_a_retained_refusal_is_not_newer_after_another_connection():
    statuses = Statuses()
    for now in (0.0, 50.0):
        statuses.receive("a", now, is_retained=True, accepting=False)
    assert statuses.will_say(CLAIM_AGE_S)
    assert not statuses.will_say(CLAIM_AGE_S + 1)
    statuses.receive("a", 100.0, accepting=False)  # by the server itself
    statuses.receive("a", 200.0, is_retained=True, accepting=False)
    assert statuses.will_say(201.0)


def test_if_no_server_accepts_requests_what_those_that_are_online_take_counts():
    statuses = Statuses()
    statuses.receive("a", 1.0, target={"latents": False, "prompts": ["gate"]}, accepting=False)
    statuses.receive("gone", 1.0, state="offline")
    assert statuses.takes(1.0, "gate") == Takes(latents=False, wanted="the prompt gate")
    assert statuses.takes(1.0, "drive").lacking == "no server has the prompt drive"
    statuses.receive("b", 2.0)
    assert statuses.takes(2.0) == Takes()


def test_what_is_lacking_is_named_only_if_all_servers_lack_it():
    assert not Takes().lacking
    assert not Takes(False, False).lacking
    assert not Takes(False, True, "the prompt gate").lacking
    assert Takes(False, False, "the prompt gate").lacking == "no server has the prompt gate"


def test_another_server_is_known_by_a_fresh_status_or_by_its_answers():
    statuses = Statuses()
    assert not statuses.has_other(frozenset(), 0.0)
    statuses.receive("a", 0.0)
    statuses.receive("full", 0.0, accepting=False)
    assert statuses.has_other(frozenset(), 0.0)
    assert not statuses.has_other({"a"}, 0.0)
    assert not statuses.has_other(frozenset(), CLAIM_AGE_S + 1)
    statuses.answered("b")
    assert statuses.has_other({"a"}, 0.0)
