from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.inference.backends import SUFFIXES, BackendError
from edge_runtime.inference.head import SHIFT, Head, codes_to_symbols, symbol_factor
from tests import exports

uint8 = st.integers(0, 255)


@given(st.lists(uint8, min_size=1), uint8, st.integers(1, 1 << (SHIFT - 1)))
@example([9, 10, 11, 12, 13, 14], 11, 1 << (SHIFT - 1))  # -1, -0.5, 0, 0.5, 1, 1.5
def test_a_symbol_is_the_nearest_integer_and_a_tie_goes_up(codes, zero_point, factor):
    found = codes_to_symbols(np.array(codes, np.uint8), zero_point, factor)
    exact = [floor(Fraction((code - zero_point) * factor, 1 << SHIFT) + Fraction(1, 2)) for code in codes]
    assert found.tolist() == np.clip(exact, -127, 127).tolist()


@given(st.lists(uint8, min_size=1), uint8)
def test_signed_and_unsigned_codes_mean_the_same(codes, zero_point):
    unsigned = np.array(codes, np.uint8)
    signed = (unsigned ^ 0x80).view(np.int8)
    factor = symbol_factor(1 / 20, 1.0)
    found = codes_to_symbols(unsigned, zero_point, factor), codes_to_symbols(signed, zero_point - 128, factor)
    assert found[0].tolist() == found[1].tolist()


@pytest.mark.parametrize("scale", [0.0, 0.51, -0.1])
def test_codes_too_coarse_for_symbols_are_refused(scale):
    with pytest.raises(BackendError, match=r"want above 0 and at most 0.5"):
        symbol_factor(scale, 1.0)


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_a_coarser_level_has_smaller_symbols(tmp_path, suffix):
    head = Head(exports.loaded(tmp_path, f"head{suffix}"), gains=(0.25, 1.0))
    picture = exports.pictures(1, seed=6)[0].numpy()
    coarse, fine = head.symbols(picture, level=0), head.symbols(picture)
    assert fine.shape == (64, 7, 7)
    assert fine.dtype == np.int8
    assert 0 < np.abs(coarse).sum() < np.abs(fine).sum() / 2
