"""The faults, each as the few lines that bring it about and end it, in the order in which they are played."""

import os
import shutil
import signal
import sqlite3
import subprocess
from functools import partial
from pathlib import Path

from benchmarks.faults.camera import MjpegServer
from benchmarks.faults.load import fifty_boards, soak
from benchmarks.faults.processes import PLAIN
from benchmarks.faults.stage import KEEPALIVE_S, SERVER, SITE, SPARE, NotRunError, Row, Trial
from edge_runtime.config import MqttConfig
from edge_runtime.mqtt.client import MqttClient
from edge_runtime.wire import topics
from testbed.shaping import PROFILES

EXPELLED_S = 1.5 * KEEPALIVE_S + 2  # a broker drops a silent client after one and a half keepalives (MQTT 5, 3.1.2.10)
HEADER_BYTES = 100  # of an SQLite database: sqlite.org/fileformat.html, 1.3
WAL_HEADER_BYTES, WAL_FRAME_BYTES = 32, 24  # the same, 4.1


def broker_ends(number: int, trial: Trial) -> None:
    trial.begin()
    trial.stage.broker.signal(number)
    trial.inject()
    trial.last()
    trial.heal()
    trial.stage.broker.start()


def broker_freezes(trial: Trial) -> None:
    trial.begin()
    trial.stage.broker.signal(signal.SIGSTOP)
    trial.inject()
    trial.last()
    trial.heal()
    trial.stage.broker.signal(signal.SIGCONT)


def broker_forgets(trial: Trial) -> None:
    """Gone for no longer than it takes to start: nobody has stopped sending when everything is forgotten."""
    trial.begin()
    trial.stage.broker.signal(signal.SIGKILL)
    trial.inject()
    trial.heal()
    trial.stage.broker.start()


def server_dies(trial: Trial) -> None:
    trial.begin()
    trial.stage.servers[SERVER].signal(signal.SIGKILL)
    trial.inject()
    trial.last()
    trial.heal()
    trial.stage.servers[SERVER].start()


def server_hangs(trial: Trial) -> None:
    """One of two; the broker goes on to hand it requests until it expels it."""
    trial.tables["board"] |= {"deadline_ms": 20_000}
    trial.begin(SERVER, SPARE)
    trial.stage.servers[SERVER].signal(signal.SIGSTOP)
    trial.inject()
    trial.last(max(trial.seconds, EXPELLED_S))
    trial.heal()
    trial.stage.servers[SERVER].signal(signal.SIGCONT)


def share_member_dies(trial: Trial) -> None:
    """It is frozen until it holds requests of its share, then killed: they die with it."""
    trial.tables["board"] |= {"deadline_ms": 20_000, "resend_ms": 5000}
    trial.begin(SERVER, SPARE)
    trial.stage.servers[SERVER].signal(signal.SIGSTOP)
    trial.interval_s = 0.1
    trial.inject()
    trial.watch(20.0, lambda: trial.ledger.tally().unsettled >= 6)
    held = trial.ledger.tally().unsettled
    trial.expect(held >= 6, "requests in flight at the member that dies")
    trial.note(f"{held} in flight when it died")
    trial.stage.servers[SERVER].signal(signal.SIGKILL)
    trial.heal()  # the other one is there all the time
    trial.last()


def link_cut(trial: Trial) -> None:
    link = trial.through_link()
    trial.begin()
    link.set(PROFILES["outage"])
    trial.inject()
    trial.last()
    trial.heal()
    link.set(PROFILES["wifi"])


def boot_alone(trial: Trial) -> None:
    """The fault is there before the board, which answers by itself while it lasts."""
    trial.inject()
    trial.start_board()
    trial.show_frames()
    trial.expect(trial.watch(30.0, lambda: trial.ledger.tally().accepted > 0), "first answers without a broker")
    trial.last()


def offline_boot(trial: Trial) -> None:
    """No broker when the board starts, and more requests than its outbox holds."""
    trial.tables["outbox"] |= {"max_bytes": 65536}
    trial.tables["board"] |= {"deadline_ms": 500}
    trial.serve(SERVER)
    trial.stage.broker.signal(signal.SIGTERM)
    trial.interval_s = 0.05
    boot_alone(trial)
    trial.expect(trial.ledger.tally().lost > 0, "the oldest dropped, and reported")
    trial.interval_s = 0.25
    trial.heal()
    trial.stage.broker.start()


def names_fail(trial: Trial) -> None:
    """A board whose name server is not there yet when it starts, as after a power cut of the whole house."""
    trial.tables["mqtt"] |= {"host": "localhost"}
    trial.serve(SERVER)
    boot_alone(trial)
    trial.expect("name resolution" in trial.board.said(), "its report")
    trial.heal()
    trial.board.signal(signal.SIGUSR1)
    trial.note("the board's getaddrinfo() fails for names")


