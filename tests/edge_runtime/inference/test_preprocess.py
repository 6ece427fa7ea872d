import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.inference.preprocess import PIXELS, to_input


def scene(width: int, height: int) -> np.ndarray:
    """RGB: red grows to the right, green downwards, blue is constant."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


@given(st.integers(1, 700), st.integers(1, 700))
def test_any_size_is_squashed_to_the_input(width, height):
    pixels = to_input(np.full((height, width, 3), (10, 120, 250), np.uint8))
    assert pixels.shape == (PIXELS, PIXELS, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (10, 120, 250)).all()


@pytest.mark.parametrize("size", [(PIXELS, PIXELS), (448, 448), (640, 480), (480, 640), (1280, 720), (230, 2000)])
def test_the_whole_frame_is_seen_at_any_size(size):
    squashed = to_input(scene(*size)).astype(int)
    assert np.abs(squashed - scene(PIXELS, PIXELS)).max() <= 3


@pytest.mark.parametrize("side", [8 * PIXELS, 9 * PIXELS - 1])  # even: by halves; odd: at once
def test_shrinking_averages_so_that_fine_patterns_turn_grey(side):
    board = np.indices((side, side)).sum(0) % 2 * 255
    assert np.abs(to_input(np.dstack(3 * [board.astype(np.uint8)])).astype(int) - 127).max() < 10


@pytest.mark.parametrize(("width", "height"), [(512, 512), (640, 480), (800, 600), (1920, 1080)])
def test_the_fast_ways_to_shrink_differ_little_from_an_average_over_areas(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height // 2, width // 2, 3), np.uint8)
    picture = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    exact = cv2.resize(picture, (PIXELS, PIXELS), interpolation=cv2.INTER_AREA)
    assert np.abs(to_input(picture).astype(int) - exact).mean() < 2


def test_a_frame_of_the_inputs_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
    assert np.array_equal(to_input(pixels), pixels)
