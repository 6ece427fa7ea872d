"""The policy, over known snapshots, over arbitrary ones, and in closed loop."""

import dataclasses
from datetime import datetime, timezone
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.config import PolicyConfig
from edge_runtime.planning import Decision, Measurements, Policy, Snapshot
from edge_runtime.planning.board_estimator import BoardSnapshot
from edge_runtime.planning.candidates import candidate
from edge_runtime.planning.link_estimator import LinkSnapshot
from edge_runtime.planning.link_model import LinkEstimate
from edge_runtime.planning.policy import LAST_RETRY_S, LASTING_FRAMES, PROBE_EVERY
from edge_runtime.planning.server_estimator import ServerSnapshot
from edge_runtime.planning.server_status import Takes
from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.wire.event import Event, decode_event, encode_event
from tests.edge_runtime.planning import simulation

EPOCH = datetime.fromtimestamp(0, timezone.utc)
DEADLINE_MS = 5000.0


def known_link(ms: float, window: float) -> LinkEstimate:
    """One whose window was measured; ms for a latent."""
    return LinkEstimate(ms, 430.0, window, window, window)


def with_values(snapshot: Snapshot, **values: object) -> Snapshot:
    """The snapshot with other values, whichever of its parts has them."""
    parts = {}
    for name in ("link", "server", "board"):
        part = getattr(snapshot, name)
        own = {field.name for field in dataclasses.fields(part)} & values.keys()
        parts[name] = dataclasses.replace(part, **{field: values.pop(field) for field in own})
    return dataclasses.replace(snapshot, **parts, **values)


