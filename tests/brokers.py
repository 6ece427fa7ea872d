"""Real brokers for the tests: Mosquitto on loopback ports. A test may kill, freeze and restart them."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from testbed import broker
from testbed.broker import PLAIN, find_mosquitto

__all__ = ["PLAIN", "Mosquitto", "mosquitto_or_skip", "skip"]


def mosquitto_or_skip() -> str:
    """The program. Without it, tests are skipped on a developer's machine and fail in CI."""
    return find_mosquitto() or skip("mosquitto is not installed: apt install mosquitto")


def skip(why: str) -> NoReturn:
    """Skips the test on a developer's machine and fails it in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


class Mosquitto(broker.Mosquitto):
    """One that logs everything, and skips the test if it is not installed."""

    def __init__(self, folder: Path, config: str = PLAIN) -> None:
        super().__init__(folder, config, program=mosquitto_or_skip(), verbose=True)
