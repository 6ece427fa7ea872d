"""The store on disk: against a model, a killed process, bad disks and clocks."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_runtime.requests.store import GROUP_ROWS, GROUP_S, MEMORY_BYTES, RETRY_S, Dropped, Kept, Spool

WALL = 1.8e9  # some time in 2027
YEAR = 366 * 86400.0


def item(number: int, size: int = 600, kept: float = WALL) -> Kept:
    return Kept(number.to_bytes(8, "big"), kept - 5, kept, random.Random(number).randbytes(size), b'{"type":"new"}')


def spool(path: Path, *, max_bytes: int = 1 << 20, max_age_s: float = 3600.0, now: float = 0.0, wall: float = WALL):
    return Spool(path, max_bytes, max_age_s, now=now, wall=wall)


def filled(path: Path, count: int, size: int = 600) -> list[Kept]:
    """A file with so many rows, closed."""
    store, items = spool(path), [item(n, size) for n in range(count)]
    for one in items:
        store.keep(one, 0.0)
    store.commit(0.0)
    store.close(0.0)
    return items


def content(store: Spool) -> list[Kept]:
    return [one for request_id in list(store.ids()) if (one := store.load(request_id))]


def test_what_was_committed_is_there_after_the_next_start_oldest_first(tmp_path):
    items = filled(tmp_path / "o.db", 30)
    store = spool(tmp_path / "o.db", wall=WALL + 60)
    assert content(store) == items
    assert (store.found, store.gaps, store.is_on_disk, store.fault) == (30, 0, True, "")
    assert store.age_s(items[0].request_id, 1.0) == 61.0


def test_keeping_an_id_twice_is_keeping_it_once(tmp_path):
    store = spool(tmp_path / "o.db")
    assert store.keep(item(1), 0.0)
    assert not store.keep(item(1, 50), 0.0)
    assert store.commit(0.0) == (item(1).request_id,)
    assert not store.keep(item(1, 50), 0.0)
    assert content(store) == [item(1)]


def test_a_group_is_committed_when_it_is_full_or_its_time_is_up(tmp_path):
    store = spool(tmp_path / "o.db")
    assert store.commit_at() == float("inf")
    store.keep(item(0), 1.0)
    store.keep(item(1), 1.1)
    assert store.commit_at() == 1.0 + GROUP_S
    for n in range(2, GROUP_ROWS):
        store.keep(item(n), 1.1)
    assert store.commit_at() < 1.0
    assert len(store.commit(1.1)) == GROUP_ROWS
    assert store.commit_at() == float("inf")
    store.done(item(0).request_id, 2.0)
    assert store.commit_at() == 2.0 + GROUP_S


def test_what_is_done_before_its_group_is_full_never_wears_the_disk(tmp_path):
    store = spool(tmp_path / "o.db")
    wal = tmp_path / "o.db-wal"
    before = wal.read_bytes()
    store.keep(item(0), 0.0)
    store.done(item(0).request_id, 0.1)
    assert store.commit(GROUP_S) == ()
    assert wal.read_bytes() == before
    assert store.commit_at() == float("inf")


def test_the_oldest_goes_when_the_bytes_are_used_up_and_is_returned(tmp_path):
    store = spool(tmp_path / "o.db", max_bytes=65536)
    for n in range(70):
        store.keep(item(n, 1000), 0.0)
    dropped = store.take_dropped()
    assert dropped == [Dropped(item(n, 1000), "outbox full") for n in range(len(dropped))]
    assert [one.request_id for one in content(store)] == [item(n).request_id for n in range(len(dropped), 70)]
    assert 65536 - 1100 < store.bytes <= 65536
    assert store.take_dropped() == []


def test_the_file_stays_below_its_bound_over_many_generations_of_rows(tmp_path):
    store = spool(tmp_path / "o.db", max_bytes=131072)
    ended = 0
    for n in range(1500):
        store.keep(item(n, 300 + 2617 * n % 6000), 0.0)
        if n % 3 == 0:
            ended += store.done(item(n - 7).request_id, 0.0) if n >= 7 else 0
        if n % 11 == 0:
            store.commit(0.0)
            assert (store.is_on_disk, store.fault) == (True, "")
        ended += len(store.take_dropped())
    store.commit(0.0)
    ended += len(store.take_dropped())
    assert ended + len(store) == 1500
    assert len(content(store)) == len(store) > 8
    store.close(0.0)
    assert (tmp_path / "o.db").stat().st_size <= 131072
    assert store.gaps == 0


def test_an_item_larger_than_the_outbox_is_dropped_alone(tmp_path):
    store = spool(tmp_path / "o.db", max_bytes=65536)
    store.keep(item(1), 0.0)
    store.keep(item(2, 66000), 0.0)
    assert [dropped.item.request_id for dropped in store.take_dropped()] == [item(2).request_id]
    assert content(store) == [item(1)]


@pytest.mark.parametrize(
    "bad",
    [(b"short", b"", b""), (bytes(8), bytes(256 * 1024 + 1), b""), (bytes(8), b"", bytes(64 * 1024 + 1))],
)
def test_an_item_out_of_bounds_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="want 8, at most 262144, at most 65536"):
        Kept(bad[0], 0.0, 0.0, bad[1], bad[2])


def test_a_time_that_is_none_is_refused_by_name():
    with pytest.raises(ValueError, match="want seconds since 1970"):
        Kept(bytes(8), float("nan"), WALL, b"", b"")


def test_tries_are_remembered_over_a_restart(tmp_path):
    filled(tmp_path / "o.db", 2)
    store = spool(tmp_path / "o.db")
    assert [store.tried(item(1).request_id) for _ in range(3)] == [1, 2, 3]
    store.close(0.0)
    assert [one.tries for one in content(spool(tmp_path / "o.db"))] == [0, 3]


# Age and clocks


def test_rows_expire_by_the_seconds_that_ran(tmp_path):
    store = spool(tmp_path / "o.db", max_age_s=100)
    store.keep(item(0), 0.0)
    store.keep(item(1), 50.0)
    store.expire(99.9)
    assert store.take_dropped() == []
    assert store.expire_at() == 100.0
    store.expire(100.0)
    assert store.take_dropped() == [Dropped(item(0), "too old")]
    assert store.expire_at() == 150.0


@pytest.mark.parametrize("jump", [YEAR, -YEAR, -WALL], ids=["a year on", "a year back", "1970"])
def test_a_clock_that_jumps_between_two_runs_expires_nothing_at_the_start(tmp_path, jump):
    filled(tmp_path / "o.db", 20)
    store = spool(tmp_path / "o.db", wall=WALL + jump, now=7.0)
    store.expire(7.0)
    assert len(store) == 20
    assert store.take_dropped() == []
    assert store.expire_at() - 7.0 == (600.0 if jump > 0 else 3600.0)


def test_the_time_away_counts_where_the_clock_is_believable(tmp_path):
    filled(tmp_path / "o.db", 1)
    assert spool(tmp_path / "o.db", wall=WALL + 1000).expire_at() == 2600.0


def test_a_clock_set_while_it_ran_does_not_change_the_order_of_age(tmp_path):
    store = spool(tmp_path / "o.db")
    store.keep(item(0, kept=WALL), 0.0)
    store.keep(item(1, kept=WALL - YEAR), 1.0)
    store.close(1.0)
    store = spool(tmp_path / "o.db", wall=WALL + 10)
    assert [store.age_s(item(n).request_id, 0.0) for n in (0, 1)] == [10.0, 10.0]


# Damage


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


DAMAGE = {
    "zeroed header": lambda path: overwrite(path, 0, bytes(100)),
    "garbage in the middle": lambda path: overwrite(path, path.stat().st_size // 2 // 4096 * 4096, os.urandom(4096)),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut to a stump": lambda path: os.truncate(path, 50),
    "another version": lambda path: overwrite(path, 60, (7).to_bytes(4, "big")),  # user_version
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_set_aside_and_its_rows_counted(tmp_path, damage):
    path = tmp_path / "o.db"
    filled(path, 40)
    DAMAGE[damage](path)
    store = spool(path)
    assert content(store) == []
    assert (store.found, store.gaps, store.is_on_disk) == (40, 40, True)
    assert (tmp_path / "o.db.damaged").exists()
    store.keep(item(99), 0.0)
    assert store.commit(0.0)
    store.close(0.0)
    again = spool(path)
    assert content(again) == [item(99)]
    assert (again.found, again.gaps) == (1, 0)


def test_a_file_damaged_under_its_log_is_set_aside_and_its_rows_counted(tmp_path):
    path, crashed = tmp_path / "o.db", tmp_path / "crashed"
    filled(path, 40)
    committed_in_wal(path, crashed, 60)
    DAMAGE["garbage in the middle"](crashed / "o.db")
    store = spool(crashed / "o.db")
    assert (content(store), store.gaps, store.is_on_disk) == ([], 60, True)
    assert (crashed / "o.db.damaged").exists()


def test_a_medium_that_garbles_everything_is_left_alone_for_a_while(tmp_path, monkeypatch):
    def garbled(*_: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    store = spool(tmp_path / "o.db")
    store.keep(item(1), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "_write", garbled)
        assert store.commit(0.0) == ()
        assert not store.is_on_disk
        assert "malformed" in store.fault
        assert store.commit_at() == RETRY_S
    assert store.commit(RETRY_S) == (item(1).request_id,)
    assert store.fault == ""


def test_one_damaged_file_is_kept(tmp_path):
    path = tmp_path / "o.db"
    for _ in range(3):
        filled(path, 5)
        DAMAGE["zeroed header"](path)
        spool(path).close(0.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["o.db", "o.db.damaged", "o.db.mark", "o.db.reserve"]


def test_a_row_whose_bytes_changed_is_lost_alone(tmp_path):
    path = tmp_path / "o.db"
    items = filled(path, 10)
    at = path.read_bytes().index(items[4].payload)
    overwrite(path, at + 100, b"!")
    store = spool(path)
    assert content(store) == items[:4] + items[5:]
    assert (store.found, store.gaps) == (10, 1)
    store.close(0.0)
    again = spool(path)
    assert (again.found, again.gaps) == (9, 0)


def test_a_row_that_changes_while_it_waits_is_lost_alone(tmp_path):
    path = tmp_path / "o.db"
    items = filled(path, 10, size=30_000)
    store = spool(path)
    overwrite(path, path.read_bytes().index(items[4].payload[5000:5100]), b"!")
    sqlite_reads_anew(store)
    assert content(store) == items[:4] + items[5:]
    assert store.gaps == 1
    assert items[4].request_id not in store.ids()


def sqlite_reads_anew(store: Spool) -> None:
    assert store._db is not None
    store._db.execute("PRAGMA shrink_memory")


def test_a_file_that_is_gone_is_a_loss_that_is_counted_once(tmp_path):
    filled(tmp_path / "o.db", 12)
    (tmp_path / "o.db").unlink()
    assert (spool(tmp_path / "o.db").gaps, spool(tmp_path / "o.db").gaps) == (12, 0)


def committed_in_wal(path: Path, aside: Path, commits: int) -> list[int]:
    """Copies as a killed process leaves them, `commits` rows with a commit each; the WAL's length after each."""
    store, lengths = spool(path), []
    for n in range(commits):
        store.keep(item(n), 0.0)
        store.commit(0.0)
        lengths.append(path.with_name(path.name + "-wal").stat().st_size)
    aside.mkdir(exist_ok=True)
    for name in ("o.db", "o.db-wal", "o.db.mark"):
        shutil.copy(path.with_name(name), aside / name)
    store.close(0.0)
    return lengths


