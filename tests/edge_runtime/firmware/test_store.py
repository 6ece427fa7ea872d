"""Which bundle a board starts with, whatever happened before."""

import errno
import multiprocessing
from datetime import date
from pathlib import Path

import pytest

from edge_runtime.firmware import store as store_module
from edge_runtime.firmware.incoming import StoreError
from edge_runtime.firmware.signature import MAX_VERSION, SignatureError, statement_of
from edge_runtime.firmware.store import MAX_STARTS, STATE, State, Store, entry_of
from edge_runtime.inference.bundle import TABLES, VOCABULARY, Bundle
from tests.edge_runtime.firmware.helpers import (
    NEVER,
    OTHER_KEY,
    TODAY,
    fill,
    install,
    running,
    sign,
    trust,
)


@pytest.fixture
def store(bundles: list[Bundle], tmp_path: Path) -> Store:
    return Store(tmp_path / "store", trust(tmp_path), (), bundles[0].path)


def refuse(*_: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_without_an_installed_bundle_the_one_of_the_configuration_runs(store: Store) -> None:
    assert running(store) == ""


def test_an_installed_bundle_runs_on_trial_until_it_is_kept(store: Store, bundles: list[Bundle]) -> None:
    install(store, bundles[1], 1)
    assert running(store) == "b1"
    assert store.state().starts == 1
    store.keep()
    assert running(store) == "b1"
    assert store.state() == State(entry_of(statement_of(bundles[1], 1, NEVER)), "", {store.trust[0].hex(): 1}, None)


def test_a_bundle_that_is_never_kept_is_given_up(store: Store, bundles: list[Bundle]) -> None:
    install(store, bundles[1], 1)
    store.keep()
    install(store, bundles[2], 2)
    assert [running(store) for _ in range(MAX_STARTS + 2)] == ["b2"] * MAX_STARTS + ["b1"] * 2
    state = store.state()
    assert (state.starts, state.failed) == (None, entry(bundles[2], 2))
    assert "did not work" in state.why


def entry(bundle: Bundle, version: int) -> str:
    return entry_of(statement_of(bundle, version, NEVER))


def test_a_bundle_that_was_given_up_is_refused_with_the_reason(store: Store, bundles: list[Bundle]) -> None:
    install(store, bundles[1], 1)
    store.give_up("the head is broken")
    assert running(store) == ""
    with pytest.raises(SignatureError, match="given up here: the head is broken"):
        store.check_new(sign(bundles[1], 1)[0], TODAY)
    store.check_new(sign(bundles[1], 2)[0], TODAY)


def test_starts_that_ended_in_order_do_not_count(store: Store, bundles: list[Bundle]) -> None:
    install(store, bundles[1], 1)
    for _ in range(2 * MAX_STARTS):
        assert running(store) == "b1"
        store.forget_starts()


def test_an_update_during_a_trial_goes_back_to_the_last_bundle_that_worked(store: Store, bundles: list[Bundle]) -> None:
    install(store, bundles[1], 1)
    store.keep()
    install(store, bundles[2], 2)
    install(store, bundles[3], 3)
    assert running(store) == "b3"
    store.give_up("no frame")
    assert running(store) == "b1"
    assert store.entries() == sorted([entry(bundles[1], 1), entry(bundles[3], 3)])


def test_only_the_bundle_in_use_and_the_one_before_are_kept_on_disk(store: Store, bundles: list[Bundle]) -> None:
    for version in (1, 2, 3):
        install(store, bundles[version], version)
        store.keep()
    assert store.entries() == sorted([entry(bundles[2], 2), entry(bundles[3], 3)])


def test_an_operator_goes_back_twice_and_then_there_is_nothing_behind(store: Store, bundles: list[Bundle]) -> None:
    for version in (1, 2):
        install(store, bundles[version], version)
        store.keep()
    assert [store.roll_back().current != "", running(store)] == [True, "b1"]
    assert (store.state().failed, store.state().why) == ("", "")  # nothing is wrong with the other one
    assert [store.roll_back().current, running(store)] == ["", ""]
    with pytest.raises(StoreError, match="no bundle in use"):
        store.roll_back()


def test_after_going_back_older_versions_stay_refused(store: Store, bundles: list[Bundle]) -> None:
    for version in (1, 2):
        install(store, bundles[version], version)
        store.keep()
    store.roll_back()
    for old in (1, 2):
        with pytest.raises(SignatureError):
            store.check_new(sign(bundles[3], old)[0], TODAY)
    store.check_new(sign(bundles[3], 3)[0], TODAY)


def test_an_update_must_be_newer_than_a_signed_bundle_of_the_configuration(store: Store, bundles: list[Bundle]) -> None:
    sign(bundles[0], 5)
    with pytest.raises(SignatureError, match="5 was installed"):
        store.check_new(sign(bundles[1], 5)[0], TODAY)


def test_an_expired_update_is_refused_and_an_expired_bundle_goes_on_running(
    store: Store, bundles: list[Bundle]
) -> None:
    statement, _ = sign(bundles[1], 1, expires=TODAY)
    store.check_new(statement, TODAY)
    install(store, bundles[1], 1)
    with pytest.raises(SignatureError, match="expired"):
        store.check_new(statement, date(2030, 1, 2))
    assert running(store) == "b1"


@pytest.mark.parametrize("name", [TABLES, VOCABULARY, "manifest.json", "bundle.sig"])
@pytest.mark.parametrize("damage", ["removed", "cut", "changed"])
def test_a_damaged_bundle_gives_way_to_the_one_before(
    store: Store, bundles: list[Bundle], name: str, damage: str
) -> None:
    for version in (1, 2):
        install(store, bundles[version], version)
        store.keep()
    path = store.folder / entry(bundles[2], 2) / name
    data = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes(data[:-3] if damage == "cut" else data[:50] + bytes([data[50] ^ 1]) + data[51:])
    assert [running(store), running(store)] == ["b1", "b1"]


def test_a_damaged_bundle_is_repaired_by_installing_it_again(store: Store, bundles: list[Bundle]) -> None:
    install(store, bundles[1], 1)
    store.keep()
    (store.folder / entry(bundles[1], 1) / VOCABULARY).write_text("damaged")
    install(store, bundles[1], 1)
    assert running(store) == "b1"
    assert store.state().starts is None


def test_a_bundle_whose_signer_is_not_trusted_any_more_does_not_run(
    store: Store, bundles: list[Bundle], tmp_path: Path
) -> None:
    install(store, bundles[1], 1)
    store.keep()
    assert running(Store(store.folder, trust(tmp_path, OTHER_KEY), (), store.factory)) == ""


def test_after_a_change_of_keys_the_versions_of_the_new_key_still_only_go_up(
    store: Store, bundles: list[Bundle], tmp_path: Path
) -> None:
    install(store, bundles[1], MAX_VERSION)
    changed = Store(store.folder, trust(tmp_path, OTHER_KEY), (), store.factory)
    for version, content in ((3, None), (5, b"damaged")):
        install(changed, bundles[2], version, key=OTHER_KEY)
        if content:
            (store.folder / STATE).write_bytes(content)
        for old in (version - 1, version):
            with pytest.raises(SignatureError, match=f"{version} was installed"):
                changed.check_new(sign(bundles[3], old, key=OTHER_KEY)[0], TODAY)
        changed.check_new(sign(bundles[3], version + 1, key=OTHER_KEY)[0], TODAY)


def test_a_signature_moved_to_another_bundle_is_found(store: Store, bundles: list[Bundle]) -> None:
    for version in (1, 2):
        install(store, bundles[version], version)
        store.keep()
    first, second = (store.folder / entry(bundles[version], version) for version in (1, 2))
    (second / "bundle.sig").write_bytes((first / "bundle.sig").read_bytes())
    assert running(store) == "b1"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"current": "../../etc"}', b"\xff" * 5000])
