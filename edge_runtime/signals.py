"""SIGTERM and SIGINT as an event, and an end that comes in any case."""

import faulthandler
import signal
import threading

SLACK_S = 10.0  # beyond the time that an orderly end may take


def stop_on_signals(orderly_s: float) -> threading.Event:
    """An event that SIGTERM and SIGINT set; for a process's main thread.

    A process that is still there SLACK_S after the `orderly_s` that it may take has hung, say in a driver: it writes on
    its standard error where each of its threads is, and ends with exit code 1. Whoever stopped it need not kill it, and
    whoever looks for the cause finds it in the log.
    """
    stop = threading.Event()

    def ask_to_stop(*_: object) -> None:
        stop.set()
        faulthandler.dump_traceback_later(orderly_s + SLACK_S, exit=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    return stop
