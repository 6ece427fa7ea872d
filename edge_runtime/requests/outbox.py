"""The outbox: requests on disk that wait for a better link. It only stores; what is asked again when is decided in
lifecycle.py.

One thread owns the SQLite database, so that a slow or hanging disk holds up nobody else. WAL mode with
synchronous = FULL: a commit is on the medium when it returns (sqlite.org/pragma.html, "synchronous"). A commit costs
milliseconds on flash, so rows are committed in groups; what is not committed yet stays in memory, too. A disk that
refuses to write (full, read-only, no permission, locked) is tried again every few seconds.

A database that SQLite calls damaged is set aside under one fixed name. Damage may take away rows, or whole commits,
without a trace: SQLite drops the rest of a log behind a damaged frame (sqlite.org/walformat.html, section 4). So a
small file beside the database says how many rows the latest commit had, and missing rows are reported as a number
(docs/adr/0014-one-lifecycle.md says which faults need that).

At least once: if the power fails between an answer and its commit, the request is asked again.
"""

import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_runtime.config import OutboxConfig
from edge_runtime.requests.actions import Found
from edge_runtime.requests.tracked import ROW_BYTES, Row
from edge_runtime.wire.envelope import MAX_ENVELOPE
from edge_runtime.wire.event import MAX_EVENT

logger = logging.getLogger(__name__)

GROUP_S = 0.2  # rows wait at most this long for others, and
GROUP_ROWS = 20  # at most so many are written with one commit
RETRY_S = 5.0  # between two tries of a disk that refuses
BACKLOG = 256  # commands that wait for the disk, then new rows are refused
MEMORY_BYTES = 4 << 20  # of rows that are not on disk yet, then new rows are refused
GRACE_S = 600.0  # that a row still has after a start, whatever the clock says; half the longest age if that is less
ID_BYTES = 8
PAGE = 4096  # bytes
WAL_PAGES = 256  # the log grows to about 1 MiB before it is copied into the database
COLUMNS = (
    "id, captured, kept, payload, event, "
    "typeof(id) || typeof(captured) || typeof(kept) || typeof(payload) || typeof(event)"
)
APPLICATION = 0x41466F62  # "AFob": any other database belongs to another program
SCHEMA = 2


class _DamagedError(Exception):
    """The database is not what was written."""


class _ForeignError(Exception):
    """The file is not ours, and is left alone."""


