"""Small tables to code with: 8 channels of 3 x 4 in 4 groups, 2 levels, symbols beyond 3 escape."""

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from edge_runtime.wire.tables import Tables, count_inter_tables, count_tables

# A busy machine may take any time for an example, and the limit on a whole test stays.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def peaked(frames: int, spread: float, seed: int) -> NDArray[np.int8]:
    """Symbols int8 [frames, 8, 3, 4], mostly zero, correlated with their neighbours, with rare large values."""
    values = np.random.default_rng(seed).laplace(scale=spread, size=(frames, 8, 3, 4))
    values[..., 1:] += values[..., :-1] / 2
    return np.clip(np.rint(values), -127, 127).astype(np.int8)


@pytest.fixture(scope="session")
def training() -> list[NDArray[np.int8]]:
    return [peaked(200, 0.6, 1), peaked(200, 1.2, 2)]


@pytest.fixture(scope="session", params=[1, 3], ids=["one context", "three contexts"])
def tables(request: pytest.FixtureRequest, training: list[NDArray[np.int8]]) -> Tables:
    return count_tables(training, contexts=request.param, largest=3, set_id=300)


def later(frames: NDArray[np.int8], seed: int) -> NDArray[np.int8]:
    """The same scenes a moment later: some symbols have changed by one."""
    rng = np.random.default_rng(seed)
    changes = rng.integers(-1, 2, frames.shape) * (rng.random(frames.shape) < 0.1)
    return np.clip(frames + changes, -127, 127).astype(np.int8)


@pytest.fixture(scope="session")
def inter_tables(training: list[NDArray[np.int8]]) -> Tables:
    """For the same latent as `tables`."""
    pairs = [(frames, later(frames, 4)) for frames in training]
    return count_inter_tables(pairs, count_tables(training, contexts=3, largest=3, set_id=300))


@pytest.fixture(scope="session")
def frames() -> NDArray[np.int8]:
    """Twenty frames that the tables have not seen; escapes and extremes among them."""
    frames = peaked(20, 1.5, 3)
    frames[0] = 0
    frames[1] = 127
    frames[2] = -127
    frames[3, 0, 0, 0], frames[3, 7, 2, 3] = -4, 100
    return frames
