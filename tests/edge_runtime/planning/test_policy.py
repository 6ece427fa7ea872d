"""The policy over facts that are known, over made boards, and in closed loop."""

from dataclasses import replace
from datetime import datetime, timezone
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import policy as simulation
from edge_runtime.config import PolicyConfig
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.planning.link_model import Link
from edge_runtime.planning.measurements import Estimates, Facts
from edge_runtime.planning.policy import LAST_TRY_S, LASTING, PROBE_EVERY, Decision, Policy
from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.wire.event import Event, decode_event, encode_event

EPOCH = datetime.fromtimestamp(0, timezone.utc)
DEADLINE_MS = 5000.0


def known_link(ms: float, window: float) -> Link:
    """One whose window was measured; ms for a latent."""
    return Link(ms, 430.0, window, window, window)


FACTS = Facts(
    link=known_link(150.0, 8192.0),
    resize_ms=1.0,
    head_ms=4.0,
    draft_ms=3.5,
    encode_ms=0.5,
    picture_ms=1.0,
    request_bytes={"split": 430.0, "speculative": 445.0, "offload": 12_600.0},
    queue_ms=0.0,
    server_ms=4.0,
    picture_server_ms=12.0,
    pass_ms=1.6,
    kind_pass_ms={"plain": 1.6, "drafted": 1.6},
    tokens=10.0,
    plain_passes=11.0,
    drafted_passes=6.0,
    interval_ms=1000.0,
)


def at_wifi(**changes: object) -> Facts:
    return replace(FACTS, link=known_link(5.0, 60_000.0), **changes)


def choose(facts: Facts = FACTS, config: PolicyConfig | None = None, **board: bool) -> Decision:
    """The first decision of a new policy."""
    return Policy(config or PolicyConfig(), **board).choose(facts, 0.0, DEADLINE_MS)


def choices(policy: Policy, facts: Facts, count: int, start: int = 0) -> list[str]:
    """One frame a second."""
    return [policy.choose(facts, float(start + number), DEADLINE_MS).paradigm for number in range(count)]


# ---- which ----


def test_a_quick_draft_that_saves_passes_goes_along():
    decision = choose()
    assert decision.paradigm == "speculative"
    assert decision.explain.reason == "speculative: draft 3.5 ms saves 5 passes of 1.6 ms"


def test_a_slow_draft_is_written_behind_the_request():
    decision = choose(replace(FACTS, draft_ms=70.0))
    assert decision.paradigm == "split"
    assert decision.explain.reason == "split: draft 70 ms would save only 5 passes of 1.6 ms"


def test_a_slow_head_on_a_fast_link_sends_the_picture():
    decision = choose(at_wifi(head_ms=80.0, draft_ms=70.0))
    assert decision.paradigm == "offload"
    assert "12600 bytes" in decision.explain.reason


def test_pictures_that_may_not_leave_the_board_do_not():
    slow = at_wifi(head_ms=80.0, draft_ms=70.0)
    assert choose(slow, PolicyConfig(may_offload=False)).paradigm == "split"
    assert choose(slow, PolicyConfig(may_offload=False), has_head=False).paradigm == "device"


def test_a_board_does_only_what_it_can():
    assert choose(has_draft=False).paradigm == "split"
    assert choose(has_head=False).paradigm == "offload"


def test_drafts_that_stand_make_drafting_first_worth_it():
    slow = replace(FACTS, draft_ms=30.0)
    assert choose(slow).paradigm == "split"
    decision = choose(replace(slow, stands_share=0.5))
    assert decision.paradigm == "speculative"
    assert "50% of the drafts need no server" in decision.explain.reason


def test_a_hot_board_computes_less():
    warm = replace(FACTS, draft_ms=7.0)
    assert choose(warm).paradigm == "speculative"
    assert choose(replace(warm, temperature_c=84.0)).paradigm == "split"
    assert choose(replace(warm, throttled=True)).paradigm == "split"


def test_a_link_that_changes_often_makes_pictures_a_risk():
    slow = at_wifi(head_ms=30.0, draft_ms=70.0, slowest=known_link(1000.0, 2000.0))
    assert choose(slow).paradigm == "offload"
    assert choose(replace(slow, change_chance=0.02)).paradigm == "split"