def small_disk(trial: Trial) -> Path:
    """The outbox's directory becomes a file system of its own."""
    if os.geteuid() or not shutil.which("mount"):
        raise NotRunError("mounting a small disk wants root")
    folder = trial.spool.parent
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        raise NotRunError(f"mount: {mounted.stderr.decode(errors='replace').strip()}")
    trial.closing.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
    return folder


def disk_fills(trial: Trial) -> None:
    """The link is away as well, so that there is something to keep; the space returns before the link does."""
    folder = small_disk(trial)
    link = trial.through_link()
    trial.begin()
    link.set(PROFILES["outage"])
    trial.inject()
    trial.expect(trial.watch(30.0, lambda: trial.ledger.tally().kept > 0), "requests kept before the disk filled")
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            trial.note("tmpfs of 4 MiB filled to the last page")
    before = trial.ledger.tally().kept
    trial.last()
    trial.expect(trial.ledger.tally().kept > before, "requests kept while the disk was full")
    filler.unlink()
    trial.heal()
    link.set(PROFILES["wifi"])


def disk_read_only(trial: Trial) -> None:
    """From before the board starts, as after an unclean shutdown."""
    folder = small_disk(trial)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    link = trial.through_link()
    trial.begin()
    link.set(PROFILES["outage"])
    trial.inject()
    trial.last(max(trial.seconds, 4.0))
    trial.expect(trial.ledger.tally().kept > 0, "requests kept in memory")
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    trial.heal()
    link.set(PROFILES["wifi"])


def spool_damaged(kind: str, trial: Trial) -> None:
    """The board keeps requests, is killed, and finds them damaged at its next start."""
    trial.begin()
    trial.stage.broker.signal(signal.SIGKILL)
    trial.inject()
    trial.interval_s = 0.1
    trial.expect(trial.watch(30.0, lambda: trial.ledger.tally().kept >= 20), "20 requests kept")
    trial.show_frames(False)
    trial.watch(10.0, lambda: trial.ledger.tally().kept == trial.ledger.tally().unsettled)
    trial.watch(0.5)  # the last group is committed
    trial.note(f"{trial.ledger.tally().kept} in the spool")
    trial.board.signal(signal.SIGKILL)
    damage(kind, trial.spool)
    trial.start_board()
    trial.interval_s = 0.25
    trial.show_frames()
    trial.expect(trial.watch(30.0, lambda: trial.ledger.news(trial.injected) > 0), "a start")
    trial.heal()
    trial.stage.broker.start()


