"""The rows of the fault matrix, in the order in which they run."""

from dataclasses import replace
from functools import partial
from signal import SIGKILL, SIGTERM, SIGUSR1, SIGUSR2

from benchmarks.faults import board_faults as board
from benchmarks.faults import broker_faults as broker
from benchmarks.faults.board_faults import camera_fails, clock_jumps, outbox_damaged
from benchmarks.faults.broker_faults import process_ends
from benchmarks.faults.load import fifty_boards, soak
from benchmarks.faults.scenario import Fault
from benchmarks.faults.site import BROKER, SERVER

_HARMLESS = (  # to brokers and servers
    Fault("link-cut", "link cut", broker.link_cut, 8.0),
    Fault("disk-full", "disk full", board.disk_fills),
    Fault("disk-read-only", "outbox read-only", board.disk_read_only),
    Fault("clock-year", "clock jumps a year ahead", partial(clock_jumps, SIGUSR1), fault_inside="clock"),
    Fault("clock-1970", "clock jumps to 1970", partial(clock_jumps, SIGUSR2), fault_inside="clock"),
    Fault("camera-gone", "camera gone", partial(camera_fails, "lost")),
    Fault("camera-stalled", "camera stalls", partial(camera_fails, "stalled")),
    Fault("camera-frozen", "camera frozen", partial(camera_fails, "frozen"), 5.0),
    Fault("duplicate-id", "two clients with one id", broker.duplicate_id, 10.0),
    Fault("callbacks-raise", "every callback raises", broker.callbacks_raise, fault_inside="callbacks"),
    Fault("loop-thread", "exception in the network thread", broker.loop_thread_dies, fault_inside="thread"),
    Fault("board-sigkill", "board SIGKILL, every request on disk", board.board_dies),
    Fault(
        "board-sigkill-live", "board SIGKILL amid answers, every request on disk", board.board_dies_amid_answers, 3.0
    ),
)
ROWS = (
    Fault("broker-sigterm", "broker SIGTERM", partial(process_ends, BROKER, SIGTERM)),
    Fault("broker-sigkill", "broker SIGKILL", partial(process_ends, BROKER, SIGKILL)),
    Fault(
        "broker-sigkill-no-outbox", "broker SIGKILL, no outbox", partial(process_ends, BROKER, SIGKILL), outbox=False
    ),
    Fault("broker-sigstop", "broker SIGSTOP", broker.broker_freezes, 12.0),
    Fault("broker-empty", "broker restarts with empty state", broker.broker_forgets),
    Fault("server-sigkill", "server SIGKILL", partial(process_ends, SERVER, SIGKILL)),
    Fault("server-hang", "server hangs (SIGSTOP)", broker.server_hangs, outbox=False),
    Fault("share-member", "share member killed in flight", broker.share_member_dies, outbox=False),
    Fault("offline-boot", "offline boot, outbox full", board.offline_boot, 12.0),
    Fault("names-fail", "boot without name resolution", board.names_fail, fault_inside="names"),
    Fault("outbox-header", "corrupt outbox: header zeroed", partial(outbox_damaged, "header")),
    Fault("outbox-page", "corrupt outbox: garbage in a page", partial(outbox_damaged, "page")),
    Fault("outbox-truncated", "corrupt outbox: truncated", partial(outbox_damaged, "truncated")),
    Fault("outbox-wal", "corrupt outbox: garbage in the write-ahead log", partial(outbox_damaged, "wal")),
    Fault("fifty-boards", "50 boards, broker restarts", fifty_boards, 3.0, outbox=False),
    Fault("oversized", "publish oversized", broker.publish_oversized, 3.0, outbox=False),
    Fault("refused", "publish refused", broker.publish_refused, 3.0, outbox=False),
    *(replace(fault, shares_site=True) for fault in _HARMLESS),
    Fault("soak", "soak at three times the load", soak, 600.0, outbox=False, by_default=False),
)
