"""Requests on disk: restarts, kills, damaged files, disks that refuse, and clocks."""

import os
import queue
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.config import OutboxConfig
from edge_runtime.requests import outbox as module
from edge_runtime.requests.actions import Found
from edge_runtime.requests.outbox import APPLICATION, BACKLOG, MEMORY_BYTES, Outbox
from edge_runtime.requests.tracked import Row

LONG_S = 60.0  # for what takes milliseconds when nothing is wrong
YEAR = 366 * 86400.0


def row(number: int, size: int = 600, kept: float | None = None) -> Row:
    kept = time.time() if kept is None else kept
    return Row(number.to_bytes(8, "big"), kept - 5, kept, random.Random(number).randbytes(size), b'{"type":"new"}')


class Owner:
    """An outbox, and what it tells."""

    def __init__(self, path: Path, *, start: bool = True, **config: Any) -> None:
        self.found: queue.Queue[tuple[list[Found], int]] = queue.Queue()
        self.stored: queue.Queue[list[bytes]] = queue.Queue()
        self.read_back: queue.Queue[tuple[bytes, Row | None]] = queue.Queue()
        self.outbox = Outbox(
            OutboxConfig(str(path), **config),
            on_found=lambda rows, missing: self.found.put((rows, missing)),
            on_stored=self.stored.put,
            on_read=lambda request_id, one: self.read_back.put((request_id, one)),
        )
        if start:
            self.outbox.start()

    def first_look(self) -> tuple[list[bytes], int]:
        """The ids that an earlier run left, and how many rows are missing."""
        rows, missing = self.found.get(timeout=LONG_S)
        return [one.id for one in rows], missing

    def put(self, *rows: Row) -> None:
        """Until they are on disk."""
        for one in rows:
            self.outbox.put(one)
        self.wait_stored(len(rows))

    def wait_stored(self, count: int) -> None:
        while count > 0:
            count -= len(self.stored.get(timeout=LONG_S))

    def read(self, request_id: bytes) -> Row | None:
        self.outbox.read(request_id)
        said, one = self.read_back.get(timeout=LONG_S)
        assert said == request_id
        return one


@contextmanager
def opened(path: Path, **config: Any) -> Iterator[Owner]:
    owner = Owner(path, **config)
    try:
        yield owner
    finally:
        owner.outbox.close()


def filled(path: Path, count: int) -> list[Row]:
    """A closed file with so many rows."""
    rows = [row(n) for n in range(count)]
    with opened(path) as owner:
        owner.put(*rows)
    return rows


def test_what_was_stored_is_there_after_the_next_start_oldest_first(tmp_path):
    rows = filled(tmp_path / "o.db", 30)
    with opened(tmp_path / "o.db") as owner:
        found, missing = owner.found.get(timeout=LONG_S)
        assert ([one.id for one in found], missing) == ([one.id for one in rows], 0)
        assert [one.size for one in found] == [one.size for one in rows]
        assert all(owner.read(one.id) == one for one in rows)


def test_rows_can_be_read_before_they_are_on_disk_and_what_ends_early_never_wears_it(tmp_path):
    with opened(tmp_path / "o.db") as owner:
        owner.first_look()
        owner.outbox.put(row(1))
        owner.outbox.put(row(2))
        owner.outbox.delete(row(1).id)
        assert owner.read(row(2).id).payload == row(2).payload
        assert owner.stored.get(timeout=LONG_S) == [row(2).id]
        assert owner.read(row(1).id) is None


def test_what_has_ended_is_not_found_again(tmp_path):
    rows = filled(tmp_path / "o.db", 3)
    with opened(tmp_path / "o.db") as owner:
        owner.outbox.delete(rows[1].id)
        owner.outbox.delete(b"stranger")
    with opened(tmp_path / "o.db") as owner:
        assert owner.first_look() == ([rows[0].id, rows[2].id], 0)


def test_a_second_row_with_an_id_changes_nothing(tmp_path):
    with opened(tmp_path / "o.db") as owner:
        owner.put(first := row(1))
        owner.outbox.put(Row(first.id, 0.0, 0.0, b"other", b"{}"))
        assert owner.read(first.id) == first


def test_the_file_is_private_and_stays_small_over_many_generations_of_rows(tmp_path):
    path = tmp_path / "o.db"
    with opened(path) as owner:
        for generation in range(30):
            rows = [row(100 * generation + n, 2000) for n in range(40)]
            owner.put(*rows)
            for one in rows:
                owner.outbox.delete(one.id)
        owner.put(row(9999))
        assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size < 4 * 40 * 2100


