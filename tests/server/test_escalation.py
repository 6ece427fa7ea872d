"""When a request goes up a tier, and what becomes of the envelope on its way there and back."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    ContentKind,
    Hop,
    Options,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    aged,
    decode_request,
    encode_reply,
    encode_request,
    encode_tokens,
)
from edge_runtime.wire.envelope import MAX_VIA
from server.escalation import (
    MAX_BOARDS,
    Above,
    Allowances,
    Bounds,
    Ranks,
    ask_until,
    is_loop,
    obstacle_to,
    own_reason,
    passed_down,
    passed_up,
    requested_reason,
)

REQUEST = Request(
    id=b"12345678",
    bundle=bytes(8),
    paradigm=Paradigm.SPLIT,
    age_ms=40,
    budget_ms=5000,
    content_kind=ContentKind.LATENT,
    content=b"bits",
    draft=encode_tokens([9, 9]),
)


BOUNDS = Bounds(min_confidence=0.5, max_share=0.5, explore=0.1)


@pytest.mark.parametrize(
    ("confidence", "rank", "chance", "reason"),
    [
        (0.4, 0.3, 0.5, "confidence"),
        (0.6, 0.3, 0.5, None),  # sure enough
        (0.4, 0.41, 0.5, None),  # others were less sure, and the share is spent on them
        (0.6, 0.9, 0.05, "explore"),
    ],
)
def test_an_answer_goes_up_by_the_operators_bounds(confidence, rank, chance, reason) -> None:
    assert own_reason(confidence, rank, BOUNDS, chance) == reason


@pytest.mark.parametrize(
    ("options", "confidence", "reason"),
    [
        (None, 0.0, None),
        (Options(tier=Tier.CLOUD), 1.0, "tier"),
        (Options(tier=Tier.EDGE), 1.0, None),
        (Options(min_confidence=0.7), 0.6, "confidence"),
        (Options(min_confidence=0.1), 0.4, None),
    ],
)
def test_an_answer_goes_up_because_its_request_asks_for_it(options, confidence, reason) -> None:
    assert requested_reason(options, Tier.EDGE, confidence) == reason


def test_without_bounds_nothing_goes_up() -> None:
    assert own_reason(0.0, 0.0, Bounds(), 0.0) is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
def test_a_board_that_always_asks_gets_its_share_and_others_lose_nothing(share: float) -> None:
    allowances = Allowances(share)
    granted = {"greedy": 0, "modest": 0}
    for i in range(4000):
        granted["greedy"] += allowances.spend("greedy", True)
        granted["modest"] += allowances.spend("modest", i % 10 == 9)
    assert granted["greedy"] == pytest.approx(4000 * share, abs=1)
    assert granted["modest"] == pytest.approx(4000 * min(share, 0.1), abs=1)


def test_no_more_boards_are_remembered_than_there_can_be() -> None:
    allowances = Allowances(0.5)
    for i in range(3 * MAX_BOARDS):
        allowances.spend(f"b{i}", True)
    assert len(allowances._saved) == MAX_BOARDS


@pytest.mark.parametrize("kinds", [1, 2, 10_000])  # of scenes, so of different confidences
@pytest.mark.parametrize(("share", "explore"), [(0.1, 0.02), (0.5, 0.02), (0.1, 0.5), (0.0, 0.02)])
def test_no_more_than_the_share_goes_up_whatever_the_confidences_are(kinds: int, share: float, explore: float) -> None:
    rng, ranks, bounds = random.Random(1), Ranks(), Bounds(min_confidence=1.0, max_share=share, explore=explore)
    up = 0
    for _ in range(4000):
        confidence = rng.randrange(kinds) / kinds
        rank = ranks.rank(confidence, rng.random())
        up += own_reason(confidence, rank, bounds, rng.random()) is not None
    assert up / 4000 == pytest.approx(share, abs=0.03)


def test_the_least_sure_rank_lowest_and_the_scale_does_not_matter() -> None:
    rng = random.Random(2)
    confidences = [rng.random() for _ in range(300)]
    for scale in (1.0, 0.001):
        ranks = Ranks()
        for confidence in confidences:
            ranks.rank(scale * confidence, 0.5)
        assert ranks.rank(0.0, 0.5) < 0.01
        assert ranks.rank(scale * 0.5, 0.5) == pytest.approx(0.5, abs=0.1)
        assert 0.99 < ranks.rank(scale, 0.5) < 1


@pytest.mark.parametrize(
    ("above", "left_s", "obstacle"),
    [
        (None, 9.0, "no_upstream"),
        (Above(is_online=False, has_room=True, round_trip_s=0.0), 9.0, "offline"),
        (Above(is_online=True, has_room=False, round_trip_s=0.0), 9.0, "full"),
        (Above(is_online=True, has_room=True, round_trip_s=0.5), 0.5, "too_late"),
        (Above(is_online=True, has_room=True, round_trip_s=0.0), 0.0, "too_late"),
        (Above(is_online=True, has_room=True, round_trip_s=0.5), 0.6, None),
    ],
)
def test_what_keeps_a_request_from_going_up_has_a_name(above, left_s, obstacle) -> None:
    assert obstacle_to(above, left_s) == obstacle


def test_one_board_may_not_fill_the_tier_above() -> None:
    above = Above(is_online=True, has_room=True, round_trip_s=0.0)
    assert obstacle_to(above, 9.0, board_has_room=False) == "board_full"


@given(st.floats(0, 1e9), st.floats(0, 1e6))
def test_time_is_left_for_the_last_reply(arrived_at: float, budget_s: float) -> None:
    deadline = arrived_at + budget_s
    assert arrived_at <= ask_until(arrived_at, deadline) <= deadline
    assert deadline - ask_until(arrived_at, deadline) <= 1.0 + 1e-6


def test_the_same_envelope_goes_up_with_the_lower_tiers_text_as_its_draft() -> None:
    up = decode_request(encode_request(passed_up(REQUEST, "e1", [7, 300], waited_s=0.25)))
    assert (up.id, up.bundle, up.content_kind, up.content) == (b"12345678", bytes(8), ContentKind.LATENT, b"bits")
    assert (up.paradigm, up.draft_ids, up.options) == (Paradigm.SPECULATIVE, [7, 300], Options(via=("e1",)))
    assert (up.age_ms, up.budget_ms) == (290, 4750)


@pytest.mark.parametrize(("own", "passed"), [(None, int.from_bytes(b"12345678", "big")), (9, 9)])
def test_a_sampled_request_goes_up_with_the_seed_of_its_noise(own: int | None, passed: int) -> None:
    asked = msgspec.structs.replace(REQUEST, options=Options(temperature=0.5, seed=own))
    up = passed_up(asked, "e1", [7], waited_s=0.0)
    assert (up.options.seed, up.options.temperature) == (passed, 0.5)


def test_a_picture_goes_up_as_a_picture_with_its_options() -> None:
    options = Options(tier=Tier.CLOUD, max_tokens=5, via=("e0",))
    picture = Request(
        id=bytes(8),
        bundle=bytes(8),
        paradigm=Paradigm.OFFLOAD,
        age_ms=0,
        budget_ms=100,
        content_kind=ContentKind.JPEG,
        content=b"",
        options=options,
    )
    up = passed_up(picture, "e1", [7], waited_s=0.0)
    assert up.paradigm is Paradigm.OFFLOAD
    assert up.options == Options(tier=Tier.CLOUD, max_tokens=5, via=("e0", "e1"))


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF), st.floats(0, 1e7), st.floats(-10, 4e6))
def test_any_age_and_budget_can_be_sent_again_later(age_ms, budget_ms, waited_s, left_s) -> None:
    request = Request(
        id=bytes(8),
        bundle=bytes(8),
        paradigm=Paradigm.SPLIT,
        age_ms=age_ms,
        budget_ms=budget_ms,
        content_kind=ContentKind.LATENT,
        content=b"",
    )
    encode_request(aged(request, waited_s, left_s))


def test_a_request_that_comes_back_or_has_passed_too_many_is_a_loop() -> None:
    full = tuple(f"e{i}" for i in range(MAX_VIA))
    assert not is_loop(Options(), "e1")
    assert not is_loop(Options(via=("e0", "e2")), "e1")
    assert is_loop(Options(via=("e0", "e1")), "e1")
    assert is_loop(Options(via=full), "other")
    assert not is_loop(Options(via=full[:-1]), "other")


@given(st.integers(0, 16))
def test_a_reply_from_above_is_told_as_it_is_behind_our_own_hop(hops: int) -> None:
    own = Reply(id=b"12345678", status=Status.OK, server="e1", hops=(Hop(Tier.EDGE, "e1", 1, 2),))
    theirs = tuple(Hop(Tier.CLOUD, f"c{i}", 3, 4) for i in range(hops))
    above = Reply(id=b"abcdefgh", status=Status.OK, tier=Tier.CLOUD, server="c1", accepted=3, label="cat", hops=theirs)
    told = passed_down(own, above)
    assert (told.id, told.tier, told.server, told.accepted, told.label) == (b"12345678", Tier.CLOUD, "c1", 3, "cat")
    assert told.hops[0].server == "e1"
    assert told.hops[1:] == theirs[:15]
    encode_reply(told)
