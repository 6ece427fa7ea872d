"""Fixtures of the tools' tests."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _log_level_is_restored() -> Iterator[None]:
    """`aiflow doctor` silences the runtime's log, for its own process."""
    logger = logging.getLogger("edge_runtime")
    level = logger.level
    yield
    logger.setLevel(level)
