"""How a process ends: in order when it is told to, and in any case when something in it is broken.

What starts processes (systemd) can start one again; it cannot see that one of its threads is dead or hangs.
"""

import faulthandler
import logging
import os
import signal
import threading

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
