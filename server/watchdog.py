"""A thread that tells a server's status, watches its engine, reads new questions and gives back freed memory.

It is not the engine's thread, so the status is told while the engine hangs, and says so. A server whose engine hangs
leaves the share, since the broker would go on giving it requests; it comes back when the engine does. So does a server
whose target answers nothing for a while, such as one whose budget of the day is spent.
"""

import logging
import threading
import time

from server.freed_memory import give_back
from server.gateway import Gateway
from server.service import Service

logger = logging.getLogger(__name__)

STATUS_PERIOD_S = 10.0
PROBE_PERIOD_S = 1.0  # until the broker is proven to deliver; also how often the engine is looked at


class Watchdog:
    """Use it with `with`."""

    def __init__(self, service: Service, gateway: Gateway) -> None:
        self._service, self._gateway = service, gateway
        self._hangs = ""  # for how long the engine did when this was noticed; empty: it works
        self._why = ""  # why the server takes no requests; empty: it does
        self._next_beat = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.check(time.monotonic())
            if self._stop.wait(PROBE_PERIOD_S):
                return

    def check(self, now: float) -> None:
        """Does what is due at this time (seconds, time.monotonic())."""
        is_late = self._service.batch_times.is_late(now)
        starts_to_hang = is_late and not self._hangs
        if starts_to_hang:
            self._hangs = f"the engine has been busy with one batch for {self._service.batch_times.busy_s(now):.0f} s"
            logger.error("engine hangs server=%s why=%s", self._service.config.id, self._hangs)
        elif self._hangs and not is_late:
            self._hangs = ""
            logger.warning("engine works again server=%s", self._service.config.id)
        why = self._hangs or self._service.target.why_closed(now)
        if why != self._why:
            self._why, self._next_beat = why, now
            if why:
                self._gateway.suspend(why)
            else:
                self._gateway.resume()
        if self._hangs:  # at each look: a request may have been queued since
            self._service.engine_hangs(is_new=starts_to_hang)
        if self._service.load_questions():
            self._next_beat = now  # the status says at once what became of the message
        if now >= self._next_beat:
            give_back()
            self._next_beat = now + (STATUS_PERIOD_S if self._gateway.heartbeat() else PROBE_PERIOD_S)
