"""How a process ends: in order when it is told to, and in any case when a part of it is broken.

A service manager (systemd) can start a process again. It cannot see that one of its threads is dead or hangs.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BOARD_STOP_S = 10.0  # that a board's orderly end may take: its clients send what is left, the outbox writes
SLACK_S = 10.0  # beyond the time that an orderly end may take
# A closing terminal and timeout(1) send one wish as two signals. Within this time they count as one.
REPEAT_S = 1.0


class Stop(threading.Event):
    """Set when the process is to end."""

    is_broken = False  # one of its threads died of an error: a bug, and its work is not done any more
    is_reload = False  # it is to start again

    @property
    def exit_code(self) -> int:
        """Of sysexits.h. EX_SOFTWARE for a broken process and EX_TEMPFAIL for a reload: systemd's Restart=on-failure
        starts both again.
        """
        if self.is_broken:
            return os.EX_SOFTWARE
        return os.EX_TEMPFAIL if self.is_reload else os.EX_OK


def stop_when_told(orderly_s: float, reloads: bool = False) -> Stop:
    """An event that SIGTERM, SIGINT and SIGHUP set, and any thread that dies of an error. Call it on the main thread.

    reloads: a service manager started this, and will do so again: SIGHUP ends the process with EX_TEMPFAIL, unless
    another signal follows. Otherwise a SIGHUP comes from a closing terminal, and one that was ignored stays so (nohup).
    A second of the other signals ends the process at once, as if it had no handler.
    If the process is still there SLACK_S after the `orderly_s` that it may take, it hangs, for example in a driver: it
    writes to its standard error where each of its threads is, and ends with exit code 1.
    """
    stop = Stop()
    told_at: float | None = None

    def end() -> None:
        faulthandler.dump_traceback_later(orderly_s + SLACK_S, exit=True)
        stop.set()

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal told_at
        now = time.monotonic()
        # Set before `end` is called: a signal that interrupts it must not wait for the lock that it holds.
        ends = told_at is None and not stop.is_reload
        if reloads and number == signal.SIGHUP:
            stop.is_reload = told_at is None
        elif told_at is None:
            told_at, stop.is_reload = now, False
        elif now - told_at >= REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if ends:
            end()

    def on_dead_thread(error: threading.ExceptHookArgs) -> None:
        if error.exc_type is SystemExit:  # ended on purpose
            return
        name = error.thread.name if error.thread else "unknown"
        logger.critical("thread died name=%s", name, exc_info=error.exc_value)
        stop.is_broken = True
        end()

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    threading.excepthook = on_dead_thread
    return stop


class DriverThread(threading.Thread):
    """A thread that runs a camera driver or a codec, written in C++, which may block for long: a daemon thread.

    The interpreter must not end while it runs: when the C++ code returns to Python, Python ends the thread by unwinding
    its stack, and the process aborts with exit code 134. See `leave`.
    """

    def __init__(self, target: Callable[..., object], args: Iterable[Any] = (), name: str | None = None) -> None:
        super().__init__(target=target, args=args, name=name, daemon=True)


def threads_in_driver() -> list[DriverThread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, DriverThread)]


def leave(main: Callable[[], int]) -> int:
    """Calls main, which closes everything, and returns its exit code for `sys.exit`.

    If a driver thread is still running after main, the process ends here with that code (1 after an exception),
    without the interpreter's own ending.
    """
    try:
        code = main()
    except Exception:
        if not threads_in_driver():
            raise
        traceback.print_exc()
        code = 1
    if hanging := threads_in_driver():
        logger.warning("threads left in a driver names=%s", ",".join(thread.name for thread in hanging))
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code
