"""A board gets offers and chunks of anybody: python-tuf's list of attacks, over a real broker."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.app import Board, run_board
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig, SamplingConfig, UpdatesConfig
from edge_runtime.errors import ConfigError, RestartError
from edge_runtime.firmware.incoming import StoreError
from edge_runtime.firmware.signature import (
    MAX_SIGNATURE_BYTES,
    MAX_VERSION,
    SIGNATURE,
    SignatureError,
    claimed,
    statement_of,
)
from edge_runtime.firmware.store import INCOMING, MAX_STARTS, Store, entry_of
from edge_runtime.firmware.updates import TRIAL_FRAMES, TRIAL_S, Updates, store_of
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.mqtt.routes import Route, Router
from edge_runtime.pipeline import Pipeline
from edge_runtime.shutdown import Stop
from edge_runtime.wire import EnvelopeError, topics
from edge_runtime.wire.update import (
    CHUNK_BYTES,
    MAX_CHUNK,
    VERSION,
    Chunk,
    UpdateState,
    decode_chunk,
    decode_update_state,
    encode_chunk,
)
from tests.brokers import Mosquitto
from tests.edge_runtime.firmware.helpers import (
    KEY,
    NEVER,
    OTHER_KEY,
    TODAY,
    install,
    rewritten,
    running,
    sign,
    trust,
    variant,
)
from tests.listener import PATIENCE_S, QUICK, Listener, until

SITE, BOARD = "home", "b1"
OFFER, CHUNK = topics.bundle_offer(SITE, BOARD), topics.bundle_chunk(SITE, BOARD)


class Station:
    """A board's updates behind a real MQTT client, and a sender."""

    def __init__(self, store: Store, port: int, stack: ExitStack, asks: bool = False, today: date = TODAY) -> None:
        self.restart, self.self_test_fails = threading.Event(), False
        self.today, self.now = today, 0.0
        self.updates = Updates(
            store, self._self_test, self._publish, today=lambda: self.today, asks=asks, clock=lambda: self.now
        )
        self.updates.stop_with(self.restart)
        install = Route(topics.bundle_install(SITE, BOARD), self.updates.install_arrived)
        self.router = Router([*self.updates.routes(SITE, BOARD), install])
        self.client = MqttClient(
            MqttConfig(port=port).settings(BOARD),
            subscriptions=self.router.subscriptions,
            on_message=self.router.message_arrived,
            timing=QUICK,
        )
        stack.enter_context(self.client)
        assert self.client.wait_online(PATIENCE_S)
        stack.enter_context(self.updates)
        self.sender = stack.enter_context(Listener(port, topics.bundle_state(SITE, BOARD)))

    def _self_test(self, _: Path) -> None:
        if self.self_test_fails:
            raise StoreError("the self-test of the bundle failed")

    def _publish(self, payload: bytes) -> None:
        self.client.publish(topics.bundle_state(SITE, BOARD), payload)

    def offer(self, signature: bytes) -> UpdateState:
        """The board's answer to an offer."""
        self.sender.client.publish(OFFER, signature)
        return self.next()

    def tell(self, word: bytes) -> UpdateState:
        """The board's answer to a user's word."""
        self.sender.client.publish(topics.bundle_install(SITE, BOARD), word)
        return self.next()

    def next(self) -> UpdateState:
        return decode_update_state(self.sender.next())

    def send(self, file: str, offset: int, data: bytes) -> None:
        self.sender.client.publish(CHUNK, encode_chunk(Chunk(VERSION, bytes.fromhex(file), offset, data)))

    def send_all(self, state: UpdateState, bundle: Bundle) -> UpdateState:
        """Answers the board until it wants no more; returns what it says then."""
        names = {record.sha256: name for name, record in bundle.manifest.files.items()}
        while state.state == "wants":
            data = (bundle.path / names.get(state.file, "manifest.json")).read_bytes()
            for start in range(state.offset, state.offset + state.bytes, CHUNK_BYTES):
                self.send(state.file, start, data[start : min(start + CHUNK_BYTES, state.offset + state.bytes)])
            state = self.next()
        return state


@pytest.fixture
def store(bundles: list[Bundle], tmp_path: Path) -> Store:
    """With b1 kept, as version 2."""
    store = Store(tmp_path / "store", trust(tmp_path), (), bundles[0].path)
    install(store, bundles[1], 2)
    store.keep()
    return store


@pytest.fixture
def station(store: Store, broker: Mosquitto) -> Iterator[Callable[[Store], Station]]:
    with ExitStack() as stack:
        yield lambda store=store, **values: Station(store, broker.port, stack, **values)


