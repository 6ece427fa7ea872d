"""Bundles for a store."""

from pathlib import Path

import pytest

from edge_runtime.inference.bundle import Bundle
from tests.edge_runtime.firmware.helpers import SMALL, variant


@pytest.fixture
def bundles(board_bundle: Bundle, tmp_path: Path) -> list[Bundle]:
    """The factory's, and three newer ones: b1, b2, b3."""
    names = ["factory", "b1", "b2", "b3"]
    return [variant(board_bundle, tmp_path / "bundles" / name, name, SMALL, name=name) for name in names]
