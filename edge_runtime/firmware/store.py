"""The installed bundles of a board, which of them runs, and the way back.

    FOLDER/state.json                  which bundle runs, the one before it, the highest versions, the starts on trial
    FOLDER/<name>-<version>-<id>/      an installed bundle
    FOLDER/.incoming/                  one that is not complete

state.json is replaced whole, and is the only thing that says what runs: whatever ends the program, before that moment
the old bundle starts, and after it the new one. A new bundle is on trial until it has handled some frames. A start on
trial is counted before the bundle is touched, so that one that kills the program also comes to its end. If there is no
bundle left, the one that the configuration names runs, which nothing here ever changes.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from edge_runtime.disk import replace_file, sync
from edge_runtime.firmware.incoming import Incoming, StoreError, board_files
from edge_runtime.firmware.signature import (
    MAX_KEYS,
    MAX_VERSION,
    SignatureError,
    Statement,
    Trust,
    check_new,
    claimed,
    read_signature,
    required_signature,
    signer,
    verified,
)
from edge_runtime.inference.bundle import Bundle, BundleError, open_bundle

logger = logging.getLogger(__name__)

STATE, INCOMING = "state.json", ".incoming"
MAX_STATE_BYTES = 8192  # with MAX_KEYS keys and the longest `why`, 5 KB
MAX_STARTS = 3  # on trial
MAX_WHY = 512  # characters
LOCK_S = 10.0  # another process holds the lock for some milliseconds
UNSIGNED = 0  # the version of a bundle without a signature

Key = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Version = Annotated[int, Meta(ge=0, le=MAX_VERSION)]
Entry = Annotated[str, Meta(pattern=r"^([\w.-]+-[0-9]{1,10}-[0-9a-f]{16})?\Z", max_length=96)]  # a folder, or ""


class State(Struct, frozen=True):
    """state.json."""

    current: Entry = ""  # "": the bundle that the configuration names
    previous: Entry = ""  # where `rollback` goes
    # By public key, in hex: the highest version of its bundles that was ever installed. A key that is not trusted any
    # more does not count: whoever had stolen it may have installed MAX_VERSION, which nothing can exceed.
    highest: Annotated[dict[Key, Version], Meta(max_length=MAX_KEYS)] = {}
    starts: Annotated[int, Meta(ge=0, le=MAX_STARTS)] | None = None  # of the current one on trial; None: it is proven
    failed: Entry = ""  # the last one that was given up
    why: str = ""  # it was given up


@dataclass(frozen=True, slots=True)
class Installed:
    """A bundle of the store that may run."""

    bundle: Bundle
    version: int  # UNSIGNED: without a signature


class Store:
    """The bundles in one folder. Several processes may use it."""

    def __init__(self, folder: Path, trust: Trust, suffixes: tuple[str, ...], factory: Path) -> None:
        """trust: without keys, unsigned bundles are taken from files. suffixes: of the networks that this board runs.
        factory: the folder of the bundle that the configuration names.
        """
        self.folder, self.trust, self.suffixes, self.factory = folder, trust, suffixes, factory

    # ---- what runs ----

    def start(self) -> tuple[Installed | None, State]:
        """The bundle for this start of the board, and the state then. None: the factory's.

        Counts a start on trial, and gives up bundles that had their starts, or are damaged. Raises nothing: a board
        starts from any disk.
        """
        try:
            with self._locked():
                state = self.state()
                if state.starts is not None and state.starts < MAX_STARTS:
                    state = replace(state, starts=state.starts + 1)
                    self._write(state)
                elif state.starts is not None:
                    state = self._without_current(state, f"it did not work in {MAX_STARTS} starts")
        except OSError as error:
            logger.warning("bundle store not readable or not writable folder=%s error=%s", self.folder, error)
            try:
                state = self.state()
            except OSError:
                state = self._newest()
            if state.starts is not None:  # a start that cannot be counted is not tried
                state = replace(state, current=state.previous, previous="", starts=None)
        while state.current:
            found = self._installed_or_why(state.current)
            if isinstance(found, Installed):
                return found, state
            try:
                with self._locked():
                    state = self._without_current(state, found)
            except OSError:  # it cannot be remembered, and is found again at the next start
                state = replace(state, current=state.previous, previous="", starts=None)
        return None, state

    def installed(self, entry: str) -> Installed:
        """A bundle after a check of its signature and of every file. Raises BundleError."""
        path = self.folder / entry
        version = UNSIGNED
        if self.trust:
            statement = verified(read_signature(path), self.trust)
            version = statement.version
        bundle = open_bundle(path)
        if self.trust and statement.id != bundle.id.hex():
            raise SignatureError(f"{path}: the signature is of another bundle: install it again")
        for name in board_files(bundle.manifest, self.suffixes):
            bundle.file(name)
        return Installed(bundle, version)

    def _installed_or_why(self, entry: str) -> Installed | str:
        try:
            return self.installed(entry)
        except BundleError as error:
            return str(error)

    def keep(self, entry: str = "") -> None:
        """The current bundle works: it is not on trial any more. Raises OSError.

        entry: the bundle that works; one that was installed since it started is still on trial. "": the current one.
        """
        with self._locked():
            if (state := self.state()).current == (entry or state.current):
                self._write(replace(state, starts=None))

    def forget_starts(self) -> None:
        """The board was stopped in order: its starts prove nothing against the bundle. Raises OSError."""
        with self._locked():
            if (state := self.state()).starts:
                self._write(replace(state, starts=0))

    def give_up(self, why: str, entry: str = "") -> None:
        """Back to the bundle before the one on trial. entry: as for `keep`. Raises OSError."""
        with self._locked():
            state = self.state()
            if state.starts is not None and state.current == (entry or state.current):
                self._without_current(state, why)

    def roll_back(self) -> State:
        """What `aiflow bundle rollback` does. Raises StoreError if there is nothing behind, and OSError."""
        with self._locked():
            state = self.state()
            if not state.current:
                raise StoreError(f"{self.folder} has no bundle in use: the one of the configuration runs already")
            logger.warning("bundle rolled back bundle=%s back_to=%s", state.current, state.previous or "factory")
            after = replace(state, current=state.previous, previous="", starts=None)
            self._write(after)
            return after

    # ---- what comes in ----

    def check_new(self, statement: Statement, today: date) -> None:
        """Raises SignatureError for what is expired or not newer."""
        state = self.state()
        if state.why and state.failed == entry_of(statement):
            raise SignatureError(f"version {statement.version} was given up here: {state.why}: sign a newer one")
        check_new(statement, max([self._factory_version(), *self._of_trusted(state.highest).values()]), today)

    def incoming(self, statement: Statement, signature: bytes) -> Incoming:
        """Where its files go. There is one at a time: another bundle's files are removed. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = [self.factory, *(self.folder / entry for entry in self.entries())]
        return Incoming(self.folder / INCOMING, statement, signature, self.suffixes, known)

    def install(self, incoming: Incoming, self_test: Callable[[Path], None]) -> None:
        """A complete bundle becomes the current one, on trial. Raises what the self-test raises, BundleError, OSError.

        self_test: of a bundle in a folder.
        """
        entry = entry_of(incoming.statement)
        bundle = open_bundle(incoming.folder)
        for name in board_files(bundle.manifest, self.suffixes):
            bundle.file(name)
        self_test(incoming.folder)
        with self._locked():
            state, target = self.state(), self.folder / entry
            is_in_use = entry in (state.current, state.previous)
            if target.exists() and not (is_in_use and isinstance(self._installed_or_why(entry), Installed)):
                shutil.rmtree(target)  # of an installation that was cut off here, or damaged since
            if target.exists():
                shutil.rmtree(incoming.folder)
            else:
                os.replace(incoming.folder, target)
            sync(self.folder)
            if entry != state.current:
                proven = state.current if state.starts is None else state.previous
                highest = self._with_version_of(target, state.highest)
                state = State(entry, "" if entry == proven else proven, highest, 0)
                self._write(state)
            self._remove_others(state)

    # ---- the files ----

    def state(self) -> State:
        """If state.json is damaged, the newest bundle runs, on trial. Raises OSError if the disk does not give it."""
        try:
            with (self.folder / STATE).open("rb") as file:
                return msgspec.json.decode(file.read(MAX_STATE_BYTES), type=State)
        except FileNotFoundError:
            return State()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            logger.warning("bundle store state damaged folder=%s error=%s", self.folder, error)
            return self._newest()

    def _newest(self) -> State:
        versions = {entry: int(entry.split("-")[-2]) for entry in self.entries()}
        newest = sorted(versions, key=lambda entry: versions[entry], reverse=True)
        current, previous = [*newest, "", ""][:2]
        highest: dict[str, int] = {}
        for entry in newest:
            with suppress(SignatureError):
                highest = self._with_version_of(self.folder / entry, highest)
        return State(current, previous, highest, 0 if current else None)

    def entries(self) -> list[str]:
        """The folders of bundles, in use or not."""
        with suppress(OSError):
            return sorted(path.name for path in self.folder.iterdir() if path.is_dir() and _is_entry(path.name))
        return []

    def fault(self, folder: Path, today: date | None = None) -> str:
        """Why a board with this trust file would not install a bundle, whatever its version; "": it would.

        today: None: even if the bundle has expired.
        """
        if not self.trust:
            return ""
        try:
            statement = verified(required_signature(folder), self.trust)
            if statement.id != open_bundle(folder).id.hex():
                return f"{folder}: the signature is of another bundle: sign it again"
            if today:
                check_new(statement, -1, today)
        except BundleError as error:
            return str(error)
        return ""

    def _of_trusted(self, highest: dict[str, int]) -> dict[str, int]:
        keys = {key.hex() for key in self.trust}
        return {key: version for key, version in highest.items() if key in keys}

    def _with_version_of(self, bundle: Path, highest: dict[str, int]) -> dict[str, int]:
        """The highest versions after this bundle. Forgets keys that are not trusted. Raises SignatureError."""
        if not self.trust:
            return highest
        data, kept = read_signature(bundle), self._of_trusted(highest)
        key = signer(data, self.trust).hex()
        return kept | {key: max(kept.get(key, 0), claimed(data).version)}

    def _factory_version(self) -> int:
        """Of the bundle that the configuration names, if it is signed: an update must be newer than that too."""
        if self.trust and (data := read_signature(self.factory)):
            with suppress(SignatureError):
                return verified(data, self.trust).version
        return 0

    def _without_current(self, state: State, why: str) -> State:
        logger.error("bundle given up bundle=%s back_to=%s why=%s", state.current, state.previous or "factory", why)
        after = State(state.previous, "", state.highest, None, state.current, why[:MAX_WHY])
        self._write(after)
        return after

    def _remove_others(self, state: State) -> None:
        for entry in self.entries():
            if entry not in (state.current, state.previous):
                shutil.rmtree(self.folder / entry, ignore_errors=True)

    def _write(self, state: State) -> None:
        replace_file(self.folder / STATE, msgspec.json.format(msgspec.json.encode(state)))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time changes the state. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            until = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise StoreError(
                            f"{self.folder} is locked by another process for {LOCK_S:g} s: look for a hanging aiflow"
                        ) from None
                    time.sleep(0.01)
            yield
        finally:
            os.close(descriptor)


def entry_of(statement: Statement) -> str:
    return f"{statement.name}-{statement.version}-{statement.id}"


def _is_entry(name: str) -> bool:
    try:
        return bool(msgspec.convert(name, Entry))
    except msgspec.ValidationError:
        return False
