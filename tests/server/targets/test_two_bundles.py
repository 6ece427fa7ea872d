"""A server that has two bundles answers each board by its own, over a real broker."""

import threading

import msgspec
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import Status
from server.app import check, load, load_target, run_server
from server.config import ServerConfig
from server.engine import Job
from server.targets.bundle import BundleTarget
from server.targets.two_bundles import TwoBundles
from tests.brokers import Mosquitto
from tests.bundles import tiny_bundle
from tests.server.boards import PATIENCE_S, SYMBOLS, board_of, config, request


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("second") / "tiny", seed=35)


@pytest.fixture(scope="module")
def loaded(bundle: Bundle, second: Bundle) -> TwoBundles:
    target, _ = load_target(config(bundle, second_bundle=str(second.path)))
    assert isinstance(target, TwoBundles)
    return target


def own_texts(bundle: Bundle) -> list[tuple[int, ...]]:
    """The text of this bundle if it is the only one."""
    _, engine = load(ServerConfig("s1"), str(bundle.path))
    return [engine.answer([Job(symbols)])[0].tokens for symbols in SYMBOLS[:4]]


def test_two_boards_on_two_bundles_get_each_its_own_texts(broker: Mosquitto, bundle, second, loaded) -> None:
    texts, stop = [own_texts(each) for each in (bundle, second)], threading.Event()
    settings = config(bundle, broker.port, second_bundle=str(second.path), batch_wait_ms=200.0)
    with board_of(broker, "b1") as old, board_of(broker, "b2") as new:
        boards = list(zip((old, new), (bundle, second), texts, strict=True))
        server = threading.Thread(target=run_server, args=(settings, stop, None, (loaded, None)))
        server.start()
        try:
            status = old.wait_for_status(state="online", share_proven=True)
            assert status["bundles"] == {each.id.hex(): each.manifest.name for each in (bundle, second)}
            for i in range(4):  # both at once, so that they share a batch
                for board, its, _ in boards:
                    board.ask(request(its, i))
                for board, its, own in boards:
                    reply = board.reply()
                    assert (reply.status, tuple(reply.token_ids)) == (Status.OK, own[i])
                    assert reply.text == its.text(list(own[i]))
            old.ask(msgspec.structs.replace(request(bundle), bundle=bytes(8)))
            refused = old.reply()
            assert refused.status is Status.UNKNOWN_BUNDLE
            assert f"{bundle.id.hex()} and {second.id.hex()} is" in refused.error
        finally:
            stop.set()
            server.join(PATIENCE_S)
    assert not server.is_alive()
    assert texts[0] != texts[1]


def test_what_only_one_of_the_bundles_can_is_not_promised(bundle, second, loaded) -> None:
    assert loaded.abilities.pictures
    blind = BundleTarget(second, load(ServerConfig("s1"), str(second.path))[1])
    blind.engine.head = None
    assert not TwoBundles(loaded.first, blind).abilities.pictures


def test_one_bundle_twice_and_a_second_one_beside_another_model_are_refused_by_name(bundle, tmp_path) -> None:
    (tmp_path / "again").symlink_to(bundle.path)
    with pytest.raises(ConfigError, match="are the same bundle"):
        check(config(bundle, second_bundle=str(tmp_path / "again")))
    settings = config(bundle, target="hf:x", second_bundle="y")
    with pytest.raises(ConfigError, match="second_bundle is of no use with"):
        settings.check_target()