def test_commits_behind_damage_in_the_wal_are_counted_as_lost(tmp_path):
    lengths = committed_in_wal(tmp_path / "o.db", tmp_path / "cut", 20)
    overwrite(tmp_path / "cut" / "o.db-wal", lengths[7] + 200, os.urandom(500))
    store = spool(tmp_path / "cut" / "o.db")
    assert content(store) == [item(n) for n in range(8)]
    assert (store.found, store.gaps) == (20, 12)
    store.commit(0.0)
    store.close(0.0)
    assert spool(tmp_path / "cut" / "o.db").gaps == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_power_cut_in_a_later_write_leaves_every_commit_before_it(data):
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "cut"
        lengths = committed_in_wal(Path(folder) / "o.db", aside, 6)
        safe = data.draw(st.integers(0, 5))
        cut = data.draw(st.integers(lengths[safe], lengths[-1]))
        os.truncate(aside / "o.db-wal", cut)
        store = spool(aside / "o.db")
        assert content(store)[: safe + 1] == [item(n) for n in range(safe + 1)]
        assert len(store) + store.gaps == 6 == store.found


CHILD = """
import sys, pathlib
from edge_runtime.requests.store import Kept, Spool
store = Spool(pathlib.Path(sys.argv[1]), 1 << 22, 3600.0, now=0.0, wall=1.8e9)
n = 0
while True:
    for n in range(n, n + 5):
        store.keep(Kept(n.to_bytes(8, "big"), 1.8e9, 1.8e9, bytes(900), b"{}"), 0.0)
    if n % 3 == 0:
        store.done((n - 20).to_bytes(8, "big"), 0.0) if n > 20 else None
    n += 1
    safe = store.commit(0.0)
    print(*(int.from_bytes(one, "big") for one in safe), flush=True)
"""


