"""The texts of the last days, to search in: a file of SQLite with a full-text index (FTS5), bounded in days and bytes.

The newest texts may also have a vector each, which says what they mean; meaning.py computes them.

A thread of its own writes, so that a slow disk delays no message. https://www.sqlite.org/fts5.html, section 4.4.3, has
the two tables and their triggers.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import AiflowError, ConfigError
from edge_runtime.logs import printable
from firmware_tools.ui.rows import Found, shown
from firmware_tools.ui.site import Answer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

KEEP_DAYS = 7
MAX_BYTES = 256 << 20  # of the file; a text takes about 500 bytes
MAX_WAITING = 10_000  # texts that are not written yet; more are counted and left out
BATCH = 1000  # texts of one transaction
PAGE = 4096  # bytes; SQLite's unit
FOUND = 50  # answers of one search
MAX_QUERY = 200  # characters
VECTOR = 384  # numbers of a vector, each a float16
MAX_VECTORS = 50_000  # the newest texts that have one: 39 MB of the file
PART = 4096  # vectors that are compared at a time
MIN_SIMILARITY = 0.2  # cosine; texts about something else have less
SEARCH_S = 2.0
STEPS = 10_000  # of SQLite's machine, between two looks at the clock
CLOSE_S = 5.0
APPLICATION = 0x61666C77  # marks a file as this command's; any number that nobody else uses
WANTED = "name a file that this command has written, or one that does not exist yet"
REMOVED = """
CREATE TRIGGER IF NOT EXISTS answer_removed AFTER DELETE ON answers BEGIN
    INSERT INTO words(words, rowid, text, label) VALUES ('delete', old.id, old.text, old.label);
END;
"""
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS answers(
    id INTEGER PRIMARY KEY, at REAL, board TEXT, camera TEXT, frame TEXT, text TEXT, label TEXT,
    UNIQUE(board, camera, frame));
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(
    text, label, content='answers', content_rowid='id', tokenize='unicode61 remove_diacritics 2');
CREATE TABLE IF NOT EXISTS vectors(
    id INTEGER PRIMARY KEY REFERENCES answers ON DELETE CASCADE, vector BLOB CHECK(length(vector) = {2 * VECTOR}));
CREATE TRIGGER IF NOT EXISTS answer_added AFTER INSERT ON answers BEGIN
    INSERT INTO words(rowid, text, label) VALUES (new.id, new.text, new.label);
END;
{REMOVED}"""
NEWEST = """
SELECT id, at, board, camera, text, label FROM answers
WHERE id < ? AND (? = '' OR board = ?) ORDER BY id DESC LIMIT ?
"""
ONE = "SELECT id, at, board, camera, text, label FROM answers WHERE id = ?"
SEARCH = """
SELECT id, at, board, camera, answers.text, answers.label FROM words JOIN answers ON id = words.rowid
WHERE words MATCH ? AND words.rowid < ? AND (? = '' OR board = ?) ORDER BY words.rowid DESC LIMIT ?
"""
WITHOUT_VECTOR = """
SELECT id, text FROM answers WHERE id > max(
    (SELECT coalesce(max(id), 0) FROM vectors), (SELECT coalesce(max(id), 0) FROM answers) - ?)
ORDER BY id LIMIT ?
"""
# Not `?1` twice: Python 3.12.0 to 3.12.3 warn of a number in a placeholder.
ADD_VECTOR = """
INSERT OR REPLACE INTO vectors SELECT id, vector FROM (SELECT ? AS id, ? AS vector) JOIN answers USING (id)
"""
OLD_VECTORS = "DELETE FROM vectors WHERE id <= (SELECT max(id) FROM vectors) - ?"
OLD = """
DELETE FROM answers WHERE id <= (SELECT max(id) FROM (SELECT id, at FROM answers ORDER BY id LIMIT ?) WHERE at < ?)
"""
OLDEST_HALF = "DELETE FROM answers WHERE id <= (SELECT (min(id) + max(id)) / 2 FROM answers)"