KNOWN = with_values(
    Snapshot(),
    estimate=known_link(150.0, 8192.0),
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


def at_wifi(**changes: object) -> Snapshot:
    return with_values(KNOWN, estimate=known_link(5.0, 60_000.0), **changes)


def choose(snapshot: Snapshot = KNOWN, config: PolicyConfig | None = None, **board: bool) -> Decision:
    """The first decision of a new policy."""
    return Policy(config or PolicyConfig(), **board).choose(snapshot, 0.0, DEADLINE_MS)


def choices(policy: Policy, snapshot: Snapshot, count: int, start: int = 0) -> list[str]:
    """One frame a second."""
    return [policy.choose(snapshot, float(start + number), DEADLINE_MS).paradigm for number in range(count)]


# ---- which ----


def test_a_quick_draft_that_saves_passes_is_sent():
    decision = choose()
    assert decision.paradigm == "speculative"
    assert decision.explain.reason == "speculative: draft 3.5 ms saves 5 passes of 1.6 ms"


def test_a_slow_draft_is_written_after_sending():
    decision = choose(with_values(KNOWN, draft_ms=70.0))
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


@pytest.mark.parametrize(
    ("takes", "config", "has_head", "paradigms", "words"),
    [
        (Takes(latents=False), PolicyConfig(), True, {"offload"}, "nothing else is possible"),
        (Takes(pictures=False), PolicyConfig(), True, {"speculative", "split"}, ""),
        (
            Takes(latents=False),
            PolicyConfig(may_offload=False),
            True,
            set(),
            "no server takes this bundle's features, and pictures may",
        ),
        (Takes(pictures=False), PolicyConfig(), False, set(), "the board has no head, and no server takes pictures"),
        (Takes(latents=False, wanted="the prompt gate"), PolicyConfig(), True, {"offload"}, "nothing else is possible"),
        (Takes(False, False, "the prompt gate"), PolicyConfig(), True, set(), "no server has the prompt gate"),
    ],
)
def test_only_what_a_server_takes_is_offered(takes, config, has_head, paradigms, words):
    decision = choose(with_values(KNOWN, takes=takes), config, has_head=has_head)
    assert decision.explain.expected_ms.keys() == paradigms
    assert decision.paradigm in (paradigms or {"device"})
    assert words in decision.explain.reason


ONLY_PICTURES = with_values(KNOWN, takes=Takes(latents=False, drafts=True), pass_ms=40.0, kind_pass_ms={})


def test_a_draft_goes_with_the_picture_if_a_server_verifies_it_and_passes_cost_more_than_the_draft():
    decision = choose(ONLY_PICTURES)
    assert (decision.paradigm, decision.sends_draft) == ("offload", True)
    assert decision.explain.reason == "offload: draft 3.5 ms saves 5 passes of 40 ms"


def test_a_server_that_uses_drafts_and_does_not_tell_of_its_passes_gets_them():
    for unknown in (None, 0.0):
        decision = choose(with_values(ONLY_PICTURES, pass_ms=unknown, draft_ms=70.0))
        assert (decision.paradigm, decision.sends_draft) == ("offload", True)
    assert decision.explain.reason == "offload: draft 70 ms, and a server says that it uses drafts"


@pytest.mark.parametrize(
    ("changes", "config", "board"),
    [
        ({"takes": Takes(latents=False)}, PolicyConfig(), {}),
        ({}, PolicyConfig(), {"has_draft": False}),
        ({}, PolicyConfig(), {"has_head": False}),
        ({"drafted_passes": 11.0}, PolicyConfig(), {}),  # drafts save nothing
        ({"draft_ms": 400.0}, PolicyConfig(), {}),
        ({"draft_ms": 40.0, "interval_ms": 100.0}, PolicyConfig(cpu_share=0.3), {}),
    ],
)
def test_otherwise_the_picture_goes_alone(changes, config, board):
    decision = choose(with_values(ONLY_PICTURES, **changes), config, **board)
    assert (decision.paradigm, decision.sends_draft) == ("offload", False)


def test_drafts_that_need_no_verification_make_speculative_faster():
    slow = with_values(KNOWN, draft_ms=30.0)
    assert choose(slow).paradigm == "split"
    decision = choose(with_values(slow, accepted_unverified_share=0.5))
    assert decision.paradigm == "speculative"
    assert "50% of the drafts need no server" in decision.explain.reason


def test_a_hot_board_computes_less():
    warm = with_values(KNOWN, draft_ms=7.0)
    assert choose(warm).paradigm == "speculative"
    assert choose(with_values(warm, temperature_c=84.0)).paradigm == "split"
    assert choose(with_values(warm, throttled=True)).paradigm == "split"


def test_a_link_that_changes_often_makes_pictures_a_risk():
    slow = at_wifi(head_ms=30.0, draft_ms=70.0, slowest=known_link(1000.0, 2000.0))
    assert choose(slow).paradigm == "offload"
    assert choose(with_values(slow, change_chance=0.02)).paradigm == "split"


def test_without_measurements_no_picture_is_sent_on_a_link_that_may_be_slow():
    assert choose(Snapshot()).paradigm != "offload"


@pytest.mark.parametrize(
    ("paradigm", "sends_draft", "longer_ms"),
    [("split", False, 2.0), ("speculative", True, 2.0), ("offload", True, 2.0), ("offload", False, 0.0)],
)
def test_labels_take_time_before_features_and_drafts_only(paradigm, sends_draft, longer_ms):
    without, with_labels = (
        candidate(paradigm, with_values(KNOWN, labels_ms=ms), writes_draft=True, sends_draft=sends_draft)
        for ms in (0.0, 2.0)
    )
    assert with_labels.ms - without.ms == pytest.approx(longer_ms)
    assert with_labels.board_ms - without.board_ms == pytest.approx(longer_ms)


# ---- hysteresis and probes ----


def test_a_large_gain_counts_at_once_and_a_small_one_only_if_it_lasts():
    policy = Policy(PolicyConfig(may_offload=False))
    assert choices(policy, KNOWN, 5)[-1] == "speculative"
    slower = with_values(KNOWN, draft_ms=14.0)  # split is 3 % better
    assert choices(policy, slower, LASTING_FRAMES) == ["speculative"] * (LASTING_FRAMES - 1) + ["split"]
    assert choices(policy, with_values(KNOWN, pass_ms=20.0, kind_pass_ms={}), 1) == ["speculative"]


def test_two_paradigms_that_are_nearly_equal_do_not_alternate():
    policy = Policy(PolicyConfig(may_offload=False))
    swinging = [with_values(KNOWN, draft_ms=12.0 if number % 2 else 4.0) for number in range(50)]
    chosen = [policy.choose(snapshot, float(n), DEADLINE_MS).paradigm for n, snapshot in enumerate(swinging)]
    assert set(chosen) == {"speculative"}


def test_a_paradigm_that_could_be_better_is_probed_but_not_often():
    unsure = with_values(
        KNOWN,
        head_ms=70.0,
        draft_ms=40.0,
        picture_server_ms=None,
        estimate=LinkEstimate(45.0, 430.0),
        kind_pass_ms={"plain": 1.6},
    )
    policy = Policy(PolicyConfig())
    decisions = [policy.choose(unsure, float(n), DEADLINE_MS) for n in range(10 * PROBE_EVERY)]
    tries = [n for n, decision in enumerate(decisions) if decision.is_probe]
    assert {decisions[n].paradigm for n in tries} == {"offload"}
    assert len(tries) == 10
    assert all(later - sooner > PROBE_EVERY - 1 for sooner, later in pairwise(tries))
    assert decisions[tries[0]].explain.reason.startswith("offload: a try: ")


def test_a_paradigm_that_cannot_be_better_or_costs_much_is_never_probed():
    policy = Policy(PolicyConfig())
    hopeless = with_values(
        KNOWN, estimate=LinkEstimate(970.0, 430.0)
    )  # a picture takes 200 ms more at best, and the head 4 ms
    assert not any(policy.choose(hopeless, float(n), DEADLINE_MS).is_probe for n in range(100))
    costly = with_values(KNOWN, head_ms=150.0, estimate=LinkEstimate(970.0, 430.0, 8192.0), draft_ms=1.0)
    assert not any(policy.choose(costly, float(n), DEADLINE_MS).is_probe for n in range(100))


# ---- a link that is down ----


@pytest.mark.parametrize(
    ("changes", "outage", "words"),
    [
        ({"is_online": False}, "offline", "no server takes requests, next try in 1 s"),
        ({"losses_in_row": 3}, "loss", "no answer to the last 3 requests, next try in 1 s"),
        ({"losses_in_row": 1, "reply_loss": 0.6}, "loss", "no answer to 60% of the latest requests"),
        ({"estimate": LinkEstimate(60_000.0, 430.0)}, "deadline", "wanted within 5000 ms"),
    ],
)
def test_a_link_that_is_down_leaves_the_frame_to_the_device(changes, outage, words):
    decision = choose(with_values(KNOWN, **changes))
    assert (decision.paradigm, decision.outage) == ("device", outage)
    assert words in decision.explain.reason


def test_a_link_that_is_down_is_tested_at_growing_intervals_and_used_again_when_it_is_back():
    policy, offline = Policy(PolicyConfig()), with_values(KNOWN, is_online=False)
    decisions = [policy.choose(offline, float(second), DEADLINE_MS) for second in range(300)]
    tries = [second for second, decision in enumerate(decisions) if decision.is_probe]
    assert tries == [1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert {decisions[second].paradigm for second in tries} == {"split"}  # the smallest
    assert policy.choose(KNOWN, 300.0, DEADLINE_MS).outage is None
    assert "next try in 1 s" in policy.choose(offline, 301.0, DEADLINE_MS).explain.reason


def test_a_link_is_not_tested_while_the_servers_will_say_when_they_take_requests():
    policy = Policy(PolicyConfig())
    unknown = with_values(KNOWN, is_online=False)
    awaited = with_values(unknown, awaited="a status says when")
    decisions = [policy.choose(awaited, float(second), DEADLINE_MS) for second in range(300)]
    assert {(each.paradigm, each.outage) for each in decisions} == {("device", "offline")}
    assert decisions[0].explain.reason == "device: no server takes requests: a status says when"
    later = [policy.choose(unknown, 300.0 + second, DEADLINE_MS) for second in range(9)]
    assert [second for second, decision in enumerate(later) if decision.is_probe] == [1, 3, 7]
    assert policy.choose(KNOWN, 310.0, DEADLINE_MS).outage is None


def test_a_server_that_is_back_is_asked_soon_whatever_was_lost_while_it_was_away():
    policy = Policy(PolicyConfig())
    for second in range(40):
        policy.choose(with_values(KNOWN, is_online=False), float(second), DEADLINE_MS)
    back = with_values(KNOWN, losses_in_row=4)
    decisions = [policy.choose(back, 40.0 + second, DEADLINE_MS) for second in range(12)]
    assert [second for second, decision in enumerate(decisions) if decision.is_probe] == [1, 3, 7]


def test_a_clock_that_steps_back_does_not_end_the_tests_of_the_link():
    policy, offline = Policy(PolicyConfig()), with_values(KNOWN, is_online=False)
    policy.choose(offline, 1e6, DEADLINE_MS)
    assert not policy.choose(offline, 0.0, DEADLINE_MS).is_probe
    assert policy.choose(offline, LAST_RETRY_S + 1, DEADLINE_MS).is_probe


def test_the_only_paradigm_that_meets_the_deadline_is_chosen():
    thin = with_values(KNOWN, draft_ms=300.0, accepted_unverified_share=0.9)
    assert Policy(PolicyConfig()).choose(thin, 0.0, DEADLINE_MS).paradigm == "split"
    slow = with_values(thin, accepted_unverified_share=1.0, estimate=LinkEstimate(900, 430))
    assert Policy(PolicyConfig()).choose(slow, 0.0, 400.0).paradigm == "speculative"


# ---- budgets ----


def test_a_budget_is_spread_over_its_minute_and_used():
    budget = ByteBudget(8000)
    policy, measurements = Policy(PolicyConfig(bytes_per_minute=8000, may_offload=False)), Measurements(budget.spent)
    times = []
    for now in range(180):
        decision = policy.choose(measurements.snapshot(now), now, DEADLINE_MS)
        if decision.paradigm != "device":
            assert budget.take(430, now)
            measurements.sent(now.to_bytes(8, "big"), decision.paradigm, 430, now)
            times.append(now)
        else:
            assert "bytes sent in the last minute" in decision.explain.reason
    assert max(b - a for a, b in pairwise(times)) <= 15
    assert sum(now >= 120 for now in times) * 430 > 0.6 * 8000


def test_a_server_that_may_propose_tokens_itself_is_probed_if_drafting_is_slow():
    slow = with_values(KNOWN, draft_ms=6.0, kind_pass_ms={"drafted": 1.6}, plain_passes=11.0, drafted_passes=4.0)
    policy = Policy(PolicyConfig())
    tries = [decision for n in range(60) if (decision := policy.choose(slow, float(n), DEADLINE_MS)).is_probe]
    assert {decision.paradigm for decision in tries} == {"split"}
    found = with_values(slow, kind_pass_ms={"drafted": 1.6, "plain": 1.6}, plain_passes=5.0)
    assert choices(policy, found, LASTING_FRAMES + 1, start=60)[-1] == "split"


def test_a_server_that_is_slower_while_the_board_writes_a_draft_counts_against_split():
    slow = with_values(KNOWN, draft_ms=30.0)
    assert choose(slow).paradigm == "split"
    assert choose(with_values(slow, kind_server_ms={"plain": 40.0, "drafted": 4.0})).paradigm == "speculative"


def test_no_probe_exceeds_the_byte_budget():
    unsure = with_values(KNOWN, head_ms=50.0, picture_server_ms=None, estimate=LinkEstimate(45.0, 430.0))
    policy = Policy(PolicyConfig(bytes_per_minute=15_000))
    assert not any(policy.choose(unsure, float(n), DEADLINE_MS).is_probe for n in range(100))


def test_a_board_without_cpu_time_for_its_draft_writes_none():
    busy = with_values(KNOWN, head_ms=200.0, draft_ms=200.0)
    decision = choose(busy, PolicyConfig(cpu_share=0.3, may_offload=False))
    assert (decision.paradigm, decision.writes_draft) == ("split", False)
    assert choose(busy, PolicyConfig(cpu_share=0.5, may_offload=False)).writes_draft
    assert choose(busy, PolicyConfig(cpu_share=0.1)).paradigm == "offload"


def test_a_board_without_cpu_time_for_its_draft_expects_requests_of_the_usual_size():
    thin = with_values(KNOWN, estimate=known_link(1500.0, 300.0), draft_ms=30.0, interval_ms=20.0)
    roomy, short = (choose(thin, PolicyConfig(cpu_share=share, may_offload=False)) for share in (1.0, 0.5))
    assert (roomy.writes_draft, short.writes_draft) == (True, False)
    assert short.explain.expected_ms["split"] == roomy.explain.expected_ms["split"]


# ---- properties ----

ms = st.floats(0.1, 2000)
snapshots = st.builds(
    Snapshot,
    is_online=st.booleans(),
    link=st.builds(
        LinkSnapshot,
        estimate=st.none()
        | st.builds(known_link, ms, st.floats(256, 65536))
        | st.builds(LinkEstimate, ms, st.just(430.0)),
        change_chance=st.floats(0, 0.2),
        slowest=st.none() | st.builds(LinkEstimate, ms, st.just(512.0)),
        losses_in_row=st.integers(0, 4),
        reply_loss=st.none() | st.floats(0, 1),
        bytes_last_minute=st.integers(0, 10_000),
    ),
    server=st.builds(
        ServerSnapshot,
        queue_ms=st.none() | ms,
        server_ms=st.none() | ms,
        picture_server_ms=st.none() | ms,
        pass_ms=st.none() | st.floats(0, 50),
        plain_passes=st.none() | st.floats(1, 30),
        drafted_passes=st.none() | st.floats(1, 30),
    ),
    board=st.builds(
        BoardSnapshot,
        head_ms=st.none() | ms,
        draft_ms=st.none() | ms,
        encode_ms=st.none() | ms,
        accepted_unverified_share=st.none() | st.floats(0, 1),
        throttled=st.none() | st.booleans(),
        interval_ms=st.none() | ms,
    ),
)
configs = st.builds(
    PolicyConfig,
    bytes_per_minute=st.sampled_from([0, 400, 9000]),
    cpu_share=st.floats(0.01, 1),
    may_offload=st.booleans(),
)


@given(configs, st.lists(snapshots, max_size=12), st.booleans())
def test_the_same_inputs_give_the_same_decisions(config, several, has_head):
    first, second = (Policy(config, has_head=has_head) for _ in range(2))
    for number, snapshot in enumerate(several):
        assert first.choose(snapshot, number, DEADLINE_MS) == second.choose(snapshot, number, DEADLINE_MS)


@given(configs, snapshots, st.booleans(), st.booleans(), st.floats(0, 10_000))
def test_every_decision_is_possible_and_fits_an_event(config, snapshot, has_head, has_draft, deadline_ms):
    decision = Policy(config, has_head=has_head, has_draft=has_draft).choose(snapshot, 1.0, deadline_ms)
    assert decision.paradigm != "offload" or config.may_offload
    assert decision.paradigm not in ("split", "speculative") or has_head
    assert decision.paradigm != "speculative" or has_draft
    assert decision.explain.reason.startswith(f"{decision.paradigm}: ")
    event = Event(type="new", frame="0", camera="c", captured=EPOCH, explain=decision.explain)
    assert decode_event(encode_event(event)).explain == decision.explain


@given(snapshots.filter(lambda snapshot: snapshot.is_online and snapshot.link.losses_in_row < 1), ms)
def test_a_slower_draft_never_makes_speculative_the_choice(snapshot, more_ms):
    snapshot = with_values(snapshot, draft_ms=snapshot.board.draft_ms or 5.0)
    before = choose(snapshot)
    after = choose(with_values(snapshot, draft_ms=snapshot.board.draft_ms + more_ms))
    assert after.paradigm != "speculative" or before.paradigm == "speculative"


@given(snapshots.filter(lambda snapshot: snapshot.is_online and snapshot.link.losses_in_row < 1), st.floats(1.01, 50))
def test_a_slower_link_never_makes_offload_the_choice(snapshot, times):
    link = snapshot.link.estimate or LinkEstimate(100.0, 430.0)
    before = choose(with_values(snapshot, estimate=link))
    after = choose(with_values(snapshot, estimate=dataclasses.replace(link, ms=times * link.ms)))
    others_ms = [ms for paradigm, ms in after.explain.expected_ms.items() if paradigm not in ("offload", "device")]
    is_only_one_in_time = min(others_ms, default=0.0) >= DEADLINE_MS
    assert after.paradigm != "offload" or before.paradigm == "offload" or is_only_one_in_time


@given(snapshots, st.floats(50, 5000), st.floats(0, 5000))
def test_a_longer_deadline_never_leaves_the_frame_to_the_device(snapshot, deadline_ms, more_ms):
    policy = Policy(PolicyConfig())
    if policy.choose(snapshot, 0.0, deadline_ms).paradigm != "device":
        assert Policy(PolicyConfig()).choose(snapshot, 0.0, deadline_ms + more_ms).paradigm != "device"


# ---- in closed loop ----


def test_in_closed_loop_it_keeps_up_with_the_best_fixed_paradigm_and_with_an_oracle():
    figures = simulation.run(frames=240, seed=7)
    assert figures["worst_to_best_fixed"] <= 1.05
    assert figures["worst_to_oracle"] <= 1.10
