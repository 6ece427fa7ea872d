"""Installs, starts, keeps and goes back, and is killed on the way: `power_cut.py FOLDER KEY NEW OLD FACTORY RUNS MODE`.

MODE: "steps" kills before each call that opens, syncs, renames or removes something, or makes a folder; "times" kills
at random times of the installation, until RUNS kills came before its end; "errors" lets these calls fail with a full
disk, instead. After each, a board must start. Prints how many times it was killed, and how many of these a board
started after.
"""

import errno
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from edge_runtime.firmware.self_test import check
from edge_runtime.firmware.signature import claimed
from edge_runtime.firmware.store import MAX_STARTS, Store
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.inference.choice import Setup
from tests.edge_runtime.firmware.helpers import fill

NOT_REACHED = 3  # an exit code
MAX_RUNS = 1000  # a random kill may come too late, and then it does not count
OFFLOAD = Setup("none", 1)  # these bundles have no networks
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def update(store: Store, new: Path, signature: bytes) -> None:
    incoming = store.incoming(claimed(signature), signature)
    fill(incoming, new, piece=1 << 14)
    store.install(incoming, lambda folder: check(folder, OFFLOAD))


def work(store: Store, new: Path, signature: bytes) -> None:
    """All that changes a store, in the order of an update that is kept and taken back later."""
    update(store, new, signature)
    store.start()
    store.keep()
    store.roll_back()


def break_at(step: int, folder: Path, mode: str) -> list[int]:
    """The step-th of the watched calls below the folder ends this process, or fails. Returns the steps that came."""
    sync, calls = os.fsync, list[int]()

    def step_done() -> None:
        calls.append(len(calls))
        if calls[-1] == step:
            if mode == "steps":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in WATCHED and arguments and str(arguments[0]).startswith(str(folder)):
            step_done()

    def fsync(descriptor: int) -> None:
        step_done()
        sync(descriptor)

    sys.addaudithook(watch)
    os.fsync = fsync
    return calls


def run(step: int, store: Store, new: Path, signature: bytes, mode: str, update_s: float) -> bool:
    """False: the work was done before anything broke. update_s: how long an installation takes."""
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begins, b"x")
        calls = [step] if mode == "times" else break_at(step, store.folder, mode)
        with suppress(OSError):
            (update if mode == "times" else work)(store, new, signature)
        os._exit(0 if step in calls and mode == "errors" else NOT_REACHED)
    os.close(begins)
    if mode == "times":
        os.read(begun, 1)
        time.sleep(random.uniform(0, update_s))
        os.kill(child, signal.SIGKILL)
    os.close(begun)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != NOT_REACHED


def starts(store: Store, names: set[str], new: Path, signature: bytes) -> bool:
    """The board has a whole bundle at each of its next starts, and an update that was cut off can be repeated."""
    for _ in range(MAX_STARTS + 2):
        found, state = store.start()
        bundle = found.bundle if found else open_bundle(store.factory)
        check(bundle.path, OFFLOAD)
        _ = bundle.words
        if bundle.manifest.name not in names:
            return False
        was_used = claimed(signature).version in state.highest.values()  # the new one, before the board went back
        if bundle.manifest.name == "old" and not was_used and "factory" not in names:
            store.check_new(claimed(signature), date(2030, 1, 1))
            update(store, new, signature)
            found, _ = store.start()
            return found is not None and found.bundle.manifest.name == "new"
    return store.state().starts is None


def main() -> None:
    folder, trust, new, old, factory = map(Path, sys.argv[1:6])
    runs, mode = int(sys.argv[6]), sys.argv[7]
    signature = (new / "bundle.sig").read_bytes()
    keys = (bytes.fromhex(trust.read_text()),)
    store = Store(folder / "store", keys, (), factory)
    shutil.copytree(old, folder / "before")
    names = {"new", "old"}
    if mode == "errors":  # a disk that did not give the new bundle at its start, and then an operator who went back
        names.add("factory")
    shutil.copytree(folder / "before", store.folder)
    began = time.monotonic()
    update(store, new, signature)
    update_s = time.monotonic() - began
    cut = good = step = 0
    while cut < runs and step < MAX_RUNS:
        shutil.rmtree(store.folder)
        shutil.copytree(folder / "before", store.folder)
        if run(step, store, new, signature, mode, update_s):
            cut += 1
            good += starts(store, names, new, signature)
            if good < cut:
                sys.exit(f"no good start after {mode} {step}: {store.state()}")
        elif mode != "times":
            break
        step += 1
    print(cut, good)


if __name__ == "__main__":
    main()