def files(store: Store) -> set[str]:
    return {path.name for path in store.folder.rglob("*")}


def test_a_signed_newer_bundle_is_received_installed_and_the_board_starts_again(station, store, bundles):
    board = station()
    state = board.send_all(board.offer(sign(bundles[2], 3)[1]), bundles[2])
    assert state.state == "testing"
    assert board.next().state == "installed"
    assert board.restart.wait(PATIENCE_S)
    assert board.offer(sign(bundles[2], 3)[1]).state == "installed"  # it was not heard
    assert running(store) == "b2"


def test_a_bundle_that_waits_during_a_trial_can_be_installed_after_it(station, store, bundles):
    install(store, bundles[2], 3)  # on trial
    board = station(asks=True)
    assert board.send_all(board.offer(sign(bundles[3], 4)[1]), bundles[3]).state == "waiting"
    for _ in range(TRIAL_FRAMES):
        board.updates.frame_handled(0)
    assert board.next().state == "kept"
    assert board.updates.status()["state"] == "waiting"
    assert board.tell(b"install").state == "testing"


def test_a_board_that_asks_installs_a_bundle_when_a_user_says_so_and_not_before(station, store, bundles):
    board, (_, signature) = station(asks=True), sign(bundles[2], 3)
    assert board.send_all(board.offer(signature), bundles[2]).state == "waiting"
    assert board.updates.status() == {"state": "waiting", "failed": "", "why": "", "version": 3, "percent": 100}
    for other in (sign(bundles[3], 4, key=OTHER_KEY)[1], sign(bundles[3], 1)[1]):  # a stranger's, and an old one
        assert board.offer(other).state == "refused"
        assert {"state": "waiting", "version": 3, "percent": 100}.items() <= board.updates.status().items()
    board.sender.client.publish(topics.bundle_install(SITE, BOARD), b"ON")
    assert board.offer(signature).state == "waiting"
    assert not board.restart.is_set()
    assert board.tell(b"install").state == "testing"
    assert board.next().state == "installed"
    assert board.restart.wait(PATIENCE_S)
    assert running(store) == "b2"


def test_a_bundle_that_waits_still_does_after_a_restart_and_is_refused_when_expired(station, store, bundles, broker):
    with ExitStack() as first_start:
        board = Station(store, broker.port, first_start, asks=True)
        assert board.send_all(board.offer(sign(bundles[2], 3, TODAY)[1]), bundles[2]).state == "waiting"
    board = station(asks=True, today=date(1970, 1, 1))  # a clock that a time service sets later
    until(lambda: board.updates.status()["state"] == "waiting")
    board.today = TODAY + timedelta(days=1)
    while (state := board.tell(b"install")).state == "waiting":  # said at the start
        pass
    assert (state.state, "expired" in state.why) == ("refused", True)
    assert board.updates.status()["version"] == 0
    assert running(store) == "b1"


def test_a_damaged_signature_of_an_earlier_transfer_does_not_stand_in_the_way(station, store, bundles):
    (store.folder / INCOMING).mkdir()
    (store.folder / INCOMING / SIGNATURE).write_bytes(bytes(MAX_SIGNATURE_BYTES + 1))
    board = station(asks=True)
    assert board.send_all(board.offer(sign(bundles[2], 3)[1]), bundles[2]).state == "waiting"


def test_a_word_to_install_without_a_bundle_that_waits_changes_nothing(station, store, bundles):
    board = station()
    board.sender.client.publish(topics.bundle_install(SITE, BOARD), b"install")
    state = board.offer(sign(bundles[2], 3)[1])
    board.sender.client.publish(topics.bundle_install(SITE, BOARD), b"install")
    assert board.send_all(state, bundles[2]).state == "testing"


def test_the_status_tells_the_version_that_comes_and_how_much_of_it_is_here(station, store, bundles):
    board = station()
    seen = []
    board.updates._on_change = lambda: seen.append(board.updates.status())
    assert board.send_all(board.offer(sign(bundles[2], 3)[1]), bundles[2]).state == "testing"
    assert board.next().state == "installed"
    assert {each["version"] for each in seen} == {3}
    percents = [each["percent"] for each in seen]
    assert percents == sorted(percents)
    assert (percents[0], percents[-1], len(percents) <= 14) == (0, 100, True)
    assert any(0 < percent < 100 for percent in percents)


def test_arbitrary_software_is_refused_before_anything_is_stored(station, store, bundles):
    board, before = station(), files(store)
    for signature in (b"", b"{}\nAAAA\n", sign(bundles[2], 3)[1][:-2], sign(bundles[2], 3, key=OTHER_KEY)[1]):
        state = board.offer(signature)
        assert (state.state, bool(state.why)) == ("refused", True)
    assert files(store) == before


