"""Less is sent on a thin link and with little budget left, and never less without a reason."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.config import PolicyConfig
from edge_runtime.planning import Policy
from edge_runtime.planning.feature_bytes import OTHER_BYTES, feature_bytes
from edge_runtime.planning.link_model import LinkEstimate
from tests.edge_runtime.planning.test_policy import DEADLINE_MS, KNOWN, known_link, with_values

LEVELS = (120.0, 400.0, 600.0)


def limit(config: PolicyConfig | None = None, **changes: object) -> int | None:
    """The limit of the first decision of a new policy."""
    policy = Policy(config or PolicyConfig(), level_bytes=LEVELS)
    return policy.choose(with_values(KNOWN, **changes), 0.0, DEADLINE_MS).max_feature_bytes


def test_a_usual_link_without_a_budget_sets_no_limit():
    assert limit() is None
    assert feature_bytes(with_values(KNOWN, estimate=None), 0, DEADLINE_MS) == inf


def test_a_link_that_carries_little_between_two_frames_limits_them():
    thin = LinkEstimate(1000.0, 430.0, window=570.0, min_window=570.0, max_window=570.0)  # a millisecond per byte
    assert limit(estimate=thin, interval_ms=600.0) == 300 - OTHER_BYTES
    slow = LinkEstimate(4 * 530.0, 430.0, window=100.0, min_window=100.0, max_window=100.0)  # four per byte
    assert limit(estimate=slow, interval_ms=60_000.0) == (2500 - 400) / 4 - OTHER_BYTES  # in half of the deadline


def test_a_long_round_trip_is_no_reason_to_send_less():
    assert limit(estimate=known_link(3000.0, 60_000.0), interval_ms=None) is None


def test_a_window_that_is_not_known_is_no_reason_to_send_less():
    assert limit(estimate=LinkEstimate(150.0, 430.0), interval_ms=20.0) is None


def test_each_frame_gets_its_share_of_a_small_budget():
    assert limit(PolicyConfig(bytes_per_minute=24_000), interval_ms=1000.0) == 400 - OTHER_BYTES


def test_at_the_end_of_a_budget_a_frame_gets_what_is_left():
    config = PolicyConfig(bytes_per_minute=24_000)
    assert limit(config, interval_ms=None, bytes_last_minute=23_700, bytes_last_quarter=100) == 300 - OTHER_BYTES


def test_a_bundle_with_one_level_is_never_limited():
    policy = Policy(PolicyConfig(bytes_per_minute=24_000))
    assert policy.choose(KNOWN, 0.0, DEADLINE_MS).max_feature_bytes is None


def test_smaller_features_keep_a_board_answering_within_a_budget_that_usual_ones_exceed():
    config = PolicyConfig(bytes_per_minute=24_000, may_offload=False)
    spent = with_values(KNOWN, bytes_last_minute=23_700, bytes_last_quarter=100)
    assert Policy(config).choose(spent, 0.0, DEADLINE_MS).paradigm == "device"
    assert Policy(config, level_bytes=LEVELS).choose(spent, 0.0, DEADLINE_MS).paradigm != "device"


@given(
    budget=st.integers(0, 10**6),
    spent=st.integers(0, 10**6),
    ms=st.floats(1, 1e6),
    window=st.floats(1, 1e6),
    interval=st.floats(1, 1e6),
)
def test_the_limit_is_at_least_the_coarsest_level(budget: int, spent: int, ms: float, window: float, interval: float):
    config = PolicyConfig(bytes_per_minute=budget)
    found = limit(config, estimate=known_link(ms, window), interval_ms=interval, bytes_last_minute=spent)
    assert found is None or found >= LEVELS[0]


@pytest.mark.parametrize("deadline_ms", [50.0, 5000.0, 600_000.0])
def test_a_longer_deadline_allows_no_less(deadline_ms: float):
    thin = with_values(KNOWN, estimate=LinkEstimate(1000.0, 430.0, 570.0, 570.0, 570.0), interval_ms=None)
    assert feature_bytes(thin, 0, 2 * deadline_ms) >= min(feature_bytes(thin, 0, deadline_ms), 1e5)
