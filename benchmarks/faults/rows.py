"""The rows of the fault matrix, in the order in which they run."""

import signal
from functools import partial

from benchmarks.faults import board_faults as board
from benchmarks.faults import broker_faults as broker
from benchmarks.faults import load
from benchmarks.faults.scenario import Fault

ROWS = (
    Fault("broker-sigterm", "broker SIGTERM", partial(broker.broker_ends, signal.SIGTERM)),
    Fault("broker-sigkill", "broker SIGKILL", partial(broker.broker_ends, signal.SIGKILL)),
    Fault(
        "broker-sigkill-no-outbox",
        "broker SIGKILL, no outbox",
        partial(broker.broker_ends, signal.SIGKILL),
        outbox=False,
    ),
    Fault("broker-sigstop", "broker SIGSTOP", broker.broker_freezes, 12.0),
    Fault("broker-empty", "broker restarts with empty state", broker.broker_forgets),
    Fault("server-sigkill", "server SIGKILL", broker.server_dies),
    Fault("server-hang", "server hangs (SIGSTOP)", broker.server_hangs, outbox=False),
    Fault("share-member", "share member killed in flight", broker.share_member_dies, outbox=False),
    Fault("offline-boot", "offline boot, outbox full", board.offline_boot, 12.0),
    Fault("names-fail", "boot without name resolution", board.names_fail, fault_inside="names"),
    *(
        Fault(f"spool-{kind}", f"corrupt spool: {what}", partial(board.outbox_damaged, kind))
        for kind, what in (
            ("header", "header zeroed"),
            ("page", "garbage in a page"),
            ("truncated", "truncated"),
            ("wal", "garbage in the write-ahead log"),
        )
    ),
    Fault("fifty-boards", "50 boards, broker restarts", load.fifty_boards, 3.0, outbox=False),
    Fault("oversized", "publish oversized", broker.publish_oversized, 3.0, outbox=False),
    Fault("refused", "publish refused", broker.publish_refused, 3.0, outbox=False),
    Fault("link-cut", "link cut", broker.link_cut, 8.0, shares_site=True),
    Fault("disk-full", "disk full", board.disk_fills, shares_site=True),
    Fault("disk-read-only", "spool read-only", board.disk_read_only, shares_site=True),
    Fault(
        "clock-year",
        "clock jumps a year ahead",
        partial(board.clock_jumps, signal.SIGUSR1),
        fault_inside="clock",
        shares_site=True,
    ),
    Fault(
        "clock-1970",
        "clock jumps to 1970",
        partial(board.clock_jumps, signal.SIGUSR2),
        fault_inside="clock",
        shares_site=True,
    ),
    Fault("camera-gone", "camera gone", board.camera_gone, shares_site=True),
    Fault("camera-stalled", "camera stalls", board.camera_stalls, shares_site=True),
    Fault("camera-frozen", "camera frozen", board.camera_freezes, 5.0, shares_site=True),
    Fault("duplicate-id", "two clients with one id", broker.duplicate_id, 10.0, shares_site=True),
    Fault(
        "callbacks-raise", "every callback raises", broker.callbacks_raise, fault_inside="callbacks", shares_site=True
    ),
    Fault(
        "loop-thread",
        "exception in the network thread",
        broker.loop_thread_dies,
        fault_inside="thread",
        shares_site=True,
    ),
    Fault("board-sigkill", "board SIGKILL, every request on disk", board.board_dies, shares_site=True),
    Fault(
        "board-sigkill-live",
        "board SIGKILL amid answers, every request on disk",
        board.board_dies_amid_answers,
        3.0,
        shares_site=True,
    ),
    Fault("soak", "soak at three times the load", load.soak, 600.0, outbox=False, by_default=False),
)
