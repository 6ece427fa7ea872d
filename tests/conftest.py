"""Fixtures that several test files share."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tests.brokers`: pytest's importlib mode adds no path of its own

from tests.brokers import PLAIN, Mosquitto


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """A function that starts a Mosquitto, plain or with a given configuration; all end with the test."""
    with ExitStack() as stack:
        yield lambda config=PLAIN: stack.enter_context(Mosquitto(tmp_path, config))


@pytest.fixture
def broker(start_broker: Callable[..., Mosquitto]) -> Mosquitto:
    return start_broker()
