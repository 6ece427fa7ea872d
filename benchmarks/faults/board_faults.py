"""Faults of the board itself: its start, disk, outbox, clock, cameras and process."""

import os
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path

from benchmarks.faults.camera import MjpegServer
from benchmarks.faults.scenario import NotRunError, Scenario
from benchmarks.faults.site import SERVER

HEADER_BYTES = 100  # of an SQLite database: sqlite.org/fileformat.html, 1.3
WAL_HEADER_BYTES, WAL_FRAME_BYTES = 32, 24  # the same page, 4.1


def boot_alone(scenario: Scenario) -> None:
    """The fault is there when the board starts; the board answers alone while it lasts."""
    scenario.fault_started()
    scenario.start_board()
    scenario.send_frames()
    scenario.expect(scenario.wait(30.0, lambda: scenario.counts.accepted > 0), "first answers without a broker")
    scenario.hold()


def offline_boot(scenario: Scenario) -> None:
    """There is no broker when the board starts, and more requests come than its outbox holds."""
    scenario.tables["outbox"] |= {"max_bytes": 65536}
    scenario.tables["board"] |= {"deadline_ms": 500}
    scenario.start_servers(SERVER)
    scenario.site.broker.signal(signal.SIGTERM)
    scenario.interval_s = 0.05
    boot_alone(scenario)
    scenario.expect(scenario.counts.lost > 0, "the oldest dropped, and reported")
    scenario.interval_s = 0.25
    scenario.fault_ended()
    scenario.site.broker.start()


def names_fail(scenario: Scenario) -> None:
    """The name server does not answer yet when the board starts, as after a power cut of the whole house."""
    scenario.tables["mqtt"] |= {"host": "localhost"}
    scenario.start_servers(SERVER)
    boot_alone(scenario)
    scenario.expect("name resolution" in scenario.board_log(), "its report")
    scenario.fault_ended()
    scenario.signal_board(signal.SIGUSR1)
    scenario.note("the board's getaddrinfo() fails for names")


def small_disk(scenario: Scenario) -> Path:
    """Mounts a small file system at the outbox's directory. Raises NotRunError if that is not possible."""
    if os.geteuid() or not shutil.which("mount"):
        raise NotRunError("mounting a small disk needs root")
    folder = scenario.outbox.parent
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        raise NotRunError(f"mount: {mounted.stderr.decode(errors='replace').strip()}")
    scenario.closing.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
    return folder


def disk_fills(scenario: Scenario) -> None:
    """The link is down too, so that there is something to keep. The space returns before the link."""
    folder = small_disk(scenario)
    with scenario.outage():
        scenario.fault_started()
        scenario.expect(scenario.wait(30.0, lambda: scenario.counts.kept > 0), "requests kept before the disk filled")
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                scenario.note("tmpfs of 4 MiB filled to the last page")
        before = scenario.counts.kept
        scenario.hold()
        scenario.expect(scenario.counts.kept > before, "requests kept while the disk was full")
        filler.unlink()
        scenario.fault_ended()


def disk_read_only(scenario: Scenario) -> None:
    """Read-only from before the board's start, as after an unclean shutdown."""
    folder = small_disk(scenario)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with scenario.outage():
        scenario.fault_started()
        scenario.hold(max(scenario.seconds, 4.0))
        scenario.expect(scenario.counts.kept > 0, "requests kept in memory")
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        scenario.fault_ended()


def outbox_damaged(kind: str, scenario: Scenario) -> None:
    """The board keeps requests, is killed, and finds its outbox damaged at the next start."""
    scenario.begin()
    scenario.site.broker.signal(signal.SIGKILL)
    scenario.fault_started()
    scenario.interval_s = 0.1
    scenario.expect(scenario.wait(30.0, lambda: scenario.counts.kept >= 20), "20 requests kept")
    scenario.send_frames(False)
    scenario.wait(10.0, lambda: scenario.counts.kept == scenario.counts.unsettled)
    scenario.wait(0.5)  # until the last group is committed
    scenario.note(f"{scenario.counts.kept} in the outbox")
    scenario.signal_board(signal.SIGKILL)
    damage(kind, scenario.outbox)
    scenario.start_board()
    scenario.interval_s = 0.25
    scenario.send_frames()
    scenario.expect(scenario.wait(30.0, lambda: scenario.records.first_events(scenario.started_at) > 0), "a start")
    scenario.fault_ended()
    scenario.site.broker.start()