class SearchError(AiflowError, ValueError):
    """A search that cannot be made as asked, or took too long."""


class History:
    """`with` opens and closes it. Any thread may search; `put` never waits."""

    def __init__(self, file: Path | None, keep_days: float = KEEP_DAYS, max_bytes: int = MAX_BYTES) -> None:
        """file: None for a temporary one. Raises ConfigError for a file that cannot be used."""
        self._keep_s = 86_400 * keep_days
        self.problem = ""  # why texts are not kept at present
        self._lock = threading.Lock()
        self._waiting: queue.Queue[Answer | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        try:
            if file:
                if not file.parent.is_dir():
                    raise ConfigError(f"--history {file}: there is no folder {file.parent}: create it first")
                file.touch(mode=0o600)  # readable by its owner alone: the texts say who is at home
            self._database = sqlite3.connect(file or "", check_same_thread=False)
            self._database.execute(f"PRAGMA max_page_count = {max_bytes // PAGE}")
            self._database.execute("PRAGMA foreign_keys = ON")  # a text that is forgotten takes its vector along
            self._database.execute("PRAGMA synchronous = OFF")  # a power cut may cost the file, which is a convenience
            self._open()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"--history {file}: {error}: {WANTED}") from error

    def _open(self) -> None:
        (ours,) = self._database.execute("PRAGMA application_id").fetchone()
        (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and ours != APPLICATION:  # a file of another program
            raise sqlite3.DatabaseError("is another program's database")
        self._database.execute(f"PRAGMA application_id = {APPLICATION}")
        self._database.executescript(SCHEMA)

    def __enter__(self) -> "History":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(queue.Full):  # a disk that hangs: the thread ends with the process
            self._waiting.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._database.close()

    def put(self, answer: Answer) -> None:
        try:
            self._waiting.put_nowait(answer)
        except queue.Full:
            self._report("texts come faster than they can be written")

    def add(self, answers: Sequence[Answer], now: float) -> None:
        """Writes them, and removes what is too old. The same frame of a camera is kept once. Raises sqlite3.Error."""
        self._write_or_shrink(lambda: self._write(answers, now))

    def without_vector(self, count: int) -> list[tuple[int, str]]:
        """Ids and texts of the oldest ones that still need a vector. Raises sqlite3.Error."""
        with self._lock:
            return self._database.execute(WITHOUT_VECTOR, (MAX_VECTORS, count)).fetchall()

    def add_vectors(self, ids: Iterable[int], vectors: "NDArray[np.float32]") -> None:
        """vectors: of length 1, [ids, VECTOR]. Those of texts that are forgotten are left out. Raises sqlite3.Error."""
        rows = [(each, vector.astype("float16").tobytes()) for each, vector in zip(ids, vectors, strict=True)]

        def write() -> None:
            with self._database:
                self._database.executemany(ADD_VECTOR, rows)
                self._database.execute(OLD_VECTORS, (MAX_VECTORS,))

        self._write_or_shrink(write)

    def nearest(self, vector: "NDArray[np.float32]", label: str = "", board: str = "") -> list[Found]:
        """The FOUND answers with the most similar vectors, the most similar first. vector: of length 1.

        label: as in `search`. Raises SearchError.
        """
        import numpy as np  # here: a page without search by meaning does not load it

        wanted, values = ["1"], list[str]()
        if board:
            wanted.append("id IN (SELECT id FROM answers WHERE board = ?)")
            values.append(board)
        if query := _query(label):
            wanted.append("id IN (SELECT rowid FROM words WHERE words MATCH ?)")
            values.append(f"label : ({query})")

        def read() -> list[Found]:
            cursor = self._database.execute(f"SELECT id, vector FROM vectors WHERE {' AND '.join(wanted)}", values)
            best: list[tuple[float, int]] = []
            while part := cursor.fetchmany(PART):  # not all at once: they would take 80 MB
                numbers = np.frombuffer(b"".join(blob for _, blob in part), np.float16).reshape(-1, VECTOR)
                similarities = (numbers.astype(np.float32) @ vector).tolist()
                best += [(each, row[0]) for each, row in zip(similarities, part, strict=True) if each >= MIN_SIMILARITY]
                best = sorted(best, reverse=True)[:FOUND]
            rows = [(self._database.execute(ONE, (number,)).fetchone(), similarity) for similarity, number in best]
            return [_found(row, round(similarity, 3)) for row, similarity in rows]

        return self._read(read)

    def search(self, words: str, label: str = "", board: str = "", before: int | None = None) -> list[Found]:
        """The newest FOUND answers with all of these words, or with longer ones that begin so; all if there is none.

        label: the same for the likeliest label. before: only answers with a smaller id. Raises SearchError.
        """
        queries = {"text": _query(words), "label": _query(label)}
        parts = [f"{column} : ({query})" for column, query in queries.items() if query]
        values = (2**62 if before is None else before, board, board, FOUND)

        def read() -> list[Found]:
            found = self._database.execute(SEARCH, (" AND ".join(parts), *values)) if parts else None
            rows = (found or self._database.execute(NEWEST, values)).fetchall()
            return [_found(row) for row in rows]

        return self._read(read)

    def _read(self, read: Callable[[], list[Found]]) -> list[Found]:
        """Within SEARCH_S. Raises SearchError."""
        with self._lock:
            end = time.monotonic() + SEARCH_S
            self._database.set_progress_handler(lambda: time.monotonic() > end, STEPS)
            try:
                return read()
            except sqlite3.Error as error:
                raise SearchError(f"the search failed: {error}; try other words") from error
            finally:
                self._database.set_progress_handler(None, 0)

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            is_open = None not in batch
            try:
                self.add([answer for answer in batch if answer], time.time())
                self.problem = ""
            except sqlite3.Error as error:  # a full disk or a damaged file: the page goes on without a history
                self._report(str(error))

    def _report(self, problem: str) -> None:
        if not self.problem:
            logger.warning("texts not kept error=%s", printable(problem))
        self.problem = problem

    def _write_or_shrink(self, write: Callable[[], None]) -> None:
        """Raises sqlite3.Error."""
        with self._lock:
            try:
                write()
            except sqlite3.OperationalError as error:
                if "full" not in str(error):
                    raise
                self._shrink()
                write()

    def _write(self, answers: Sequence[Answer], now: float) -> None:
        with self._database:  # a transaction
            self._database.executemany(
                "INSERT OR IGNORE INTO answers(at, board, camera, frame, text, label) VALUES (?, ?, ?, ?, ?, ?)",
                [(each.at, each.board, each.camera, each.frame, each.text, each.label) for each in answers],
            )
            self._database.execute(OLD, (2 * BATCH, now - self._keep_s))

    def _shrink(self) -> None:
        """Forgets the older half. The index only gives its pages back when it is built anew."""
        with self._database:
            # Else the transaction begins behind the next statement, and a full disk would leave no trigger.
            self._database.execute("BEGIN")
            self._database.execute("DROP TRIGGER answer_removed")
            self._database.execute(OLDEST_HALF)
            self._database.execute("INSERT INTO words(words) VALUES ('delete-all')")
            self._database.execute("INSERT INTO words(words) VALUES ('rebuild')")
            self._database.execute(REMOVED)
        logger.warning("history full: the older half is forgotten")


def _found(row: tuple[int, float, str, str, str, str], similarity: float | None = None) -> Found:
    number, at, board, camera, text, label = row
    return Found(number, at, board, shown(camera), shown(text), shown(label), similarity)


def _query(text: str) -> str:
    """An expression of FTS5 that holds if all words are there. Quoted, so that no character has a meaning."""
    if len(text) > MAX_QUERY:
        raise SearchError(f"{len(text)} characters to search for, want at most {MAX_QUERY}")
    words = [word for word in printable(text).split() if any(c.isalnum() for c in word)]
    quoted = ['"' + word.replace('"', '""') + '"*' for word in words]
    return " AND ".join(quoted)