def damage(kind: str, spool: Path) -> None:
    """Bytes of a database that nobody has open. Raises NotRunError where there are none."""
    wal = spool.with_name(spool.name + "-wal")
    if not spool.is_file():
        raise NotRunError("there is no spool yet")
    if kind == "wal":
        if not wal.is_file() or wal.stat().st_size < 2 * WAL_FRAME_BYTES:
            raise NotRunError("SQLite left no write-ahead log")
        data = bytearray(wal.read_bytes())
        middle = WAL_HEADER_BYTES + (len(data) - WAL_HEADER_BYTES) // 2
        data[middle : middle + 64] = os.urandom(64)
        wal.write_bytes(data)
        return
    with sqlite3.connect(spool) as database:  # everything into the one file that is damaged
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    data = bytearray(spool.read_bytes())
    if kind == "header":
        data[:HEADER_BYTES] = bytes(HEADER_BYTES)
    elif kind == "page":
        middle = len(data) // 2
        data[middle : middle + 512] = os.urandom(512)
    else:
        del data[len(data) // 2 :]
    spool.write_bytes(data)


def clock_jumps(number: int, trial: Trial) -> None:
    """While requests are kept, so that mass expiry would be seen."""
    link = trial.through_link()
    trial.begin()
    link.set(PROFILES["outage"])
    trial.watch(30.0, lambda: trial.ledger.tally().kept >= 4)
    trial.board.signal(number)
    trial.inject()
    trial.last()
    trial.expect(trial.ledger.tally().lost == 0, "no mass expiry")
    trial.heal()
    link.set(PROFILES["wifi"])
    trial.note("time.time() of the board; clocks read in C were not changed")


def camera_gone(trial: Trial) -> None:
    with MjpegServer(trial.stage.photos) as camera:
        begin_with_camera(trial, camera)
        camera.close()
        trial.inject()
        trial.last()
        trial.expect("camera lost" in trial.board.said() or "camera stalled" in trial.board.said(), "its report")
        camera.open()
        trial.heal()
        see_again(trial)


def camera_stalls(trial: Trial) -> None:
    with MjpegServer(trial.stage.photos) as camera:
        begin_with_camera(trial, camera)
        camera.stalls.set()
        trial.inject()
        trial.last()
        trial.expect("camera stalled" in trial.board.said(), "its report")
        camera.stalls.clear()
        trial.heal()
        see_again(trial)


def camera_freezes(trial: Trial) -> None:
    with MjpegServer(trial.stage.photos) as camera:
        begin_with_camera(trial, camera)
        opened = camera.opened
        camera.repeats.set()
        trial.inject()
        trial.last()
        trial.expect("camera frozen" in trial.board.said(), "its report")
        trial.expect(camera.opened - opened <= 1, "no restart loop")
        camera.repeats.clear()
        trial.heal()
        see_again(trial)


def begin_with_camera(trial: Trial, camera: MjpegServer) -> None:
    trial.tables["cameras"] = [
        {"name": "cam", "source": camera.url, "interval_s": trial.interval_s, "stall_s": 2.0, "frozen_s": 2.0}
    ]
    trial.serve(SERVER)
    trial.start_board()
    trial.await_answers()


def see_again(trial: Trial) -> None:
    """A camera cannot be asked for no more frames: the server stops before the board is told to."""
    healed = trial.healed
    trial.watch(60.0, lambda: trial.ledger.answers(healed) >= 4)


def duplicate_id(trial: Trial) -> None:
    """Another client with the board's id comes to the servers' broker, and stays."""
    trial.begin()
    intruder = MqttClient(MqttConfig(port=trial.stage.broker.port).settings(trial.name))
    with intruder:
        trial.inject()
        trial.last()
        connects = intruder.stats().connects
        trial.expect(connects > 0, "the other client's connection")
        trial.heal()
    evicted = trial.board.said().count("mqtt offline")
    trial.note(f"the other one connected {connects} times, the board logged {evicted} losses")


def callbacks_raise(trial: Trial) -> None:
    """Each callback once, those of a connection's end and start too: its link is reset."""
    link = trial.through_link(cut_in_outage=True)
    trial.begin()
    trial.board.signal(signal.SIGUSR1)
    trial.inject()
    trial.last(2.0)
    link.set(PROFILES["outage"])
    trial.last(1.0)
    trial.heal()
    link.set(PROFILES["wifi"])
    trial.last(max(trial.seconds, 15.0))
    raised = sorted({line.split()[-1] for line in trial.board.said().splitlines() if "SabotageError: in " in line})
    trial.expect(len(raised) >= 5, "five callbacks that raised")
    trial.note("raised: " + " ".join(raised))


def loop_thread_dies(trial: Trial) -> None:
    trial.begin()
    trial.board.signal(signal.SIGUSR1)
    trial.inject()
    trial.heal()
    trial.last()
    trial.expect("SabotageError" in trial.board.said(), "the exception in the network thread")


def publish_oversized(trial: Trial) -> None:
    """A broker that takes latents, but no pictures, from a board that offloads."""
    restart(trial, PLAIN + "max_packet_size 3000\n")
    trial.tables["board"] |= {"paradigm": "offload"}
    trial.serve(SERVER)
    trial.start_board()
    trial.show_frames()
    trial.inject()
    trial.expect(trial.watch(30.0, lambda: trial.ledger.tally().lost > 0), "refused pictures, reported")
    trial.last()
    restart(trial, PLAIN)
    trial.heal()
    trial.expect(trial.watch(60.0, lambda: trial.ledger.answers(trial.healed) > 0), "answers afterwards")
    note_connects(trial, at_most=3)


def publish_refused(trial: Trial) -> None:
    """An access list that denies the board's requests, corrected later."""
    rules = trial.stage.folder / "refuse.acl"
    everything = f"topic readwrite {topics.ROOT}/#\n"
    rules.write_text(everything + f"topic deny {topics.request(SITE, trial.name)}\n")
    rules.chmod(0o644)
    restart(trial, PLAIN + f"acl_file {rules}\n")
    trial.serve(SERVER)
    trial.start_board()
    trial.show_frames()
    trial.inject()
    trial.expect(trial.watch(30.0, lambda: trial.ledger.tally().lost > 0), "refused requests, reported")
    trial.last()
    rules.write_text(everything)
    trial.heal()
    trial.stage.broker.signal(signal.SIGHUP)  # mosquitto(8): reads its access list again
    trial.expect(trial.watch(60.0, lambda: trial.ledger.answers(trial.healed) > 0), "answers afterwards")
    restart(trial, PLAIN)
    note_connects(trial, at_most=3)


def restart(trial: Trial, config: str) -> None:
    trial.stage.broker.signal(signal.SIGTERM)
    trial.stage.broker.configure(config)
    trial.stage.broker.start()


def note_connects(trial: Trial, at_most: int) -> None:
    connects = trial.board.said().count("mqtt online")  # one to the local broker
    trial.note(f"{connects} connections of the board")
    trial.expect(connects <= at_most + 1, "no reconnect loop")


def board_dies(trial: Trial) -> None:
    """With each request on disk before it is sent; killed with some open."""
    trial.tables["outbox"] |= {"every_request": True}
    link = trial.through_link()
    trial.begin()
    link.set(PROFILES["outage"])  # so that some are open for certain
    trial.inject()
    trial.watch(30.0, lambda: trial.ledger.tally().unsettled >= 4)
    trial.note(f"{trial.ledger.tally().unsettled} open when it died")
    trial.board.signal(signal.SIGKILL)
    link.set(PROFILES["wifi"])
    trial.heal()
    trial.start_board()


def board_dies_amid_answers(trial: Trial) -> None:
    """At the worst moment: some requests are on their way, and the ends of others not on disk yet."""
    trial.tables["outbox"] |= {"every_request": True}
    trial.begin()
    trial.interval_s = 0.1
    trial.last()
    trial.board.signal(signal.SIGKILL)
    trial.inject()
    trial.note(f"{trial.ledger.tally().unsettled} open when it died")
    trial.heal()
    trial.start_board()


ROWS = (
    Row("broker-sigterm", "broker SIGTERM", partial(broker_ends, signal.SIGTERM)),
    Row("broker-sigkill", "broker SIGKILL", partial(broker_ends, signal.SIGKILL)),
    Row("broker-sigkill-no-outbox", "broker SIGKILL, no outbox", partial(broker_ends, signal.SIGKILL), outbox=False),
    Row("broker-sigstop", "broker SIGSTOP", broker_freezes, 12.0),
    Row("broker-empty", "broker restarts with empty state", broker_forgets),
    Row("server-sigkill", "server SIGKILL", server_dies),
    Row("server-hang", "server hangs (SIGSTOP)", server_hangs, outbox=False),
    Row("share-member", "share member killed in flight", share_member_dies, outbox=False),
    Row("offline-boot", "offline boot, outbox full", offline_boot, 12.0),
    Row("names-fail", "boot without name resolution", names_fail, sabotage="names"),
    *(
        Row(f"spool-{kind}", f"corrupt spool: {what}", partial(spool_damaged, kind))
        for kind, what in (
            ("header", "header zeroed"),
            ("page", "garbage in a page"),
            ("truncated", "truncated"),
            ("wal", "garbage in the write-ahead log"),
        )
    ),
    Row("fifty-boards", "50 boards, broker restarts", fifty_boards, 3.0, outbox=False),
    Row("oversized", "publish oversized", publish_oversized, 3.0, outbox=False),
    Row("refused", "publish refused", publish_refused, 3.0, outbox=False),
    Row("link-cut", "link cut", link_cut, 8.0, is_gentle=True),
    Row("disk-full", "disk full", disk_fills, is_gentle=True),
    Row("disk-read-only", "spool read-only", disk_read_only, is_gentle=True),
    Row(
        "clock-year", "clock jumps a year ahead", partial(clock_jumps, signal.SIGUSR1), sabotage="clock", is_gentle=True
    ),
    Row("clock-1970", "clock jumps to 1970", partial(clock_jumps, signal.SIGUSR2), sabotage="clock", is_gentle=True),
    Row("camera-gone", "camera gone", camera_gone, is_gentle=True),
    Row("camera-stalled", "camera stalls", camera_stalls, is_gentle=True),
    Row("camera-frozen", "camera frozen", camera_freezes, 5.0, is_gentle=True),
    Row("duplicate-id", "two clients with one id", duplicate_id, 10.0, is_gentle=True),
    Row("callbacks-raise", "every callback raises", callbacks_raise, sabotage="callbacks", is_gentle=True),
    Row("loop-thread", "exception in the network thread", loop_thread_dies, sabotage="thread", is_gentle=True),
    Row("board-sigkill", "board SIGKILL, every request on disk", board_dies, is_gentle=True),
    Row(
        "board-sigkill-live",
        "board SIGKILL amid answers, every request on disk",
        board_dies_amid_answers,
        3.0,
        is_gentle=True,
    ),
    Row("soak", "soak at three times the load", soak, 600.0, outbox=False, by_default=False),
)
