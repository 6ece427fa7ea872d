"""Fixtures that several test files share."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests.brokers`: pytest's importlib mode adds no path

from edge_runtime.inference.bundle import Bundle
from tests import event_contract
from tests.brokers import PLAIN, Mosquitto

# On a busy machine an example may take any time; the limit on a whole test still applies.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _events_are_seen() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_runtime.wire.event.decode_event", event_contract.read)  # encode_event reads what it writes
        patch.setattr("testbed.processes.decode_event", event_contract.read)  # which reads those of child processes
        yield
    event_contract.check()


@pytest.fixture(scope="session", autouse=True)
def _choices_are_kept_for_the_tests_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which backend is the fastest is measured once, here and in child processes, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _events_follow_their_contract(_events_are_seen: None) -> Iterator[None]:
    yield
    event_contract.check()


@pytest.fixture(autouse=True)
def _log_level_is_restored() -> Iterator[None]:
    """`aiflow doctor` and `aiflow validate --connect` silence the runtime's log, for their own process."""
    logger = logging.getLogger("edge_runtime")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """A function that starts a Mosquitto, plain or with the given configuration. They end with the test."""
    with ExitStack() as stack:
        yield lambda config=PLAIN: stack.enter_context(Mosquitto(tmp_path, config))


@pytest.fixture
def broker(start_broker: Callable[..., Mosquitto]) -> Mosquitto:
    return start_broker()


@pytest.fixture(scope="session")
def board_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small bundle with all files for board and server."""
    from tests.bundles import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "board", board=True)
