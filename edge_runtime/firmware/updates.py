"""New bundles for a running board: what arrives over MQTT, and whether the bundle on trial works.

The board only answers: to an offer with what it needs next, to the last chunk of that with what it needs then. The
sender repeats an offer that gets no answer, so nothing here waits or has a timer. The disk is used on one thread, which
takes messages from a short queue; what does not fit is counted, and sent again.
"""

import logging
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.config import RuntimeConfig
from edge_runtime.errors import ConfigError, RestartError
from edge_runtime.firmware.incoming import Incoming, StoreError, WrongHashError
from edge_runtime.firmware.signature import (
    MAX_SIGNATURE_BYTES,
    SignatureError,
    Statement,
    check_clock,
    read_signature,
    read_trust,
    verified,
)
from edge_runtime.firmware.store import INCOMING, Store
from edge_runtime.inference.backends import SUFFIXES, installed
from edge_runtime.inference.bundle import BundleError, open_bundle
from edge_runtime.inference.choice import Setup, choose
from edge_runtime.logs import is_told
from edge_runtime.mqtt import Message
from edge_runtime.mqtt.routes import Rejection, Route
from edge_runtime.wire import EnvelopeError, topics
from edge_runtime.wire.update import (
    INSTALL,
    MAX_CHUNK,
    WINDOW_BYTES,
    UpdateState,
    UpdateWord,
    decode_chunk,
    encode_update_state,
)

logger = logging.getLogger(__name__)

TRIAL_FRAMES = 20  # that a new bundle must handle; a failed start or hang before them counts against it
# A camera may see something once a day. Power cuts, which count as failed starts, must not end a good bundle until it
# has seen so much: after so many seconds, one frame is enough.
TRIAL_S = 600.0
SELF_TEST_S = 120.0  # loading networks from a slow SD card takes some seconds
BACKLOG = 64  # messages that wait for the disk: 1 MB
STOP_S = 2.0  # for the last file operation


def today() -> date:
    """In UTC, as expiry dates are meant."""
    return datetime.now(timezone.utc).date()


def store_of(config: RuntimeConfig) -> Store | None:
    """The bundles of a board. None: it has no [updates]. Raises ConfigError for a trust file that cannot be used."""
    if config.updates is None:
        return None
    trust = read_trust(Path(config.updates.trust_file)) if config.updates.trust_file else ()
    board = config.board
    suffixes = () if board.paradigm == "offload" else tuple(SUFFIXES[name] for name in installed(board.backend))
    return Store(Path(config.updates.folder), trust, suffixes, Path(board.bundle))