class Outbox:
    """Rows on disk; `start` and `close` begin and end its thread. Methods never wait for the disk.

    on_found(rows, missing): once, when the file is open: what an earlier run left, and how many rows the disk lost.
    on_stored(ids): these are on disk now. on_read(id, row): what `read` asked for, or None if the disk has lost it;
    comes unasked with None for rows that are lost while this runs. All three are called on the outbox's thread.
    """

    def __init__(
        self,
        config: OutboxConfig,
        *,
        on_found: Callable[[list[Found], int], None],
        on_stored: Callable[[list[bytes]], None],
        on_read: Callable[[bytes, Row | None], None],
    ) -> None:
        self.fault = ""  # what is wrong with the disk, for people; empty: nothing
        self._config, self._path = config, Path(config.file).expanduser()
        self._on_found, self._on_stored, self._on_read = on_found, on_stored, on_read
        self._group_s = 0.0 if config.every_request else GROUP_S
        self._commands: queue.Queue[tuple[Callable[[Any], None], Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._db: sqlite3.Connection | None = None
        self._fresh: dict[bytes, Row] = {}  # not on disk yet
        self._fresh_bytes = 0
        self._gone: set[bytes] = set()  # to be deleted on disk
        self._on_disk: set[bytes] = set()
        self._commits = 0
        self._commit_at: float | None = None  # None: nothing to write
        self._unread: list[bytes] = []  # asked for while the disk does not work
        self._damage = ""  # what was wrong with the open database; it is set aside when it is opened again
        self._has_listed = False

    # ---- any thread ----

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def has_room(self) -> bool:
        """Whether one more row is taken: false while the disk hangs, or while too much waits for it in memory."""
        return self._commands.qsize() < BACKLOG and self._fresh_bytes < MEMORY_BYTES

    def put(self, row: Row) -> None:
        """Take a row. A second one with its id replaces nothing and is ignored."""
        self._commands.put((self._put, row))

    def read(self, request_id: bytes) -> None:
        """`on_read` follows."""
        self._commands.put((self._read, request_id))

    def delete(self, request_id: bytes) -> None:
        """Its request has ended. Unknown ids are ignored."""
        self._commands.put((self._delete, request_id))

    def close(self) -> list[Row]:
        """Writes what there is, and returns the rows that the disk did not take."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()
        return list(self._fresh.values())

    # ---- the outbox's thread ----

    def _run(self) -> None:
        self._open()
        while True:
            wait_s = None if self._commit_at is None else max(0.0, self._commit_at - time.monotonic())
            try:
                command = self._commands.get(timeout=wait_s)
            except queue.Empty:
                self._commit()
                continue
            if command is None:
                break
            do, argument = command
            do(argument)
            if len(self._fresh) >= GROUP_ROWS and not self.fault:
                self._commit()
        self._commit()
        self._disconnect()

    def _put(self, row: Row) -> None:
        if row.id not in self._fresh and row.id not in self._on_disk:
            self._fresh[row.id] = row
            self._fresh_bytes += row.size
            self._changed()

    def _delete(self, request_id: bytes) -> None:
        if row := self._fresh.pop(request_id, None):  # it never wears the disk
            self._fresh_bytes -= row.size
        else:
            self._gone.add(request_id)
            self._changed()

    def _read(self, request_id: bytes) -> None:
        row = self._fresh.get(request_id)
        if row is None and self._db is not None:
            try:
                row = _row(self._db.execute(f"SELECT {COLUMNS} FROM kept WHERE id = ?", (request_id,)).fetchone())
            except sqlite3.DatabaseError as error:
                self._failed(error)
        if row is None and self._db is None and request_id in self._on_disk:
            self._unread.append(request_id)  # until the disk works again
        else:
            self._on_read(request_id, row)

    def _changed(self) -> None:
        if self._commit_at is None:
            self._commit_at = time.monotonic() + self._group_s

    def _commit(self) -> None:
        """Write what changed. What the disk refuses is tried again later."""
        self._commit_at = None
        if self._db is None:
            self._open()
        if self._db is None or not (self._fresh or self._gone):
            return
        fresh = list(self._fresh.values())
        try:
            with self._db:  # one transaction
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("DELETE FROM kept WHERE id = ?", [(request_id,) for request_id in self._gone])
                self._db.executemany(
                    "INSERT OR IGNORE INTO kept VALUES (?, ?, ?, ?, ?)",
                    [(row.id, row.captured, row.kept, row.payload, row.event) for row in fresh],
                )
                self._db.execute("UPDATE state SET commits = ?", (self._commits + 1,))
        except sqlite3.DatabaseError as error:
            self._failed(error)
            return
        self._commits += 1
        self._on_disk = (self._on_disk | self._fresh.keys()) - self._gone
        self._fresh.clear()
        self._gone.clear()
        self._fresh_bytes = 0
        with suppress(OSError):  # an old note claims less than there is, never too much
            self._write_note()
        self._works()
        self._on_stored([row.id for row in fresh])

    # ---- the file ----

    def _open(self) -> None:
        missing = 0
        try:
            try:
                if self._damage:
                    raise _DamagedError(self._damage)
                rows, missing = self._connect()
            except (sqlite3.DatabaseError, _DamagedError) as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                rows, missing = self._start_anew(str(error))
        except (OSError, sqlite3.Error, _DamagedError, _ForeignError) as error:
            self._refuse(str(error), reopen=True)
            return
        self._works()
        found = {row.id for row in rows}
        lost, self._on_disk = self._on_disk - found - self._gone, found
        if missing or lost:
            with suppress(OSError):
                self._write_note()  # so that the next start does not report them again
        if not self._has_listed:
            self._has_listed = True
            if missing:
                logger.error("outbox rows lost count=%d file=%s", missing, self._path)
            self._on_found([row for row in rows if row.id not in self._gone], missing)
        for request_id in lost:
            self._on_read(request_id, None)
        unread, self._unread = self._unread, []
        for request_id in unread:
            if request_id not in lost:
                self._read(request_id)

    def _connect(self) -> tuple[list[Found], int]:
        """Opens or creates the database. Returns its rows, oldest first, and how many it should have besides."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # captions are private
        self._db = db = sqlite3.connect(self._path, timeout=1.0, isolation_level=None, check_same_thread=False)
        db.text_factory = bytes  # a damaged value may be text that is not UTF-8
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # one board per file; the log then needs no shared memory
        is_empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not is_empty and db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise _ForeignError(f"{self._path} is another program's database: give the outbox a file of its own")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {WAL_PAGES * PAGE}")
        note = self._read_note()
        if is_empty:
            db.execute("BEGIN IMMEDIATE")
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {SCHEMA}")
            db.execute(
                "CREATE TABLE kept (id BLOB PRIMARY KEY, captured REAL NOT NULL, kept REAL NOT NULL, "
                "payload BLOB NOT NULL, event BLOB NOT NULL)"
            )
            db.execute("CREATE TABLE state (commits INTEGER NOT NULL)")
            db.execute("INSERT INTO state VALUES (0)")
            db.execute("COMMIT")
        if (schema := db.execute("PRAGMA user_version").fetchone()[0]) != SCHEMA:
            raise _DamagedError(f"written by version {schema}, this is {SCHEMA}")
        if (verdict := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != b"ok":
            raise _DamagedError(str(verdict))
        columns = "id, kept, length(payload) + length(event), typeof(id), typeof(kept)"
        rows = []
        for request_id, kept, size, *types in db.execute(f"SELECT {columns} FROM kept ORDER BY rowid"):
            if types != [b"blob", b"real"] or len(request_id) != ID_BYTES:
                raise _DamagedError("a row is not what was written")
            rows.append(Found(request_id, size + ROW_BYTES, self._age_s(kept)))
        commits = db.execute("SELECT commits FROM state").fetchone()[0]
        if not isinstance(commits, int):
            raise _DamagedError("its state is not what was written")
        missing = max(0, note[1] - len(rows)) if note[0] > commits else 0
        self._commits = max(note[0], commits)
        return rows, missing

    def _start_anew(self, why: str) -> tuple[list[Found], int]:
        """The file is damaged: set it aside, one of them, and begin with an empty one."""
        note = self._read_note()
        # A wrong path in the config must not move another program's file away. Version 0.1 wrote a file named .mark.
        if not (self._beside(".rows").exists() or self._beside(".mark").exists()):
            raise _ForeignError(f"{why}, and nothing says that the file is ours: remove {self._path}")
        self._disconnect()
        self._damage = ""
        for suffix in ("-wal", ""):  # a log that stayed would be played into the new file
            with suppress(FileNotFoundError):
                self._beside(suffix).replace(self._beside(".damaged" + suffix))
        logger.error("outbox damaged reason=%s: set aside as %s", why, self._beside(".damaged"))
        self._connect()
        self._write_note()
        return [], note[1]

    def _age_s(self, kept: float) -> float:
        """Since a row of an earlier run was kept.

        Between runs only the wall clock remains, and boards without a battery start in 1970 or last week. So the age
        counts only as far as a row still has some time left: no jump of the clock drops anything.
        """
        grace_s = min(GRACE_S, self._config.max_age_s / 2)
        return min(max(0.0, time.time() - kept), self._config.max_age_s - grace_s)

    def _works(self) -> None:
        if self.fault:
            logger.warning("outbox on disk again file=%s", self._path)
        self.fault = ""

    def _failed(self, error: sqlite3.DatabaseError) -> None:
        """The open database cannot be read or written."""
        if isinstance(error, sqlite3.OperationalError):  # not the content's fault: full, read-only, I/O error, locked
            # A full or read-only disk can still be read. After any other fault the connection is not to be trusted.
            self._refuse(str(error), reopen=not ("full" in str(error) or "readonly" in str(error)))
        else:
            self._damage = str(error)
            self._refuse(str(error), reopen=True)

    def _refuse(self, why: str, *, reopen: bool) -> None:
        if self.fault != why:
            logger.error("outbox not on disk file=%s reason=%s: rows wait in memory", self._path, why)
        self.fault, self._commit_at = why, time.monotonic() + RETRY_S
        if reopen:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(self._path.name + suffix)

    def _read_note(self) -> tuple[int, int]:
        """The latest commit's number and how many rows there were; zeros: unknown."""
        try:
            with self._beside(".rows").open("rb") as file:
                commits, rows = map(int, file.read(64).split())
        except (OSError, ValueError):
            return 0, 0
        return max(0, commits), max(0, rows)

    def _write_note(self) -> None:
        """Written after the commit and not synced: it may be older than the database, and only a newer one counts."""
        file = os.open(self._beside(".rows"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(file, b"%-20d %-20d\n" % (self._commits, len(self._on_disk)), 0)
        finally:
            os.close(file)


def _row(fields: tuple[Any, ...] | None) -> Row | None:
    """A row of the table, as COLUMNS names them; None: it is not there, or not what was written."""
    if fields is None or fields[-1] != b"blobrealrealblobblob":
        return None
    row = Row(*fields[:-1])
    is_sound = len(row.id) == ID_BYTES and len(row.payload) <= MAX_ENVELOPE and len(row.event) <= MAX_EVENT
    return row if is_sound else None