def test_an_older_bundle_a_replayed_one_and_an_expired_one_are_refused_by_name(station, store, bundles):
    board, before = station(), files(store)
    for bundle, version, expires, why in (
        (bundles[2], 1, date(2099, 1, 1), "has version 1, and 2 was installed"),  # rollback attack
        (bundles[2], 2, date(2099, 1, 1), "has version 2, and 2 was installed"),
        (bundles[2], 3, date(2029, 12, 31), "expired on 2029-12-31"),  # freeze attack
    ):
        state = board.offer(sign(bundle, version, expires)[1])
        assert state.state == "refused"
        assert why in state.why
    assert files(store) == before


def test_a_stolen_key_with_the_highest_version_ends_the_updates_only_while_it_is_trusted(
    station, store, bundles, tmp_path
):
    """Fast-forward attack."""
    install(store, bundles[2], MAX_VERSION)
    both = Store(store.folder, trust(tmp_path, KEY, OTHER_KEY), (), store.factory)
    _, signature = sign(bundles[3], 3, key=OTHER_KEY)
    with pytest.raises(SignatureError, match=f"{MAX_VERSION} was installed"):
        both.check_new(claimed(signature), TODAY)
    rotated = Store(store.folder, trust(tmp_path, OTHER_KEY), (), store.factory)
    board = station(rotated)
    assert board.send_all(board.offer(signature), bundles[3]).state == "testing"
    assert board.next().state == "installed"
    assert running(rotated) == "b3"
    assert "trusted keys" in board.offer(sign(bundles[1], MAX_VERSION)[1]).why


def test_a_sender_that_is_slower_than_the_expiry_date_does_not_get_its_bundle_installed(station, store, bundles):
    """Slow retrieval attack."""
    board, before = station(), files(store)
    state = board.offer(sign(bundles[2], 3, TODAY)[1])
    data = (bundles[2].path / "manifest.json").read_bytes()
    for offset in range(10):
        board.send(state.file, offset, data[offset : offset + 1])
    again = board.offer(sign(bundles[2], 3, TODAY)[1])
    assert (again.state, again.offset) == ("wants", 10)
    board.today = TODAY + timedelta(days=1)
    board.send(state.file, 10, data[10:])
    refused = board.next()
    assert (refused.state, "expired" in refused.why) == ("refused", True)
    assert (files(store), running(store)) == (before, "b1")


@pytest.mark.parametrize(
    ("case", "told"),
    [("signed", ""), ("unsigned", "is unsigned"), ("foreign", "trusted keys"), ("moved", "another bundle")],
)
def test_a_bundle_of_the_configuration_that_nobody_trusted_has_signed_runs_with_a_warning(
    store, bundles, caplog, case, told
):
    factory = bundles[0]
    if case != "unsigned":
        sign(factory, 1, key=OTHER_KEY if case == "foreign" else KEY)
    if case == "moved":
        (factory.path / SIGNATURE).write_bytes(sign(bundles[1], 1)[1])
    store.roll_back()
    caplog.clear()
    for board_store in (Store(store.folder, (), (), factory.path), store):  # without a trust_file, and with one
        assert caplog.messages == []
        updates = Updates(board_store, lambda _: None, lambda _: None)
        assert updates.bundle.id == factory.id
    assert [told in message for message in caplog.messages] == ([True] if told else [])


def test_while_the_clock_has_lost_its_time_no_bundle_is_taken_and_one_that_waits_stays(station, store, bundles):
    board, before, (_, signature) = station(asks=True), files(store), sign(bundles[2], 3, date(2029, 12, 31))
    board.today = date(1970, 1, 1)
    state = board.offer(signature)
    assert (state.state, "clock says 1970-01-01" in state.why) == ("refused", True)
    assert files(store) == before
    board.today = date(2029, 12, 31)
    assert board.send_all(board.offer(signature), bundles[2]).state == "waiting"
    board.today = date(1970, 1, 1)
    assert board.tell(b"install").state == board.offer(signature).state == "refused"
    board.today = date(2029, 12, 31)
    assert board.tell(b"install").state == "testing"


def test_the_offer_of_what_runs_changes_nothing(station, store, bundles):
    before = files(store)
    assert station().offer(sign(bundles[1], 2)[1]).state == "kept"
    assert files(store) == before


