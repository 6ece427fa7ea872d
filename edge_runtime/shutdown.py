"""How a process ends: in order when it is told to, and in any case when something in it is broken.

What starts processes (systemd) can start one again; it cannot see that one of its threads is dead or hangs.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

logger = logging.getLogger(__name__)

SLACK_S = 10.0  # beyond the time that an orderly end may take


class Stop(threading.Event):
    """Set when the process is to end."""

    is_broken = False  # since one of its threads died of an error: a bug, and nobody is left to do its work

    @property
    def exit_code(self) -> int:
        """EX_SOFTWARE of sysexits.h for a process that is broken, on which systemd's Restart=on-failure restarts it."""
        return os.EX_SOFTWARE if self.is_broken else os.EX_OK


def stop_when_told(orderly_s: float) -> Stop:
    """An event that SIGTERM and SIGINT set, and any thread that dies of an error; for a process's main thread.

    A process that is still there SLACK_S after the `orderly_s` that it may take has hung, say in a driver: it writes on
    its standard error where each of its threads is, and ends with exit code 1. Whoever stopped it need not kill it, and
    whoever looks for the cause finds it in the log.
    """
    stop = Stop()

    def end() -> None:
        # The watchdog first: a second signal amid `set` would wait for the lock that this one holds.
        faulthandler.dump_traceback_later(orderly_s + SLACK_S, exit=True)
        stop.set()

    def died(error: threading.ExceptHookArgs) -> None:
        if error.exc_type is SystemExit:  # an end on purpose
            return
        name = error.thread.name if error.thread else "unknown"
        logger.critical("thread died name=%s", name, exc_info=error.exc_value)
        stop.is_broken = True
        end()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end())
    threading.excepthook = died
    return stop


class DriverThread(threading.Thread):
    """A thread that runs a camera driver or a codec, written in C++, which may block for long: a daemon thread.

    The interpreter must not end while it runs: when the C++ code returns to Python, Python ends the thread by unwinding
    its stack, and the process aborts with exit code 134. See `leave`.
    """

    def __init__(self, target: Callable[..., object], args: Iterable[Any] = (), name: str | None = None) -> None:
        super().__init__(target=target, args=args, name=name, daemon=True)


def threads_in_driver() -> list[DriverThread]:
    """The driver threads that have not ended."""
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
