"""Whatever ends an update, and whenever: the board starts with a whole bundle, the old one or the new one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.firmware.store import Store
from edge_runtime.inference.bundle import Bundle
from tests.edge_runtime.firmware.helpers import SMALL, fill, install, sign, trust, variant


@pytest.fixture
def prepared(board_bundle: Bundle, tmp_path: Path) -> tuple[Store, Bundle]:
    """A store in which "old" is kept, and a signed newer bundle."""
    factory, old, new = (
        variant(board_bundle, tmp_path / name, name, SMALL, name=name) for name in ("factory", "old", "new")
    )
    store = Store(tmp_path / "store", trust(tmp_path), (), factory.path)
    install(store, old, 1)
    store.keep()
    sign(new, 2)
    return store, new


@pytest.fixture
def cut(prepared: tuple[Store, Bundle], tmp_path: Path) -> Callable[[int, str], tuple[int, int]]:
    """A function: how often the update was cut off, and after how many of these a board started."""
    store, new = prepared
    (tmp_path / "key").write_text(store.trust[0].hex())

    def cut(runs: int, mode: str) -> tuple[int, int]:
        (tmp_path / mode).mkdir()
        program = Path(__file__).with_name("power_cut.py")
        arguments = [tmp_path / mode, tmp_path / "key", new.path, store.folder, store.factory, runs, mode]
        done = subprocess.run(
            [sys.executable, program, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        times, good = done.stdout.split()
        return int(times), int(good)

    return cut


@pytest.mark.timeout(600)
def test_a_kill_at_any_step_leaves_a_bundle_that_starts(cut: Callable[[int, str], tuple[int, int]]) -> None:
    times, good = cut(1000, "steps")
    assert times > 60  # each file is opened, written, synced and renamed
    assert good == times


@pytest.mark.timeout(600)
def test_200_kills_at_random_times_of_an_installation_leave_a_bundle_that_starts(
    cut: Callable[[int, str], tuple[int, int]],
) -> None:
    assert cut(200, "times") == (200, 200)


@pytest.mark.timeout(600)
def test_a_disk_that_is_full_at_any_step_leaves_a_bundle_that_starts(
    cut: Callable[[int, str], tuple[int, int]],
) -> None:
    times, good = cut(1000, "errors")
    assert times > 60
    assert good == times


def test_what_is_renamed_is_on_the_medium_and_the_rename_too(
    prepared: tuple[Store, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut; a kill alone does not show it, since the kernel still has the data."""
    store, new = prepared
    synced, unsynced_folders, sync, replace = set[tuple[int, int]](), set[Path](), os.fsync, os.replace

    def version(path: Path) -> tuple[int, int]:
        return path.stat().st_ino, path.stat().st_size

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        synced.add((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        unsynced_folders.difference_update(
            {f for f in unsynced_folders if f.stat().st_ino == os.fstat(descriptor).st_ino}
        )

    def checked(source: Path, target: Path) -> None:
        for path in source.iterdir() if source.is_dir() else [source]:
            assert version(path) in synced, f"{path} is renamed before it is on the medium"
        if target.name == "state.json":
            assert not unsynced_folders, "the switch is written before the bundle's folder is on the medium"
        replace(source, target)
        unsynced_folders.add(target.parent)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", checked)
    incoming = store.incoming(*sign(new, 2))
    fill(incoming, new.path)
    store.install(incoming, lambda _: None)
    store.start()
    store.keep()
    assert not unsynced_folders