def test_with_a_damaged_state_the_newest_bundle_runs_on_trial(
    store: Store, bundles: list[Bundle], content: bytes
) -> None:
    for version in (1, 2):
        install(store, bundles[version], version)
        store.keep()
    (store.folder / STATE).write_bytes(content)
    assert [running(store) for _ in range(MAX_STARTS + 1)] == ["b2"] * MAX_STARTS + ["b1"]
    with pytest.raises(SignatureError):
        store.check_new(sign(bundles[3], 2)[0], TODAY)


def test_on_a_disk_that_takes_nothing_the_bundle_that_worked_runs(
    store: Store, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(store, bundles[1], 1)
    store.keep()
    install(store, bundles[2], 2)
    monkeypatch.setattr(store_module, "replace_file", refuse)
    assert [running(store) for _ in range(3)] == ["b1"] * 3  # a start on trial could not be counted
    monkeypatch.undo()
    assert running(store) == "b2"


def test_a_store_that_cannot_be_made_costs_no_start(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert running(Store(tmp_path / "file" / "store", store.trust, (), store.factory)) == ""


def test_a_bundle_that_fails_its_self_test_is_not_installed(store: Store, bundles: list[Bundle]) -> None:
    incoming = store.incoming(*sign(bundles[1], 1))
    fill(incoming, bundles[1].path)

    def fail(_: Path) -> None:
        raise StoreError("it does not work")

    with pytest.raises(StoreError, match="does not work"):
        store.install(incoming, fail)
    assert (running(store), store.entries()) == ("", [])


def test_without_trusted_keys_unsigned_bundles_run(store: Store, bundles: list[Bundle]) -> None:
    free = Store(store.folder, (), (), store.factory)
    incoming = free.incoming(statement_of(bundles[1], 0, TODAY), b"")
    fill(incoming, bundles[1].path)
    free.install(incoming, lambda _: None)
    assert running(free) == "b1"
    assert running(store) == ""  # not on a board that trusts somebody


def hold(store: Store, held: "multiprocessing.synchronize.Event", enough: "multiprocessing.synchronize.Event") -> None:
    with store._locked():
        held.set()
        enough.wait()


def test_two_processes_do_not_change_the_state_at_once(
    store: Store, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(store, bundles[1], 1)
    context = multiprocessing.get_context("spawn")
    held, enough = context.Event(), context.Event()
    other = context.Process(target=hold, args=(store, held, enough))
    other.start()
    try:
        assert held.wait(60)
        monkeypatch.setattr(store_module, "LOCK_S", 0.0)
        with pytest.raises(StoreError, match="locked"):
            store.keep()
    finally:
        enough.set()
        other.join()
    store.keep()