def test_a_retained_and_an_oversized_offer_are_counted_and_not_used(station, store, bundles):
    board = station()
    _, good = sign(bundles[2], 3)
    routed = board.router.message_arrived
    routed(Message(OFFER, good, 1, True, None, lambda: None))
    routed(Message(OFFER, b"x" * (MAX_SIGNATURE_BYTES + 1), 1, False, None, lambda: None))
    routed(Message(CHUNK, b"x" * (MAX_CHUNK + 1), 1, False, None, lambda: None))
    assert {why: count for why, count in board.router.rejected().items() if count} == {"retained": 1, "no_update": 2}


def test_endless_data_and_a_wrong_file_are_refused_and_the_offer_can_be_repeated(station, store, bundles):
    board = station()
    _, signature = sign(bundles[2], 3)
    for extra in (0, 1):
        state = board.offer(signature)
        assert (state.state, state.offset) == ("wants", 0)
        board.send(state.file, 0, bytes(state.bytes + extra))
        refused = board.next()
        assert refused.state == "refused"
        assert ("more than" if extra else "hash") in refused.why
    assert board.send_all(board.offer(signature), bundles[2]).state == "testing"


def test_chunks_that_nobody_asked_for_change_nothing(station, store, bundles):
    board, before = station(), files(store)
    board.send("00" * 32, 0, b"x")
    board.sender.client.publish(CHUNK, b"no chunk")
    assert board.offer(sign(bundles[1], 2)[1]).state == "kept"  # it has handled the others before
    assert files(store) == before


