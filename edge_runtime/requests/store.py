"""A bounded store of requests on disk: what it keeps through a power cut, a bad disk and a wrong clock.

SQLite in WAL mode with synchronous = FULL: a commit is on the medium when it returns (sqlite.org/pragma.html,
"synchronous"; NORMAL loses the last commits with the power). A sync costs milliseconds on flash, so that rows are
committed in groups, and what is not committed stays in memory as well: a disk that refuses to write (full, read-only,
no permission) leaves a smaller store in memory, which is written out when the disk works again.

What SQLite does not see, we count. Every row has a CRC-32, and every commit writes how many rows there should be. A
damaged frame of the WAL silently takes all commits behind it away (sqlite.org/walformat.html, section 4), so that a
small file beside the database, the mark, is written after every commit and says what the database must know: rows that
are missing are reported as a number. A database that SQLite calls damaged is set aside under one fixed name.

Age is counted in the caller's monotonic seconds. Between runs only the wall clock remains, and boards without a battery
start in 1970 or last week: the time away counts where it is later than what was stored, and never so far that a row
has less than GRACE_S left. No jump of the clock drops anything.

No thread and no clock inside: `now` is monotonic seconds. Only one thread may use it, the one that made it. What the
reader of events may see twice: an end that was not yet committed when the power went is not remembered, so that its
request is asked again.
"""

import logging
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from typing import Any

from edge_runtime.wire.envelope import MAX_ENVELOPE
from edge_runtime.wire.event import MAX_EVENT

logger = logging.getLogger(__name__)

GROUP_ROWS = 20  # per commit, at most so many or GROUP_S: one sync for all
GROUP_S = 0.2
RETRY_S = 5.0  # between two tries of a disk that refuses
GRACE_S = 600.0  # what a row has left after a start, whatever the clock says; half the longest age if that is less
MEMORY_BYTES = 4 << 20  # of rows, while the disk refuses
MAX_ROWS = 65_536  # the index is in memory, some 300 bytes a row
ROW_BYTES = 64  # of a row beside its payload and event
DROP_SHARE = 20  # a twentieth of the rows goes when the file is at its cap: not one commit per new row
EXPIRE_ROWS = 256  # dropped in one go, which bounds the memory
RESERVE_S = 60.0  # between two tries to have the reserve again
RESERVE_BYTES = 1 << 20  # a full disk refuses even to delete; this file is removed then, to make room for that

PAGE = 4096  # bytes
WAL_PAGES = 256  # the file beside grows to about 1 MiB before it is copied into the database
APPLICATION = 0x41466F62  # "AFob": any other database is somebody else's
SCHEMA = 1
MARK = struct.Struct("<4sQQQI")  # magic, commit, next seq, rows, CRC-32 of these
MARK_MAGIC = b"AFm1"
HEAD = struct.Struct("<Q8sddIII")  # what a row's CRC-32 covers before payload and event


