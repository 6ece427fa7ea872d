"""Figures as people read them."""

import math

import pytest

from testbed.terminal import short


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (3, "3"), (0.97436, "0.9744"), (14401.3, "14401"), (1e300, "1e+300"), (math.inf, "inf"), ("a", "a")],
)
def test_a_figure_has_no_exponent_that_a_reader_must_undo(value: object, text: str) -> None:
    assert short(value) == text