def test_a_truncated_transfer_is_not_installed_and_goes_on_later(station, store, bundles):
    board = station()
    _, signature = sign(bundles[2], 3)
    state = board.offer(signature)
    board.send(state.file, 0, (bundles[2].path / "manifest.json").read_bytes()[: state.bytes // 2])
    again = board.offer(signature)
    assert (again.state, again.offset) == ("wants", state.bytes // 2)
    assert running(store) == "b1"


def test_another_offer_takes_the_place_of_one_that_is_not_complete(station, store, bundles):
    board = station()
    board.offer(sign(bundles[2], 3)[1])
    assert board.send_all(board.offer(sign(bundles[3], 4)[1]), bundles[3]).state == "testing"
    assert board.next().state == "installed"
    assert running(store) == "b3"


def test_a_board_that_trusts_nobody_takes_nothing_over_mqtt(station, store, bundles):
    board = station(Store(store.folder, (), (), store.factory))
    state = board.offer(sign(bundles[2], 3)[1])
    assert (state.state, "trust_file" in state.why) == ("refused", True)


def test_a_bundle_that_fails_its_self_test_is_refused_and_leaves_no_file(station, store, bundles):
    board = station()
    board.self_test_fails = True
    assert board.send_all(board.offer(sign(bundles[2], 3)[1]), bundles[2]).state == "testing"
    state = board.next()
    assert (state.state, "self-test" in state.why) == ("refused", True)
    assert not (store.folder / INCOMING).exists()
    assert board.updates.status()["why"] == state.why
    assert not board.restart.is_set()


def test_a_trial_ends_well_after_some_frames(station, store, bundles):
    install(store, bundles[2], 3)
    board = station()
    assert board.updates.is_trial
    for _ in range(TRIAL_FRAMES - 1):
        board.updates.frame_handled(0)
    assert board.updates.is_trial
    board.updates.frame_handled(0)
    assert (board.next().state, board.updates.is_trial) == ("kept", False)
    assert store.state().starts is None


@pytest.mark.parametrize(
    ("seconds", "failed", "is_kept"), [(TRIAL_S - 1, 0, False), (TRIAL_S, 0, True), (TRIAL_S, 1, False)]
)
def test_a_board_with_few_frames_keeps_a_bundle_after_a_time_without_a_failure(
    station, store, bundles, seconds, failed, is_kept
):
    install(store, bundles[2], 3)
    board = station()
    board.now = seconds
    board.updates.frame_handled(failed)
    assert board.updates.is_trial is not is_kept


def test_a_bundle_on_trial_whose_frames_fail_is_given_up(station, store, bundles):
    install(store, bundles[2], 3)
    board = station()
    for failed in range(1, TRIAL_FRAMES + 1):
        board.updates.frame_handled(failed)
    assert board.restart.is_set()
    assert "frames failed" in board.updates.restart_why
    assert running(store) == "b1"


@pytest.mark.parametrize("failed", [0, TRIAL_FRAMES])
def test_the_end_of_a_trial_says_nothing_of_a_bundle_that_an_operator_has_installed_since(
    station, store, bundles, failed
):
    install(store, bundles[2], 3)
    board = station()
    install(store, bundles[3], 4)  # `aiflow bundle install` beside the board that runs
    for _ in range(TRIAL_FRAMES):
        board.updates.frame_handled(failed)
    assert (store.state().current, store.state().starts) == (entry_of(statement_of(bundles[3], 4, NEVER)), 0)
    assert [running(store) for _ in range(MAX_STARTS + 1)] == ["b3"] * MAX_STARTS + ["b1"]


@pytest.mark.parametrize("fault", ["network", "stop word"])
def test_a_bundle_on_trial_that_does_not_load_or_fit_the_configuration_is_given_up_at_once(
    board_bundle, tmp_path, fault
):
    bad = variant(board_bundle, tmp_path / "bad", "bad", name="bad")
    stop = (board_bundle.words[10],)
    assert stop[0] not in bad.words
    if fault == "network":
        (bad.path / "head.onnx").write_bytes(b"no network")
        bad, stop = rewritten(bad, bad.path, tuple(bad.manifest.files)), ()
    trust(tmp_path)
    config = RuntimeConfig(
        BoardConfig(BOARD, str(board_bundle.path), backend="onnx"),
        (CameraConfig("door", "mqtt", sampling=SamplingConfig(stop=stop)),),
        updates=UpdatesConfig(str(tmp_path / "store"), str(tmp_path / "trust")),
    )
    store = store_of(config)
    assert store is not None
    install(store, bad, 1)
    with pytest.raises(RestartError, match="bad version 1 does not work"):
        Board(config)
    board = Board(config)
    board.servers.close()
    status = json.loads(board._status("online").payload)
    assert (status["bundle"], status["update"]["failed"]) == (board_bundle.id.hex(), f"bad-1-{bad.id.hex()}")


def test_a_board_that_is_stopped_while_it_tries_a_backend_goes_on_with_the_trial_of_its_bundle(
    board_bundle, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing is kept there
    trust(tmp_path)
    config = RuntimeConfig(
        BoardConfig(BOARD, str(board_bundle.path)),
        (CameraConfig("door", "mqtt"),),
        updates=UpdatesConfig(str(tmp_path / "store"), str(tmp_path / "trust")),
    )
    store = store_of(config)
    assert store is not None
    new = variant(board_bundle, tmp_path / "new", "new", name="new")
    install(store, new, 1)
    stop = threading.Event()
    stop.set()
    for _ in range(MAX_STARTS + 1):
        assert run_board(config, stop) == {}
    assert running(store) == new.manifest.name


@pytest.mark.parametrize("end", ["in order", "camera", "frame path", "thread"])
def test_only_an_orderly_end_does_not_count_against_a_bundle_on_trial(board_bundle, broker, tmp_path, monkeypatch, end):
    trust(tmp_path)
    config = RuntimeConfig(
        BoardConfig(BOARD, str(board_bundle.path), paradigm="offload"),
        (CameraConfig("door", "mqtt"),),
        MqttConfig(port=broker.port),
        updates=UpdatesConfig(str(tmp_path / "store"), str(tmp_path / "trust")),
    )
    store = store_of(config)
    assert store is not None
    new = variant(board_bundle, tmp_path / "new", "new", name="new")
    install(store, new, 1)
    stop = Stop()
    stop.set()
    stop.is_broken = end == "thread"  # as the hook of threading sets it
    if end == "frame path":
        monkeypatch.setattr(Pipeline, "run", lambda *_: 1 / 0)
    if end == "camera":
        config = replace(config, cameras=(CameraConfig("door", str(tmp_path / "no.mp4")),))
    counted, finish = [], MqttClient.finish

    def finishes(client: MqttClient, *arguments: float) -> None:
        counted.append(store.state().starts)
        finish(client, *arguments)

    monkeypatch.setattr(MqttClient, "finish", finishes)
    with suppress(RuntimeError, ConfigError):
        run_board(config, stop)
    counts = int(end in ("frame path", "thread"))
    assert store.state().starts == counts
    assert counted[0] == counts  # before the rest of the end, which a kill may cut off


@given(
    st.builds(
        Chunk,
        st.just(VERSION),
        st.binary(min_size=32, max_size=32),
        st.integers(0, 1 << 36),
        st.binary(min_size=1, max_size=64),
    )
)
def test_a_chunk_survives_the_wire(chunk):
    assert decode_chunk(encode_chunk(chunk)) == chunk


@given(st.binary(max_size=256))
def test_any_bytes_are_a_message_or_an_error(data):
    for decode in (decode_chunk, decode_update_state):
        with suppress(EnvelopeError):
            decode(data)