def test_nothing_known_is_no_picture_on_a_link_that_may_be_thin():
    assert choose(Facts()).paradigm != "offload"


# ---- the draft that stands ----


@pytest.mark.parametrize(
    ("floor", "confidence", "stands"), [(0.9, 0.97, True), (0.9, 0.8, False), (0.0, 0.0, False), (1.0, 1.0, False)]
)
def test_a_draft_stands_from_the_quality_floor_on(floor, confidence, stands):
    policy = Policy(PolicyConfig(quality_floor=floor), calibration=Calibration([(0.0, 0.0), (0.95, 0.9), (1.0, 0.99)]))
    assert policy.stands(confidence) is stands


@pytest.mark.parametrize("floor", [0.0, 0.9, 1.0])
def test_without_a_calibration_no_draft_stands(floor):
    assert not Policy(PolicyConfig(quality_floor=floor)).stands(1.0)


# ---- hysteresis and tries ----


def test_a_large_gain_counts_at_once_and_a_small_one_when_it_lasts():
    policy = Policy(PolicyConfig(may_offload=False))
    assert choices(policy, FACTS, 5)[-1] == "speculative"
    slower = replace(FACTS, draft_ms=14.0)  # split is 3 % better
    assert choices(policy, slower, LASTING) == ["speculative"] * (LASTING - 1) + ["split"]
    assert choices(policy, replace(FACTS, pass_ms=20.0, kind_pass_ms={}), 1) == ["speculative"]


def test_near_equals_that_take_turns_are_no_reason_to_change():
    policy = Policy(PolicyConfig(may_offload=False))
    swinging = [replace(FACTS, draft_ms=12.0 if number % 2 else 4.0) for number in range(50)]
    chosen = [policy.choose(facts, float(n), DEADLINE_MS).paradigm for n, facts in enumerate(swinging)]
    assert set(chosen) == {"speculative"}


def test_what_could_be_better_is_tried_but_not_often():
    unsure = replace(
        FACTS, head_ms=70.0, draft_ms=40.0, picture_server_ms=None, link=Link(45.0, 430.0), kind_pass_ms={"plain": 1.6}
    )
    policy = Policy(PolicyConfig())
    decisions = [policy.choose(unsure, float(n), DEADLINE_MS) for n in range(10 * PROBE_EVERY)]
    tries = [n for n, decision in enumerate(decisions) if decision.is_probe]
    assert {decisions[n].paradigm for n in tries} == {"offload"}
    assert len(tries) == 10
    assert all(later - sooner > PROBE_EVERY - 1 for sooner, later in pairwise(tries))
    assert decisions[tries[0]].explain.reason.startswith("offload: a try: ")


def test_what_cannot_be_better_or_would_cost_much_is_never_tried():
    policy = Policy(PolicyConfig())
    hopeless = replace(FACTS, link=Link(970.0, 430.0))  # a picture takes 200 ms more at best, and the head 4 ms
    assert not any(policy.choose(hopeless, float(n), DEADLINE_MS).is_probe for n in range(100))
    costly = replace(FACTS, head_ms=150.0, link=Link(970.0, 430.0, 8192.0), draft_ms=1.0)
    assert not any(policy.choose(costly, float(n), DEADLINE_MS).is_probe for n in range(100))


# ---- a link that is away ----


@pytest.mark.parametrize(
    ("changes", "away", "words"),
    [
        ({"is_online": False}, "offline", "link offline, next try in 1 s"),
        ({"losses_in_row": 3}, "loss", "no answer to the last 3 requests, next try in 1 s"),
        ({"losses_in_row": 1, "reply_loss": 0.6}, "loss", "no answer to 60% of the latest requests"),
        ({"link": Link(60_000.0, 430.0)}, "deadline", "wanted within 5000 ms"),
    ],
)
def test_a_link_that_is_away_leaves_the_device_alone(changes, away, words):
    decision = choose(replace(FACTS, **changes))
    assert (decision.paradigm, decision.away) == ("device", away)
    assert words in decision.explain.reason