@pytest.mark.parametrize("lines", [1, 7, 40, 151])
def test_rows_reported_as_committed_survive_a_kill_at_any_moment(tmp_path, lines):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "o.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()
    safe = {int(word) for line in said if line.endswith("\n") for word in line.split()}
    store = spool(tmp_path / "o.db", max_bytes=1 << 22)
    there = {int.from_bytes(one.request_id, "big") for one in content(store)}
    ended = {n - 20 for n in range(4, max(safe) + 6, 5) if n % 3 == 0}
    assert len(safe) >= 5 * lines
    assert safe - there <= ended
    assert store.gaps == 0
    assert store.is_on_disk


# Disks that refuse


def test_another_programs_file_is_left_alone(tmp_path):
    other, text = tmp_path / "other.db", tmp_path / "notes.txt"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    text.write_text("dear diary " * 500)
    for path in (other, text):
        before = path.read_bytes()
        store = spool(path)
        store.keep(item(1), 0.0)
        assert store.commit(0.0) == ()
        assert not store.is_on_disk
        assert str(path) in store.fault
        assert content(store) == [item(1)]
        assert path.read_bytes() == before


def test_a_second_board_on_the_same_file_stays_in_memory(tmp_path):
    first = spool(tmp_path / "o.db")
    script = CHILD.split("n = 0", maxsplit=1)[0] + "print(store.is_on_disk, store.fault)"
    command = [sys.executable, "-c", script, str(tmp_path / "o.db")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split(maxsplit=1)[0] == "False"
    assert "locked" in said
    first.keep(item(1), 0.0)
    assert first.commit(0.0)


def test_without_a_place_rows_wait_in_memory_and_are_written_when_there_is_one(tmp_path):
    place = tmp_path / "state"
    place.write_text("a file where the folder should be")
    store = spool(place / "o.db")
    assert not store.is_on_disk
    assert store.fault
    store.keep(item(1), 0.0)
    store.keep(item(2), 0.0)
    assert store.commit(RETRY_S) == ()
    store.done(item(1).request_id, RETRY_S)
    assert store.commit_at() == 2 * RETRY_S
    place.unlink()
    assert store.commit(2 * RETRY_S) == (item(2).request_id,)
    assert (store.is_on_disk, store.fault) == (True, "")
    store.close(0.0)
    assert content(spool(place / "o.db")) == [item(2)]


def test_memory_is_bounded_while_the_disk_refuses(tmp_path):
    (tmp_path / "state").write_text("")
    store = spool(tmp_path / "state" / "o.db", max_bytes=64 << 20)
    count = MEMORY_BYTES // 200_000 + 10
    for n in range(count):
        store.keep(item(n, 200_000), 0.0)
    dropped = store.take_dropped()
    assert [one.item.request_id for one in dropped] == [item(n).request_id for n in range(len(dropped))]
    assert {one.reason for one in dropped} == {"disk refuses and memory full"}
    assert store.bytes <= MEMORY_BYTES
    store.close(0.0)
    left = store.take_dropped()
    assert {one.reason for one in left} == {"not on disk when the board stopped"}
    assert len(dropped) + len(left) == count


REFUSING = """
import os, pathlib, subprocess, sys
from edge_runtime.requests.store import RETRY_S, RESERVE_S, Kept, Spool
folder = pathlib.Path(sys.argv[1])
mount = lambda *options: subprocess.run(["mount", *options, str(folder)], check=True)
mount("-t", "tmpfs", "-o", "size=8m", "none")
def item(n): return Kept(n.to_bytes(8, "big"), 1.8e9, 1.8e9, bytes(20_000), b"{}")
now = 0.0
store = Spool(folder / "o.db", 64 << 20, 1e6, now=now, wall=1.8e9)
assert store.is_on_disk and not store.fault and (folder / "o.db.reserve").stat().st_size == 1 << 20
for n in range(10): store.keep(item(n), now)
assert len(store.commit(now)) == 10
other = folder / "other"
def fill():
    with other.open("wb", buffering=0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError: pass

fill()
for n in range(10, 20): store.keep(item(n), now)
assert len(store.commit(now)) == 10, "the reserve makes room"
assert store.is_on_disk and "full" in store.fault and not (folder / "o.db.reserve").exists()
fill_again = folder / "more"; other, first = fill_again, other
fill()
for n in range(20, 120): store.keep(item(n), now)
assert store.commit(now) == () and not store.is_on_disk and "full" in store.fault
assert len(store) == 120 and store.load(item(3).request_id) == item(3), "reading goes on"
store.done(item(3).request_id, now)
assert store.commit_at() == now + RETRY_S
other.unlink(); first.unlink()
now += RETRY_S
assert len(store.commit(now)) == 100 and store.is_on_disk
now += RESERVE_S; store.done(item(4).request_id, now); store.commit(now)
assert not store.fault, store.fault
assert not store.take_dropped() and not store.gaps
store.close(now)
mount("-o", "remount,ro")
store = Spool(folder / "o.db", 64 << 20, 1e6, now=now, wall=1.8e9)
assert not store.is_on_disk and store.fault
store.keep(item(500), now)
assert store.commit(now) == () and len(store) == 1
mount("-o", "remount,rw")
now += RETRY_S
assert len(store.commit(now)) == 1 and store.is_on_disk and len(store) == 119 == store.found + 1
assert next(store.ids()) == item(0).request_id
print("all held")
"""


def test_a_full_and_a_read_only_disk_are_outlived(tmp_path):
    """In a mount namespace of its own, where the kernel lets us have one."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no mount namespaces here")
    command = [*unshare, sys.executable, "-c", REFUSING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "all held\n", done.stderr


LIMITED = """
import pathlib, resource, sys
from edge_runtime.requests.store import RETRY_S, Kept, Spool
def item(n): return Kept(n.to_bytes(8, "big"), 1.8e9, 1.8e9, bytes(20_000), b"{}")
store = Spool(pathlib.Path(sys.argv[1]), 64 << 20, 1e6, now=0.0, wall=1.8e9)
for n in range(5): store.keep(item(n), 0.0)
assert len(store.commit(0.0)) == 5
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, most))  # a write beyond is an I/O error to SQLite
for n in range(5, 20): store.keep(item(n), 1.0)
assert store.commit(1.0) == () and not store.is_on_disk and "I/O" in store.fault, store.fault
assert len(store) == 20 and store.done(item(3).request_id, 1.0) and store.done(item(7).request_id, 1.0)
assert store.tried(item(2).request_id) == 1
assert store.commit(1.0 + RETRY_S) == () and len(store) == 18
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert len(store.commit(1.0 + 2 * RETRY_S)) == 14 and store.is_on_disk, store.fault
assert [int.from_bytes(one, "big") for one in store.ids()] == [n for n in range(20) if n not in (3, 7)]
assert store.load(item(2).request_id).tries == 1 and store.age_s(item(0).request_id, 50.0) == 50.0
assert (store.found, store.gaps, store.take_dropped()) == (0, 0, [])
print("all held")
"""


def test_a_disk_that_fails_to_write_is_opened_anew_with_the_rows_it_had(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "o.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "all held\n", done.stderr


# Everything at once, against a dict


class SpoolAgainstDict(RuleBasedStateMachine):
    """Keeps, ends, commits, clean and unclean restarts, in any order."""

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.run, self.now, self.number = 0, 0.0, 0
        self.rows: dict[bytes, Kept] = {}
        self.born: dict[bytes, float] = {}
        self.safe: dict[bytes, Kept] = {}  # what a power cut leaves
        self.start()

    def start(self) -> None:
        self.path = self.folder / str(self.run) / "o.db"
        self.store = spool(self.path, max_bytes=65536, max_age_s=1000.0, now=self.now, wall=WALL + self.now)
        assert self.store.is_on_disk
        assert self.store.found == len(self.rows)
        self.born = {one: max(self.born[one], self.now - 500.0) for one in self.rows}

    def dropped(self, reason: str) -> None:
        for dropped in self.store.take_dropped():
            assert dropped.reason == reason
            oldest = next(iter(self.rows))
            assert dropped.item == self.rows.pop(oldest)

    @rule(size=st.integers(0, 9000), burst=st.integers(1, 25))
    def keep(self, size: int, burst: int) -> None:
        for _ in range(burst):
            self.number += 1
            one = item(self.number, size, WALL + self.now)
            assert self.store.keep(one, self.now)
            self.rows[one.request_id], self.born[one.request_id] = one, self.now
        self.dropped("outbox full")

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.rows:
            request_id = data.draw(st.sampled_from(list(self.rows)))
            assert self.store.done(request_id, self.now)
            del self.rows[request_id]
        assert not self.store.done(bytes(8), self.now)

    @rule(data=st.data())
    def try_in_vain(self, data: st.DataObject) -> None:
        if self.rows:
            one = self.rows[data.draw(st.sampled_from(list(self.rows)))]
            tries = self.store.tried(one.request_id)
            assert tries == one.tries + 1
            self.rows[one.request_id] = Kept(one.request_id, one.captured, one.kept, one.payload, one.seen, tries)

    @rule()
    def commit(self) -> None:
        self.store.commit(self.now)
        self.dropped("outbox full")
        self.safe = dict(self.rows)

    @rule(seconds=st.floats(0, 600))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire(self.now)
        self.dropped("too old")
        # A second's room: the wall clock's floats are not the other clock's.
        assert all(self.now - self.born[one] < 1001.0 for one in self.rows)

    @rule()
    def restart(self) -> None:
        self.store.close(self.now)
        self.dropped("outbox full")
        self.safe = dict(self.rows)
        self.start()

    @rule()
    def lose_power(self) -> None:
        here, self.run = self.path.parent, self.run + 1
        shutil.copytree(here, self.folder / str(self.run))
        self.store.close(self.now)
        self.rows = dict(self.safe)
        self.start()

    @invariant()
    def holds_the_same_rows(self) -> None:
        assert content(self.store) == list(self.rows.values())
        assert self.store.bytes == sum(one.size for one in self.rows.values()) <= 65536
        assert self.store.gaps == 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close(self.now)
            shutil.rmtree(self.folder)


TestSpoolAgainstDict = SpoolAgainstDict.TestCase
TestSpoolAgainstDict.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