@dataclass(frozen=True, slots=True)
class Kept:
    """A request that waits for a better time."""

    request_id: bytes  # 8 bytes
    captured: float  # wall clock, seconds since 1970
    kept: float  # the same clock, when it was given to the store
    payload: bytes  # the request as first sent
    seen: bytes  # the frame's event so far, JSON
    tries: int = 0  # how often it was asked from the store, without an answer

    def __post_init__(self) -> None:
        if len(self.request_id) != 8 or len(self.payload) > MAX_ENVELOPE or len(self.seen) > MAX_EVENT:
            raise ValueError(
                f"request id of {len(self.request_id)}, payload of {len(self.payload)}, event of {len(self.seen)} "
                f"bytes, want 8, at most {MAX_ENVELOPE}, at most {MAX_EVENT}"
            )
        if not (isfinite(self.captured) and isfinite(self.kept)):  # SQLite would make NULL of it
            raise ValueError(f"captured = {self.captured}, kept = {self.kept}: want seconds since 1970")

    @property
    def size(self) -> int:
        """Bytes that count against the bound."""
        return len(self.payload) + len(self.seen) + ROW_BYTES


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that the store gave up, and why."""

    item: Kept
    reason: str  # a fixed phrase


@dataclass(slots=True)
class _Row:
    """What memory knows of a row."""

    size: int  # bytes
    born: float  # monotonic seconds, before this run's start for a row of an earlier one
    tries: int
    seq: int | None  # None: not on disk yet


@dataclass(frozen=True, slots=True)
class _State:
    """What every commit says of the whole; the newest one is also the mark."""

    commits: int = 0
    next_seq: int = 1
    live: int = 0  # rows that are there


class _DamagedError(Exception):
    """The database is not what was written."""


class _RefusedError(Exception):
    """The file cannot be used, and is left alone."""


class Spool:
    """The store. After each call, `take_dropped` has what had to go; `gaps` counts what went without its content."""

    def __init__(self, path: Path, max_bytes: int, max_age_s: float, *, now: float, wall: float) -> None:
        """Opens or creates `path`; raises nothing for what it finds there: see `found`, `gaps` and `fault`.

        max_bytes bounds the rows and the file; its WAL and the reserve add about 1 MiB each. wall: seconds since 1970.
        """
        self._path, self._max_bytes, self._max_age_s = path, max_bytes, max_age_s
        self._wall_ahead = wall - now
        self._db: sqlite3.Connection | None = None
        self._state = _State()
        self._rows: dict[bytes, _Row] = {}  # oldest first
        self._fresh: dict[bytes, Kept] = {}  # those not on disk yet
        self._gone: dict[bytes, int] = {}  # id -> seq on disk, to be deleted there
        self._tried: set[bytes] = set()  # tries on disk are behind: written with the next commit, they are only a hint
        self._dropped: list[Dropped] = []
        self._commit_at = inf
        self._give_up_at = -inf  # not before: a medium that garbles everything must not keep us busy
        self._has_reserve, self._reserve_at = True, now
        self.bytes = 0  # of all rows
        self.found = 0  # rows of earlier runs, with those that were missing
        self.gaps = 0  # rows whose content was lost: damaged, or missing
        self.is_on_disk = False  # the last commit or opening worked
        self.fault = ""  # what is wrong with the disk, for people; empty: nothing
        self._open(now)

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self) -> Iterator[bytes]:
        """Oldest first, those that can be read now. Nothing may be changed while this runs."""
        return iter(self._rows if self._db else self._fresh)

    def keep(self, item: Kept, now: float) -> bool:
        """Take an item; it is safe when `commit` has named it. False: an item with its id is there already."""
        if item.request_id in self._rows:
            return False
        if item.size > self._max_bytes:
            self._dropped.append(Dropped(item, "larger than the outbox"))
            return True
        self._rows[item.request_id] = _Row(item.size, now, item.tries, None)
        self._fresh[item.request_id] = item
        self.bytes += item.size
        self._change(now)
        self._make_room()
        return True

    def done(self, request_id: bytes, now: float) -> bool:
        """Its end is known: forget it. False: it was not there."""
        if request_id not in self._rows:
            return False
        self._remove(request_id)
        self._change(now)
        return True

    def tried(self, request_id: bytes) -> int:
        """It was asked in vain once more; returns how often. 0: it is not there."""
        if (row := self._rows.get(request_id)) is None:
            return 0
        row.tries += 1
        if row.seq is not None:
            self._tried.add(request_id)
        return row.tries

    def load(self, request_id: bytes) -> Kept | None:
        """An item. None: not there, or its content is lost and counted in `gaps`, or the disk cannot be read now."""
        row = self._rows.get(request_id)
        if row is None:
            return None
        item = self._fresh.get(request_id) or self._read(request_id)
        return item and replace(item, tries=row.tries)

    def age_s(self, request_id: bytes, now: float) -> float:
        """Seconds that it has been kept, as far as they are known. KeyError: not there."""
        return now - self._rows[request_id].born

    def expire(self, now: float) -> None:
        """Drop what is too old, oldest first, at most EXPIRE_ROWS: call again while `expire_at` has passed."""
        old: list[bytes] = []
        for request_id in self.ids():
            if len(old) == EXPIRE_ROWS or self.age_s(request_id, now) < self._max_age_s:
                break
            old.append(request_id)
        for request_id in old:
            self._drop(request_id, "too old")
        if old:
            self._change(now)

    def expire_at(self) -> float:
        """When `expire` will next have something; inf: nothing is there."""
        oldest = next(self.ids(), None)
        return inf if oldest is None else self._rows[oldest].born + self._max_age_s

    def take_dropped(self) -> list[Dropped]:
        """What was dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def commit_at(self) -> float:
        """When `commit` should be called: a group is full, its time is up or the disk is to be tried again; or inf."""
        return -inf if self.is_on_disk and len(self._fresh) >= GROUP_ROWS else self._commit_at

    def commit(self, now: float) -> tuple[bytes, ...]:
        """Write what changed, synced. Returns the ids that are safe from now on: none while the disk refuses."""
        if self._db is None:
            self._open(now)
        is_behind = self._fresh or self._gone or self._tried or self._state.live != len(self._rows)
        if self.is_on_disk and not is_behind:  # as when what was kept was done before its group was full
            self._commit_at = inf
            return ()
        tried = [item for request_id in list(self._tried) if (item := self.load(request_id))]
        written: tuple[bytes, ...] | None = None
        while self._db is not None and written is None:
            written = self._attempt(self._db, tried, now)
        if not self.is_on_disk:
            self._make_room()
        return written or ()

    def close(self, now: float) -> None:
        """Write what there is; what no disk took is dropped."""
        self.commit(now)
        for request_id in list(self._fresh):
            self._drop(request_id, "not on disk when the board stopped")
        self._disconnect()

    # The index

    def _change(self, now: float) -> None:
        if self.is_on_disk:
            self._commit_at = min(self._commit_at, now + GROUP_S)

    def _remove(self, request_id: bytes) -> None:
        row = self._rows.pop(request_id)
        self.bytes -= row.size
        self._fresh.pop(request_id, None)
        self._tried.discard(request_id)
        if row.seq is not None:
            self._gone[request_id] = row.seq

    def _drop(self, request_id: bytes, reason: str) -> bool:
        """False: it cannot be read now, and stays. An item whose content is lost went to `gaps` instead."""
        item = self.load(request_id)
        if item is not None:
            self._remove(request_id)
            self._dropped.append(Dropped(item, reason))
        return request_id not in self._rows

    def _make_room(self) -> None:
        """Within all bounds, by dropping the oldest."""
        while self.bytes > self._max_bytes or len(self._rows) > MAX_ROWS:
            oldest = next(self.ids(), None)
            if oldest is None or not self._drop(oldest, "outbox full"):
                break
        if not self.is_on_disk:
            size = sum(item.size for item in self._fresh.values())
            while size > MEMORY_BYTES:
                item = next(iter(self._fresh.values()))
                size -= item.size
                self._drop(item.request_id, "disk refuses and memory full")

    def _settle(self, on_disk: dict[bytes, _Row], missing: int) -> None:
        """Take what a file holds as the truth. missing: rows that should be there and are not, in all."""
        vanished = {request_id for request_id, row in self._rows.items() if row.seq is not None} - on_disk.keys()
        unknown = max(0, missing - len(vanished))
        self.found += len(on_disk.keys() - self._rows.keys()) + unknown
        if lost := len(vanished) + unknown:
            self.gaps += lost
            logger.error("spool rows lost count=%d file=%s", lost, self._path)
        self._fresh = {request_id: item for request_id, item in self._fresh.items() if request_id not in on_disk}
        self._rows = on_disk | {request_id: self._rows[request_id] for request_id in self._fresh}
        self.bytes = sum(row.size for row in self._rows.values())

    # The disk

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(self._path.name + suffix)

    def _open(self, now: float) -> None:
        try:
            self._connect()
            missing = self._load_all(now)
        except (OSError, sqlite3.OperationalError, _RefusedError) as error:
            self._refuse(str(error), now, reopen=True)
        except (sqlite3.DatabaseError, _DamagedError) as error:
            if self._beside(".mark").exists():
                self._give_up(str(error), now)
            else:  # a wrong path in the config must not move another program's file away
                self._refuse(f"{error}, and nothing says that it was ours: remove {self._path}", now, reopen=True)
        else:
            self._works(now)
            if missing:
                self._commit_at = now  # so that the next start does not count them again
            self._make_room()

    def _connect(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # captions are private
        self._db = db = sqlite3.connect(self._path, timeout=1.0, isolation_level=None)
        db.text_factory = bytes  # a damaged row may have any type, and must not raise
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # one board a file; and the WAL then needs no shared memory
        application = db.execute("PRAGMA application_id").fetchone()[0]
        is_empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if application != APPLICATION and not is_empty:
            raise _RefusedError(f"{self._path} is another program's database: give the outbox a file of its own")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {WAL_PAGES * PAGE}")
        if is_empty:
            self._create(db)
        if (schema := db.execute("PRAGMA user_version").fetchone()[0]) != SCHEMA:
            raise _DamagedError(f"written by version {schema}, this is {SCHEMA}")
        db.execute(f"PRAGMA max_page_count = {self._max_bytes // PAGE}")
        if (verdict := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != b"ok":
            raise _DamagedError(repr(verdict))

    def _create(self, db: sqlite3.Connection) -> None:
        self._start_anew(self._read_mark())  # before the tables: a file without a mark would not be known as ours
        db.execute("BEGIN IMMEDIATE")
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {SCHEMA}")
        db.execute(
            "CREATE TABLE kept (seq INTEGER PRIMARY KEY, id BLOB NOT NULL, captured REAL NOT NULL, kept REAL NOT NULL, "
            "payload BLOB NOT NULL, seen BLOB NOT NULL, tries INTEGER NOT NULL, crc INTEGER NOT NULL)"
        )
        db.execute("CREATE TABLE state (commits INTEGER NOT NULL, next_seq INTEGER NOT NULL, live INTEGER NOT NULL)")
        db.execute("INSERT INTO state VALUES (?, ?, 0)", (self._state.commits, self._state.next_seq))
        db.execute("COMMIT")

    def _start_anew(self, mark: _State | None) -> None:
        """An empty file is next; the mark says what the one before it had."""
        self._settle({}, max(0, mark.live - len(self._gone)) if mark else 0)
        self._gone.clear()
        before = mark or self._state
        self._state = _State(before.commits, before.next_seq, 0)
        self._write_mark()

    def _load_all(self, now: float) -> int:
        """The index anew from the file. Returns how many rows it should have had besides."""
        assert self._db is not None
        states = self._db.execute("SELECT * FROM state").fetchall()
        if len(states) != 1 or not all(isinstance(value, int) and value >= 0 for value in states[0]):
            raise _DamagedError(f"{len(states)} states, want one of three numbers")
        state, mark = _State(*states[0]), self._read_mark()
        grace_s = min(GRACE_S, self._max_age_s / 2)
        rows: dict[bytes, _Row] = {}
        gone: dict[bytes, int] = {}
        readable, born = 0, -inf
        for seq, *fields in self._db.execute("SELECT * FROM kept ORDER BY seq"):
            item = _checked(seq, fields)
            readable += item is not None
            if item is None:
                gone[b"damaged row %d" % seq] = seq
            elif item.request_id in rows or item.request_id in self._gone:
                gone[item.request_id] = seq
            else:
                before = self._rows.get(item.request_id)
                away_s = min(max(0.0, now + self._wall_ahead - item.kept), self._max_age_s - grace_s)
                # Never older than the row before it, so that the first is always the next to be too old.
                born = max(born, before.born if before else now - away_s)
                tries = max(item.tries, before.tries if before else 0)
                rows[item.request_id] = _Row(item.size, born, tries, seq)
        missing = max(0, state.live - readable)
        if mark is not None and mark.commits > state.commits:
            # Ends in the lost commits are forgotten as well: those rows are asked again, and this counts at most.
            missing += min(mark.live, max(0, mark.next_seq - state.next_seq))
            state = _State(
                mark.commits, max(mark.next_seq, state.next_seq), -1
            )  # to be written, or it is counted again
        self._settle(rows, missing)
        self._gone, self._state = gone, state
        return missing

    def _read(self, request_id: bytes) -> Kept | None:
        """A row from disk; one that is not what was written is lost."""
        row = self._rows[request_id]
        if self._db is None:
            return None
        try:
            fields = self._db.execute("SELECT * FROM kept WHERE seq = ?", (row.seq,)).fetchone()
        except sqlite3.DatabaseError as error:
            self._refuse(str(error), -inf, reopen=True)  # opening it anew looks at all of it
            return None
        item = _checked(fields[0], fields[1:]) if fields else None
        if item is None or item.request_id != request_id:
            self._remove(request_id)
            self.gaps += 1
            logger.error("spool row damaged seq=%s file=%s", row.seq, self._path)
            return None
        return item

    def _write(self, db: sqlite3.Connection, tried: list[Kept]) -> tuple[bytes, ...]:
        fresh = tuple(self._fresh.values())
        first = self._state.next_seq
        state = _State(self._state.commits + 1, first + len(fresh), len(self._rows))
        changes = [(item.tries, _crc(seq, item), seq) for item in tried if (seq := self._seq(item.request_id))]
        try:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("DELETE FROM kept WHERE seq = ?", [(seq,) for seq in self._gone.values()])
            db.executemany("UPDATE kept SET tries = ?, crc = ? WHERE seq = ?", changes)
            db.executemany(
                "INSERT INTO kept VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (seq, i.request_id, i.captured, i.kept, i.payload, i.seen, i.tries, _crc(seq, i))
                    for seq, i in enumerate(map(self._with_tries, fresh), first)
                ),
            )
            db.execute(
                "UPDATE state SET commits = ?, next_seq = ?, live = ?", (state.commits, state.next_seq, state.live)
            )
            db.execute("COMMIT")
        except sqlite3.Error:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
        for seq, item in enumerate(fresh, first):
            self._rows[item.request_id].seq = seq
        for pending in (self._fresh, self._gone, self._tried):
            pending.clear()
        self._state = state
        with suppress(OSError):  # an old mark claims less, never too much
            self._write_mark()
        return tuple(item.request_id for item in fresh)

    def _attempt(self, db: sqlite3.Connection, tried: list[Kept], now: float) -> tuple[bytes, ...] | None:
        """None: to be tried again, as far as there is a database."""
        try:
            written = self._write(db, tried)
        except sqlite3.OperationalError as error:  # not the content's fault: full, read-only, I/O error, locked
            if self._recover(error, now):
                return None
            self._refuse(str(error), now)
            return ()
        except sqlite3.DatabaseError as error:
            self._give_up(str(error), now)
            return None
        self._works(now)
        return written

    def _seq(self, request_id: bytes) -> int | None:
        row = self._rows.get(request_id)
        return row.seq if row else None

    def _with_tries(self, item: Kept) -> Kept:
        return replace(item, tries=self._rows[item.request_id].tries)

    def _recover(self, error: sqlite3.OperationalError, now: float) -> bool:
        """Whether to try again at once: room was made in the file, or on the disk."""
        if "full" not in str(error):
            return False
        if self._is_at_cap():
            count = max(1, len(self._rows) // DROP_SHARE)
            dropped = [self._drop(request_id, "outbox full") for request_id in list(islice(self.ids(), count))]
            return any(dropped)
        self._has_reserve, self._reserve_at = False, now + RESERVE_S
        try:
            self._beside(".reserve").unlink()
        except OSError:
            return False
        logger.warning("spool disk full file=%s: the reserve is given up", self._path)
        return True

    def _is_at_cap(self) -> bool:
        """SQLite says "full" of its page limit and of the disk: which, the pages that the new rows may take decide."""
        assert self._db is not None
        pages, free, cap = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "max_page_count")
        )
        # A row has at most a leaf of its own and its overflow pages; 4 are for the tree above and the state.
        wanted = sum(2 + item.size // (PAGE - 4) for item in self._fresh.values()) + 4
        return bool(pages - free + wanted > cap)

    def _works(self, now: float) -> None:
        if now >= self._reserve_at:
            self._reserve_at = now + RESERVE_S
            self._has_reserve = self._make_reserve()
        fault = "" if self._has_reserve else f"disk of {self._path} is full, or nearly: make room"
        if self.fault and not fault:
            logger.warning("spool on disk again file=%s", self._path)
        self.is_on_disk, self.fault = True, fault
        self._commit_at = now if self._fresh or self._gone else inf

    def _make_reserve(self) -> bool:
        path = self._beside(".reserve")
        try:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError:
            with suppress(OSError):
                path.unlink()
            return False
        return True

    def _refuse(self, why: str, now: float, *, reopen: bool = False) -> None:
        """Rows wait in memory until the disk works again."""
        if self.fault != why:
            logger.error("spool not on disk file=%s reason=%s: rows wait in memory", self._path, why)
        self.is_on_disk, self.fault, self._commit_at = False, why, now + RETRY_S
        # A full or read-only disk still gives what it has; after anything else the connection is not to be trusted.
        if reopen or not ("full" in why or "readonly" in why):
            self._disconnect()

    def _give_up(self, why: str, now: float) -> None:
        """The file is damaged: set it aside, one of them, and start empty."""
        if now < self._give_up_at:
            self._refuse(f"damaged again: {why}", now, reopen=True)
            return
        self._give_up_at = now + RETRY_S
        self._disconnect()
        try:
            for suffix in ("-wal", ""):  # a log that stayed would be played into the new file
                aside = self._beside(".damaged" + suffix)
                aside.unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    self._beside(suffix).rename(aside)
            self._start_anew(self._read_mark())
        except OSError as error:
            self._refuse(f"{why}; {error}", now, reopen=True)
            return
        logger.error("spool damaged reason=%s: set aside as %s", why, self._beside(".damaged"))
        self._open(now)

    def _disconnect(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _read_mark(self) -> _State | None:
        """None: there is none, or it was cut off in the middle."""
        try:
            magic, commits, next_seq, live, crc = MARK.unpack(self._beside(".mark").read_bytes()[: MARK.size])
        except (OSError, struct.error):
            return None
        is_ours = magic == MARK_MAGIC and crc == zlib.crc32(MARK.pack(magic, commits, next_seq, live, 0)[:-4])
        return _State(commits, next_seq, live) if is_ours else None

    def _write_mark(self) -> None:
        """Not synced, and after the commit: it may be older than the database, and only a newer one means a loss."""
        state = self._state
        data = MARK.pack(MARK_MAGIC, state.commits, state.next_seq, state.live, 0)[:-4]
        file = os.open(self._beside(".mark"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(file, data + zlib.crc32(data).to_bytes(4, "little"), 0)
        finally:
            os.close(file)


def _checked(seq: int, fields: Any) -> Kept | None:
    """A row of the file as an item; None: it is not what was written."""
    *values, crc = fields
    try:
        item = Kept(*values)
        return item if crc == _crc(seq, item) else None
    except (TypeError, ValueError, OverflowError, struct.error):
        return None


def _crc(seq: int, item: Kept) -> int:
    head = HEAD.pack(seq, item.request_id, item.captured, item.kept, item.tries, len(item.payload), len(item.seen))
    return zlib.crc32(item.seen, zlib.crc32(item.payload, zlib.crc32(head)))