def test_a_link_that_is_away_is_tried_at_growing_intervals_and_used_again_when_it_is_back():
    policy, offline = Policy(PolicyConfig()), replace(FACTS, is_online=False)
    decisions = [policy.choose(offline, float(second), DEADLINE_MS) for second in range(300)]
    tries = [second for second, decision in enumerate(decisions) if decision.is_probe]
    assert tries == [1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert {decisions[second].paradigm for second in tries} == {"split"}  # the smallest
    assert policy.choose(FACTS, 300.0, DEADLINE_MS).away is None
    assert "next try in 1 s" in policy.choose(offline, 301.0, DEADLINE_MS).explain.reason


def test_a_clock_that_steps_back_does_not_end_the_tries():
    policy, offline = Policy(PolicyConfig()), replace(FACTS, is_online=False)
    policy.choose(offline, 1e6, DEADLINE_MS)
    assert not policy.choose(offline, 0.0, DEADLINE_MS).is_probe
    assert policy.choose(offline, LAST_TRY_S + 1, DEADLINE_MS).is_probe


def test_a_deadline_that_only_one_paradigm_meets_chooses_it():
    thin = replace(FACTS, draft_ms=300.0, stands_share=0.9)
    assert Policy(PolicyConfig()).choose(thin, 0.0, DEADLINE_MS).paradigm == "split"
    assert Policy(PolicyConfig()).choose(replace(thin, stands_share=1.0, link=Link(900, 430)), 0.0, 400.0).paradigm == (
        "speculative"
    )


# ---- budgets ----


def test_a_budget_is_spread_over_its_minute_and_used():
    ledger = ByteBudget(8000)
    policy, estimates = Policy(PolicyConfig(bytes_per_minute=8000, may_offload=False)), Estimates(ledger)
    times = []
    for now in range(180):
        decision = policy.choose(estimates.facts(now), now, DEADLINE_MS)
        if decision.paradigm != "device":
            assert ledger.take(430, now)
            estimates.sent(now.to_bytes(8, "big"), decision.paradigm, 430, now)
            times.append(now)
        else:
            assert "bytes sent in the last minute" in decision.explain.reason
    assert max(b - a for a, b in pairwise(times)) <= 15
    assert sum(now >= 120 for now in times) * 430 > 0.6 * 8000


def test_a_server_that_may_propose_words_to_itself_is_tried_where_drafting_is_slow():
    slow = replace(FACTS, draft_ms=6.0, kind_pass_ms={"drafted": 1.6}, plain_passes=11.0, drafted_passes=4.0)
    policy = Policy(PolicyConfig())
    tries = [decision for n in range(60) if (decision := policy.choose(slow, float(n), DEADLINE_MS)).is_probe]
    assert {decision.paradigm for decision in tries} == {"split"}
    found = replace(slow, kind_pass_ms={"drafted": 1.6, "plain": 1.6}, plain_passes=5.0)
    assert choices(policy, found, LASTING + 1, start=60)[-1] == "split"


def test_a_server_that_is_slower_while_the_board_drafts_counts_against_drafting_behind_the_request():
    slow = replace(FACTS, draft_ms=30.0)
    assert choose(slow).paradigm == "split"
    assert choose(replace(slow, kind_server_ms={"plain": 40.0, "drafted": 4.0})).paradigm == "speculative"


def test_no_try_is_made_over_the_budget():
    unsure = replace(FACTS, head_ms=50.0, picture_server_ms=None, link=Link(45.0, 430.0))
    policy = Policy(PolicyConfig(bytes_per_minute=15_000))
    assert not any(policy.choose(unsure, float(n), DEADLINE_MS).is_probe for n in range(100))


def test_a_board_without_time_for_its_draft_leaves_it_out():
    busy = replace(FACTS, head_ms=200.0, draft_ms=200.0)
    decision = choose(busy, PolicyConfig(cpu_share=0.3, may_offload=False))
    assert (decision.paradigm, decision.drafts) == ("split", False)
    assert choose(busy, PolicyConfig(cpu_share=0.5, may_offload=False)).drafts
    assert choose(busy, PolicyConfig(cpu_share=0.1)).paradigm == "offload"


# ---- properties ----

ms = st.floats(0.1, 2000)
some_facts = st.builds(
    Facts,
    is_online=st.booleans(),
    link=st.none() | st.builds(known_link, ms, st.floats(256, 65536)) | st.builds(Link, ms, st.just(430.0)),
    change_chance=st.floats(0, 0.2),
    slowest=st.none() | st.builds(Link, ms, st.just(512.0)),
    losses_in_row=st.integers(0, 4),
    reply_loss=st.none() | st.floats(0, 1),
    head_ms=st.none() | ms,
    draft_ms=st.none() | ms,
    encode_ms=st.none() | ms,
    queue_ms=st.none() | ms,
    server_ms=st.none() | ms,
    picture_server_ms=st.none() | ms,
    pass_ms=st.none() | st.floats(0, 50),
    plain_passes=st.none() | st.floats(1, 30),
    drafted_passes=st.none() | st.floats(1, 30),
    stands_share=st.none() | st.floats(0, 1),
    throttled=st.none() | st.booleans(),
    bytes_last_minute=st.integers(0, 10_000),
    interval_ms=st.none() | ms,
)
configs = st.builds(
    PolicyConfig,
    bytes_per_minute=st.sampled_from([0, 400, 9000]),
    cpu_share=st.floats(0.01, 1),
    may_offload=st.booleans(),
)


@given(configs, st.lists(some_facts, max_size=12), st.booleans())
def test_the_same_inputs_give_the_same_decisions(config, all_facts, has_head):
    first, second = (Policy(config, has_head=has_head) for _ in range(2))
    for number, facts in enumerate(all_facts):
        assert first.choose(facts, number, DEADLINE_MS) == second.choose(facts, number, DEADLINE_MS)


@given(configs, some_facts, st.booleans(), st.booleans(), st.floats(0, 10_000))
def test_every_decision_is_possible_and_fits_an_event(config, facts, has_head, has_draft, deadline_ms):
    decision = Policy(config, has_head=has_head, has_draft=has_draft).choose(facts, 1.0, deadline_ms)
    assert decision.paradigm != "offload" or config.may_offload
    assert decision.paradigm not in ("split", "speculative") or has_head
    assert decision.paradigm != "speculative" or has_draft
    assert decision.explain.reason.startswith(f"{decision.paradigm}: ")
    event = Event(type="new", frame="0", camera="c", captured=EPOCH, explain=decision.explain)
    assert decode_event(encode_event(event)).explain == decision.explain


@given(some_facts.filter(lambda facts: facts.is_online and facts.losses_in_row < 1), ms)
def test_a_slower_draft_never_makes_drafting_first_the_choice(facts, more_ms):
    facts = replace(facts, draft_ms=facts.draft_ms or 5.0)
    before = choose(facts)
    after = choose(replace(facts, draft_ms=facts.draft_ms + more_ms))
    assert after.paradigm != "speculative" or before.paradigm == "speculative"


@given(some_facts.filter(lambda facts: facts.is_online and facts.losses_in_row < 1), st.floats(1.01, 50))
def test_a_slower_link_never_makes_the_picture_the_choice(facts, times):
    link = facts.link or Link(100.0, 430.0)
    before = choose(replace(facts, link=link))
    after = choose(replace(facts, link=replace(link, ms=times * link.ms)))
    assert after.paradigm != "offload" or before.paradigm == "offload"


@given(some_facts, st.floats(50, 5000), st.floats(0, 5000))
def test_more_time_never_leaves_the_device_alone(facts, deadline_ms, more_ms):
    policy = Policy(PolicyConfig())
    if policy.choose(facts, 0.0, deadline_ms).paradigm != "device":
        assert Policy(PolicyConfig()).choose(facts, 0.0, deadline_ms + more_ms).paradigm != "device"


# ---- in closed loop ----


def test_in_closed_loop_it_keeps_up_with_the_best_fixed_paradigm_and_with_an_oracle():
    figures = simulation.run(frames=240, seed=7)
    assert figures["worst_to_best_fixed"] <= 1.05
    assert figures["worst_to_oracle"] <= 1.10