@pytest.mark.parametrize("jump", [YEAR, -YEAR, -1.7e9], ids=["a year on", "a year back", "1970"])
def test_a_clock_that_jumps_between_two_runs_makes_no_row_too_old(tmp_path, jump):
    with opened(tmp_path / "o.db") as owner:
        owner.put(row(1, kept=time.time() - jump))
    with opened(tmp_path / "o.db", max_age_s=3600.0) as owner:
        ((found,), _) = owner.found.get(timeout=LONG_S)
        assert found.age_s == (3000.0 if jump > 0 else 0.0)


def test_the_time_away_counts_if_the_clock_is_believable(tmp_path):
    with opened(tmp_path / "o.db") as owner:
        owner.put(row(1, kept=time.time() - 1000))
    with opened(tmp_path / "o.db", max_age_s=3600.0) as owner:
        ((found,), _) = owner.found.get(timeout=LONG_S)
        assert found.age_s == pytest.approx(1000, abs=30)


# ---- damage ----


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


DAMAGE = {
    "zeroed header": lambda path: overwrite(path, 0, bytes(100)),
    "garbage in the schema": lambda path: overwrite(path, 100, os.urandom(1000)),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut to a stump": lambda path: os.truncate(path, 50),
    "another version": lambda path: overwrite(path, 60, (7).to_bytes(4, "big")),  # user_version
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_set_aside_and_its_rows_are_reported(tmp_path, damage):
    path = tmp_path / "o.db"
    filled(path, 40)
    DAMAGE[damage](path)
    with opened(path) as owner:
        assert owner.first_look() == ([], 40)
        owner.put(row(99))
    assert (tmp_path / "o.db.damaged").exists()
    with opened(path) as owner:
        assert owner.first_look() == ([row(99).id], 0)


def test_a_file_of_an_earlier_version_is_set_aside(tmp_path):
    path = tmp_path / "o.db"
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute("PRAGMA user_version = 1")
        db.execute("CREATE TABLE kept (seq INTEGER PRIMARY KEY, id BLOB)")
    db.close()
    (tmp_path / "o.db.mark").write_bytes(b"AFm1")
    with opened(path) as owner:
        assert owner.first_look() == ([], 0)
        owner.put(row(1))
    assert (tmp_path / "o.db.damaged").exists()


@pytest.mark.parametrize(
    "damage",
    ["id = CAST(id AS TEXT)", "id = 5", "kept = 'soon'", "payload = CAST(x'ff' AS TEXT)", "captured = NULL"],
)
def test_values_of_another_type_end_neither_the_thread_nor_the_outbox(tmp_path, damage):
    rows = filled(tmp_path / "o.db", 3)
    with sqlite3.connect(tmp_path / "o.db") as db:
        db.execute("PRAGMA writable_schema = ON")
        schema = "UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '') WHERE name = 'kept'"
        db.execute(schema)
    db.close()
    with sqlite3.connect(tmp_path / "o.db") as db:
        db.execute(f"UPDATE kept SET {damage} WHERE id = ?", (rows[1].id,))
    db.close()
    with opened(tmp_path / "o.db") as owner:
        found, missing = owner.first_look()
        assert len(found) + missing == 3
        read = [owner.read(one.id) for one in rows]
        assert all(one in (None, wanted) for one, wanted in zip(read, rows, strict=True))
        owner.put(row(99))
    with opened(tmp_path / "o.db") as owner:
        assert row(99).id in owner.first_look()[0]


def test_a_row_whose_bytes_changed_type_is_lost_alone(tmp_path):
    rows = filled(tmp_path / "o.db", 3)
    with sqlite3.connect(tmp_path / "o.db") as db:
        db.execute("UPDATE kept SET payload = 'text' WHERE id = ?", (rows[1].id,))
    db.close()
    with opened(tmp_path / "o.db") as owner:
        assert [owner.read(one.id) for one in rows] == [rows[0], None, rows[2]]


def test_a_file_that_is_gone_is_reported_once(tmp_path):
    filled(tmp_path / "o.db", 12)
    (tmp_path / "o.db").unlink()
    for missing in (12, 0):
        with opened(tmp_path / "o.db") as owner:
            assert owner.first_look() == ([], missing)


def committed_one_by_one(path: Path, aside: Path, commits: int) -> list[int]:
    """Copies as a killed process leaves them, a commit per row; returns the log's length after each."""
    lengths = []
    aside.mkdir(exist_ok=True)
    with opened(path) as owner:
        for n in range(commits):
            owner.put(row(n, kept=1.8e9))
            lengths.append(path.with_name(path.name + "-wal").stat().st_size)
        for name in ("o.db", "o.db-wal", "o.db.rows"):
            shutil.copy(path.with_name(name), aside / name)
    return lengths


def test_commits_behind_damage_in_the_log_are_reported_as_lost(tmp_path):
    lengths = committed_one_by_one(tmp_path / "o.db", tmp_path / "cut", 20)
    overwrite(tmp_path / "cut" / "o.db-wal", lengths[7] + 200, os.urandom(500))
    with opened(tmp_path / "cut" / "o.db") as owner:
        assert owner.first_look() == ([row(n).id for n in range(8)], 12)
        owner.put(row(99))
    with opened(tmp_path / "cut" / "o.db") as owner:
        assert owner.first_look()[1] == 0


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_power_cut_in_a_later_write_leaves_every_commit_before_it(data):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_S", 0.0)
        aside = Path(folder) / "cut"
        lengths = committed_one_by_one(Path(folder) / "o.db", aside, 6)
        safe = data.draw(st.integers(0, 5))
        os.truncate(aside / "o.db-wal", data.draw(st.integers(lengths[safe], lengths[-1])))
        with opened(aside / "o.db") as owner:
            found, missing = owner.first_look()
        assert found[: safe + 1] == [row(n).id for n in range(safe + 1)]
        assert len(found) + missing == 6


CHILD = """
import sys, time, threading
from edge_runtime.config import OutboxConfig
from edge_runtime.requests.outbox import Outbox
from edge_runtime.requests.tracked import Row
say = lambda ids: print(*(int.from_bytes(one, "big") for one in ids), flush=True)
ready = threading.Event()
config = OutboxConfig(sys.argv[1], every_request=True)
outbox = Outbox(config, on_found=lambda *_: ready.set(), on_stored=say, on_read=print)
outbox.start()
ready.wait()
n = 0
while True:
    outbox.put(Row(n.to_bytes(8, "big"), time.time(), time.time(), bytes(900), b"{}"))
    n += 1
    while not outbox.has_room(): time.sleep(0.001)
    if n % 50 == 0: time.sleep(0.01)
"""


@pytest.mark.parametrize("lines", [1, 7, 40])
def test_rows_reported_as_stored_survive_a_kill_at_any_moment(tmp_path, lines):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "o.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()
    safe = {int(word) for line in said if line.endswith("\n") for word in line.split()}
    with opened(tmp_path / "o.db") as owner:
        found, missing = owner.first_look()
        assert safe <= {int.from_bytes(one, "big") for one in found}
        assert (missing, owner.outbox.fault) == (0, "")
    assert len(safe) >= lines


# ---- disks that refuse ----


def test_another_programs_file_is_left_alone(tmp_path):
    other, text = tmp_path / "other.db", tmp_path / "notes.txt"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    text.write_text("dear diary " * 500)
    for path in (other, text):
        before = path.read_bytes()
        owner = Owner(path)
        owner.outbox.put(row(1))
        assert owner.read(row(1).id) is not None  # from memory
        assert str(path) in owner.outbox.fault
        assert [one.id for one in owner.outbox.close()] == [row(1).id]
        assert path.read_bytes() == before


def test_a_second_board_on_the_same_file_stays_in_memory(tmp_path):
    with opened(tmp_path / "o.db") as first:
        first.put(row(1))
        script = (
            "import sys\nfrom edge_runtime.config import OutboxConfig\n"
            "from edge_runtime.requests.outbox import Outbox\n"
            "no = lambda *_: print('opened')\n"
            "outbox = Outbox(OutboxConfig(sys.argv[1]), on_found=no, on_stored=no, on_read=no)\n"
            "outbox.start(); outbox.close(); print(outbox.fault)"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "o.db")]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert said == "database is locked\n"
        assert first.read(row(1).id) is not None


