"""What a plan accepts."""

import math

import pytest

from edge_runtime.planning import Plan


@pytest.mark.parametrize(
    ("min_confidence", "confidence", "accepted"),
    [
        (0.9, 0.9, True),
        (0.9, 0.89, False),
        (0.0, 0.0, True),
        (math.inf, 1.0, False),
        (0.9, math.nan, False),
        (0.9, math.inf, False),
        (None, 1.0, False),
    ],
)
def test_a_draft_is_accepted_without_verification_from_the_least_confidence_on(min_confidence, confidence, accepted):
    assert Plan("speculative", "for the test", 1000, min_confidence=min_confidence).accepts(confidence) is accepted