def damage(kind: str, file: Path) -> None:
    """Damages a database that no process has open. Raises NotRunError if there is none."""
    wal = file.with_name(file.name + "-wal")
    if not file.is_file():
        raise NotRunError("there is no outbox yet")
    if kind == "wal":
        if not wal.is_file() or wal.stat().st_size < 2 * WAL_FRAME_BYTES:
            raise NotRunError("SQLite left no write-ahead log")
        data = bytearray(wal.read_bytes())
        middle = WAL_HEADER_BYTES + (len(data) - WAL_HEADER_BYTES) // 2
        data[middle : middle + 64] = os.urandom(64)
        wal.write_bytes(data)
        return
    with sqlite3.connect(file) as database:  # moves everything into the file that is damaged
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    data = bytearray(file.read_bytes())
    if kind == "header":
        data[:HEADER_BYTES] = bytes(HEADER_BYTES)
    elif kind == "page":
        middle = len(data) // 2
        data[middle : middle + 512] = os.urandom(512)
    else:
        del data[len(data) // 2 :]
    file.write_bytes(data)


def clock_jumps(number: int, scenario: Scenario) -> None:
    """The clock jumps while requests are kept, so that a mass expiry would show."""
    with scenario.outage():
        scenario.wait(30.0, lambda: scenario.counts.kept >= 4)
        scenario.signal_board(number)
        scenario.hold_fault()
        scenario.expect(scenario.counts.lost == 0, "no mass expiry")
    scenario.note("time.time() of the board; clocks read in C were not changed")


def camera_fails(fault: str, scenario: Scenario) -> None:
    """A camera is gone, sends nothing ("stalled"), or sends one picture again and again ("frozen")."""
    with MjpegServer(scenario.site.photos) as camera:
        times = {"interval_s": scenario.interval_s, "stall_s": 2.0, "frozen_s": 2.0}
        scenario.tables["cameras"] = [{"name": "cam", "source": camera.url, **times}]
        scenario.start_servers(SERVER)
        scenario.start_board()
        scenario.wait_for_answers()
        opened = camera.opened
        camera.fail(fault)
        scenario.hold_fault()
        log = scenario.board_log()
        scenario.expect(f"camera {fault}" in log or (fault == "lost" and "camera stalled" in log), "its report")
        if fault == "frozen":
            scenario.expect(camera.opened - opened <= 1, "no restart loop")
        camera.heal()
        # A camera cannot be told to stop, so its server must not end before the board has recovered.
        scenario.wait(60.0, lambda: scenario.records.answers(scenario.ended_at) >= 4)


def board_dies(scenario: Scenario) -> None:
    """Every request is on disk before it is sent. The board is killed while some are open."""
    scenario.tables["outbox"] |= {"every_request": True}
    with scenario.outage():  # so that some are certainly open
        scenario.fault_started()
        scenario.wait(30.0, lambda: scenario.counts.unsettled >= 4)
        scenario.note(f"{scenario.counts.unsettled} open when it was killed")
        scenario.signal_board(signal.SIGKILL)
    scenario.fault_ended()
    scenario.start_board()


def board_dies_amid_answers(scenario: Scenario) -> None:
    """Killed at the worst moment: some requests are in flight, and the ends of others are not on disk yet."""
    scenario.tables["outbox"] |= {"every_request": True}
    scenario.begin()
    scenario.interval_s = 0.1
    scenario.hold()
    scenario.signal_board(signal.SIGKILL)
    scenario.note(f"{scenario.counts.unsettled} open when it was killed")
    scenario.hold_fault(0.0)
    scenario.start_board()