def test_without_a_place_rows_wait_in_memory_and_are_written_when_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    place = tmp_path / "state"
    place.write_text("a file where the folder should be")
    with opened(place / "o.db") as owner:
        owner.outbox.put(row(1))
        owner.outbox.put(row(2))
        assert owner.read(row(2).id) is not None
        assert owner.outbox.fault
        owner.outbox.delete(row(1).id)
        place.unlink()
        assert owner.first_look() == ([], 0)
        assert owner.stored.get(timeout=LONG_S) == [row(2).id]
        assert owner.outbox.fault == ""
    with opened(place / "o.db") as owner:
        assert owner.first_look() == ([row(2).id], 0)


def test_memory_is_bounded_while_the_disk_refuses(tmp_path):
    (tmp_path / "state").write_text("")
    owner = Owner(tmp_path / "state" / "o.db")
    count = 0
    while owner.outbox.has_room():
        owner.outbox.put(row(count, 200_000))
        owner.read(row(count).id)  # so that it has been taken
        count += 1
    assert count == MEMORY_BYTES // 200_000 + 1
    assert len(owner.outbox.close()) == count


def test_a_disk_that_hangs_holds_up_nobody_and_the_surplus_is_refused(tmp_path):
    owner = Owner(tmp_path / "o.db", start=False)  # its thread does nothing: as if the disk hung
    while owner.outbox.has_room():
        owner.outbox.put(row(0))
    assert owner.outbox._commands.qsize() == BACKLOG
    owner.outbox.start()
    owner.outbox.close()


