"""One small bundle and its engine for all tests of the server."""

import threading
from collections.abc import Callable, Iterator

import pytest

from edge_runtime.inference.bundle import Bundle
from server.app import run_server
from server.engine import Engine
from server.loading import ready_engine
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets.bundle import BundleTarget
from tests.brokers import Mosquitto
from tests.bundles import tiny_bundle
from tests.server.boards import PATIENCE_S, Board, board_of, config


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def engine(bundle: Bundle) -> Engine:
    """Both tiers, on one thread, with every proven batch size."""
    return ready_engine(bundle, ("edge", "cloud"), threads=1)


@pytest.fixture
def board(broker: Mosquitto) -> Iterator[Board]:
    with board_of(broker, "b1") as board:
        yield board


@pytest.fixture
def server(broker: Mosquitto, board: Board, bundle: Bundle) -> Iterator[threading.Event]:
    """A running server; the event stops it."""
    stop = threading.Event()
    thread = threading.Thread(target=run_server, args=(config(bundle, broker.port), stop))
    thread.start()
    try:
        board.wait_for_status(state="online", share_proven=True)
        yield stop
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.fixture
def make_service(bundle: Bundle, engine: Engine) -> Callable[..., Service]:
    def make(**changes: object) -> Service:
        settings = config(bundle, **changes).server
        return Service(settings, BundleTarget(bundle, engine, settings.tier, settings.max_batch), ReplyCache())

    return make