def self_test(config: RuntimeConfig, folder: Path) -> None:
    """Loads and runs a bundle in a process of its own, so that networks that crash do not take the board along.

    It runs as `choose` finds it fastest, which is kept for its first start. Raises StoreError if it does not work
    within SELF_TEST_S.
    """
    board, setup = config.board, Setup("none", 1)
    try:
        if board.paradigm != "offload":
            setup = choose(open_bundle(folder), board.backend, config.threads, board.providers)
    except (ConfigError, RestartError) as error:
        raise StoreError(f"the self-test of the bundle failed: {error}: the bundle is not installed") from error
    module, arguments = "edge_runtime.firmware.self_test", msgspec.json.encode(setup).decode()
    command = [sys.executable, "-m", module, str(folder.absolute()), arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SELF_TEST_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoreError(f"the self-test of the bundle did not end: {error}: the bundle is not installed") from error
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise StoreError(f"the self-test of the bundle failed: {last}: the bundle is not installed")


class Updates:
    """The bundle of this start, and how the next one comes. `with` starts and ends its thread."""

    def __init__(
        self,
        store: Store,
        self_test: Callable[[Path], None],
        publish: Callable[[bytes], None],
        on_change: Callable[[], None] = lambda: None,
        today: Callable[[], date] = today,
        asks: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """self_test: see `Store.install`. publish: an UpdateState, never blocks. on_change: `status` has changed.
        asks: a bundle that has arrived waits until a user installs it. clock: in seconds.

        Raises BundleError if not even the bundle of the configuration can be opened.
        """
        self._store, self._self_test, self._today = store, self_test, today
        self._publish, self._on_change, self._asks = publish, on_change, asks
        if fault := store.fault(store.factory):  # it runs nevertheless: ADR 34
            logger.warning("bundle of [board] not signed by a trusted key bundle=%s why=%s", store.factory, fault)
        found, state = store.start()
        self.bundle = found.bundle if found else open_bundle(store.factory)
        self.version = found.version if found else 0
        self.is_trial = found is not None and state.starts is not None
        self._entry = state.current  # of the store; the current one may be another later
        self._word = "trial" if self.is_trial else "idle"
        self._failed, self._why = state.failed, state.why
        self.restart_why = ""  # why the board has to start again; "": it need not
        self._stop = threading.Event()
        self._handled = 0  # frames, in this trial
        self._clock, self._started = clock, clock()
        self._incoming: Incoming | None = None
        self._signature = b""  # of the one that is coming
        self._window_end = 0  # of the file that is wanted: what was asked for ends here
        self._next_id = ""  # of the bundle that the next start runs
        self._new_version = 0  # of the bundle that is coming, waits or is installed; 0: there is none
        self._percent = 0  # of it that is here, in steps of 10: each step is a message
        self._unread = self._refused = 0  # messages
        self._is_closed = False
        self._messages: queue.Queue[Callable[[], None] | None] = queue.Queue(BACKLOG)
        self._thread = threading.Thread(target=self._run, name="updates", daemon=True)

    def __enter__(self) -> "Updates":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        with suppress(queue.Full):  # then it wakes anyway
            self._messages.put_nowait(None)
        self._thread.join(STOP_S)  # a self-test is not waited for

    def stop_with(self, stop: threading.Event) -> None:
        """Sets the event that ends the board when it has to start again."""
        self._stop = stop

    # ---- any thread ----

    def routes(self, site: str, board: str) -> list[Route]:
        offered = partial(self._arrived, self._offered, MAX_SIGNATURE_BYTES)
        chunk_arrived = partial(self._arrived, self._take_chunk, MAX_CHUNK)
        return [
            Route(topics.bundle_offer(site, board), offered, optional=True),
            Route(topics.bundle_chunk(site, board), chunk_arrived, optional=True),
        ]

    def status(self) -> dict[str, str | int]:
        """For the board's status."""
        words = {"state": self._word, "failed": self._failed, "why": self._why}
        return words | {"version": self._new_version, "percent": self._percent}

    def install_arrived(self, message: Message) -> Rejection | None:
        """A message on `topics.bundle_install`."""
        return self._arrived(self._install_wanted, len(INSTALL), message)

    def _arrived(self, take: Callable[[bytes], None], max_bytes: int, message: Message) -> Rejection | None:
        if len(message.payload) > max_bytes:
            return "no_update", f"it has {len(message.payload)} bytes, at most {max_bytes} are read"
        try:
            self._messages.put_nowait(partial(take, message.payload))
        except queue.Full:
            return "no_update", "the disk does not keep up: offer the bundle again"
        return None

    # ---- the board's main thread ----

    def frame_handled(self, failed: int) -> None:
        """Ends the trial when enough frames were handled. failed: frames that failed, since the start."""
        if not self.is_trial or self.restart_why:
            return
        self._handled += 1
        has_run_long = not failed and self._clock() - self._started >= TRIAL_S
        works = has_run_long or self._handled - failed >= TRIAL_FRAMES
        if failed >= TRIAL_FRAMES:
            self.give_up(f"{failed} frames failed")
        elif works and self._try_to(partial(self._store.keep, self._entry)):
            self.is_trial = False
            logger.info("bundle kept bundle=%s version=%d", self.bundle.manifest.name, self.version)
            if self._word == "trial":  # else another one comes or waits already
                self._word = "idle"
            self._on_change()
            self._say("kept", self.bundle.id.hex())
        elif works:  # the disk refuses: again after as many frames, or as long
            self._handled, self._started = 0, self._clock()

    def forget_starts(self) -> None:
        """The board was stopped in order: a trial goes on with the next start."""
        if self.is_trial and not self.restart_why:
            self._try_to(self._store.forget_starts)

    def give_up(self, why: str) -> None:
        """The bundle on trial does not work: the next start has the one before it."""
        self._try_to(partial(self._store.give_up, why, self._entry))
        self._restart(f"bundle {self.bundle.manifest.name} version {self.version} does not work: {why}")

    # ---- its own thread ----

    def _run(self) -> None:
        if self._asks:
            self._find_waiting()
        while (take := self._messages.get()) and not self._is_closed:
            take()

    def _find_waiting(self) -> None:
        """A bundle that arrived before this start."""
        try:
            signature = read_signature(self._store.folder / INCOMING)
        except SignatureError:  # damaged: the sender offers it again
            return
        if signature:
            self._offered(signature, is_new=False)

    def _offered(self, signature: bytes, is_new: bool = True) -> None:
        """is_new: it comes over MQTT now. At the start of a board the clock may not be set yet."""
        try:
            if not self._store.trust:
                raise SignatureError("this board trusts nobody: name a trust_file in its [updates]")
            statement = verified(signature, self._store.trust)
        except SignatureError as error:
            self._refuse("", error)
            return
        if statement.id == self._next_id:
            self._say("installed", statement.id)
        elif statement.id == self.bundle.id.hex():
            self._say("trial" if self.is_trial else "kept", statement.id)
        elif not (self.restart_why or (is_new and self._clock_is_wrong(statement.id))):
            self._receive(statement, signature)

    def _clock_is_wrong(self, bundle: str) -> bool:
        """Says so to the sender. What has arrived of the bundle stays."""
        try:
            check_clock(self._today())
        except SignatureError as error:
            self._refuse(bundle, error)
            return True
        return False

    def _receive(self, statement: Statement, signature: bytes) -> None:
        try:
            self._store.check_new(statement, self._today())
            if self._incoming is None or self._signature != signature:
                self._incoming = None  # its files go now
                self._incoming = self._store.incoming(statement, signature)
                self._signature = signature
                self._new_version, self._percent = statement.version, 0
                self._changed("receiving")
            self._go_on(self._incoming)
        except (BundleError, OSError) as error:
            self._drop(statement.id, error)

    def _take_chunk(self, data: bytes) -> None:
        if self._incoming is None:
            return
        try:
            chunk = decode_chunk(data)
            if not self._incoming.add(chunk.file.hex(), chunk.offset, chunk.data):
                return
            if chunk.offset + len(chunk.data) >= self._window_end:
                self._incoming.sync()
                # Again, since a slow sender may outlast the expiry date.
                self._store.check_new(self._incoming.statement, self._today())
                self._go_on(self._incoming)
        except EnvelopeError as error:
            self._unread += 1
            if is_told(self._unread):
                logger.warning("bundle chunk not read count=%d error=%s", self._unread, error)
        except (BundleError, OSError) as error:
            self._drop(self._incoming.statement.id, error)

    def _install_wanted(self, word: bytes) -> None:
        if word != INSTALL.encode() or self._word != "waiting" or self._incoming is None:
            self._unread += 1
            if is_told(self._unread):
                logger.warning("bundle not installed, none waits or the word is not %s count=%d", INSTALL, self._unread)
            return
        if self._clock_is_wrong(self._incoming.statement.id):
            return
        try:
            self._store.check_new(self._incoming.statement, self._today())  # it may have expired since
            self._install(self._incoming)
        except (BundleError, OSError) as error:
            self._drop(self._incoming.statement.id, error)

    def _go_on(self, incoming: Incoming) -> None:
        """Asks for what is needed next, or installs the bundle, or lets it wait for a user."""
        statement = incoming.statement
        if wanted := incoming.wanted():
            size = min(WINDOW_BYTES, wanted.size - wanted.offset)
            self._window_end = wanted.offset + size
            counts = {"received": incoming.received, "total": incoming.total}
            self._say("wants", statement.id, file=wanted.file, offset=wanted.offset, bytes=size, **counts)
            percent = 10 * (10 * incoming.received // incoming.total) if incoming.bundle else 0
            if percent != self._percent:
                self._percent = percent
                self._on_change()
        elif self._asks:
            self._percent = 100
            self._changed("waiting")
            self._say("waiting", statement.id)
        else:
            self._install(incoming)

    def _install(self, incoming: Incoming) -> None:
        statement, self._percent = incoming.statement, 100
        self._changed("testing")
        self._say("testing", statement.id)
        self._store.install(incoming, self._self_test)
        self._incoming, self._next_id = None, statement.id
        self._changed("installed")
        self._say("installed", statement.id)
        self._restart(f"bundle {statement.name} version {statement.version} is installed")

    def _drop(self, bundle: str, error: Exception) -> None:
        """After a wrong file the others are kept: the sender may offer the bundle again."""
        if self._incoming and self._incoming.statement.id == bundle:
            if not isinstance(error, WrongHashError):
                shutil.rmtree(self._incoming.folder, ignore_errors=True)
            self._incoming = None
        self._refuse(bundle, error)

    def _refuse(self, bundle: str, error: Exception) -> None:
        why = str(error)[:512]
        self._refused += 1
        if is_told(self._refused):
            logger.warning("bundle refused count=%d bundle=%s reason=%s", self._refused, bundle, why)
        self._failed, self._why = bundle, why
        if self._incoming is None:  # else another one was refused
            self._new_version = self._percent = 0
            self._word = "trial" if self.is_trial else "idle"
        self._on_change()
        self._say("refused", bundle, why=why)

    def _say(self, word: UpdateWord, bundle: str, **values: Any) -> None:
        self._publish(encode_update_state(UpdateState(word, bundle, **values)))

    def _changed(self, word: str) -> None:
        self._word = word
        self._on_change()

    def _restart(self, why: str) -> None:
        self.restart_why = why
        self._stop.set()

    def _try_to(self, write: Callable[[], None]) -> bool:
        """False, and a line in the log, if the disk refuses."""
        try:
            write()
        except OSError as error:
            logger.warning("bundle store not written error=%s", error)
            return False
        return True