def test_rows_that_a_damaged_disk_loses_while_it_runs_are_reported_by_id(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    path = tmp_path / "o.db"
    with opened(path) as owner:
        owner.put(*(rows := [row(n, 5000) for n in range(20)]))
        owner.outbox.delete(rows[0].id)
        with suppress(queue.Empty):  # what is not written yet is written first
            owner.stored.get(timeout=0.3)
        owner.outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        owner.outbox._db.execute("PRAGMA shrink_memory")
        overwrite(path, 0, os.urandom(path.stat().st_size))
        lost = set()
        owner.outbox.put(row(100))
        owner.outbox.read(rows[1].id)
        while len(lost) < 19:
            request_id, one = owner.read_back.get(timeout=LONG_S)
            assert one is None
            lost.add(request_id)
        assert lost == {one.id for one in rows[1:]}
        owner.wait_stored(1)


REFUSING = """
import pathlib, queue, subprocess, sys, time
from edge_runtime.config import OutboxConfig
from edge_runtime.requests import outbox as module
from edge_runtime.requests.outbox import Outbox
from edge_runtime.requests.tracked import Row
module.RETRY_S = 0.1
folder = pathlib.Path(sys.argv[1])
mount = lambda *options: subprocess.run(["mount", *options, str(folder)], check=True)
mount("-t", "tmpfs", "-o", "size=8m", "none")
row = lambda n: Row(n.to_bytes(8, "big"), time.time(), time.time(), bytes(20_000), b"{}")
found, stored, said = queue.Queue(), queue.Queue(), queue.Queue()
def start():
    outbox = Outbox(
        OutboxConfig(str(folder / "o.db"), max_bytes=64 << 20),
        on_found=lambda rows, missing: found.put((len(rows), missing)),
        on_stored=stored.put,
        on_read=lambda request_id, one: said.put(one),
    )
    outbox.start()
    return outbox
def wait(count):
    while count > 0: count -= len(stored.get(timeout=60))
def read(outbox, n):
    outbox.read(row(n).id)
    return said.get(timeout=60)
outbox = start()
assert found.get(timeout=60) == (0, 0)
for n in range(10): outbox.put(row(n))
wait(10)
other = folder / "other"
with other.open("wb", buffering=0) as file:
    try:
        while True: file.write(bytes(4096))
    except OSError: pass
for n in range(10, 60): outbox.put(row(n))
while "full" not in outbox.fault: time.sleep(0.01)
assert read(outbox, 3).id == row(3).id and read(outbox, 50).id == row(50).id, "reading goes on"
outbox.delete(row(3).id)
other.unlink()
wait(50)
assert outbox.fault == "" and outbox.close() == []
mount("-o", "remount,ro")
outbox = start()
outbox.put(row(500))
while not outbox.fault: time.sleep(0.01)
mount("-o", "remount,rw")
assert found.get(timeout=60) == (59, 0)
wait(1)
assert outbox.fault == "" and outbox.close() == []
print("all held")
"""


def test_a_full_and_a_read_only_disk_are_outlived(tmp_path):
    """In a mount namespace of its own, if the kernel lets us have one."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    command = [*unshare, sys.executable, "-c", REFUSING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "all held\n", done.stderr


def test_any_thread_may_put_read_and_delete(tmp_path):
    with opened(tmp_path / "o.db") as owner:
        owner.first_look()

        def work(first: int) -> None:
            for n in range(first, first + 50):
                owner.outbox.put(row(n))
            for n in range(first, first + 25):
                owner.outbox.delete(row(n).id)

        threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with opened(tmp_path / "o.db") as owner:
        found, missing = owner.first_look()
        assert (sorted(found), missing) == ([row(1000 * t + n).id for t in range(4) for n in range(25, 50)], 0)
