"""Who is told what: messages change the site, and each browser gets what has changed since its last update.

A browser has no queue of updates, but a set of rows that have changed. If it reads slowly, it gets fewer updates, each
with the newest values. So memory is bounded by the number of rows, and nothing waits for a browser.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import json, structs

from edge_runtime.errors import AiflowError
from edge_runtime.mqtt import Message, MqttConfig, State, connection_text
from firmware_tools.ui.history import History
from firmware_tools.ui.meaning import Meaning
from firmware_tools.ui.rows import Link, Update, shown
from firmware_tools.ui.site import MAX_BOARDS, MAX_SERVERS, Site

MAX_BROWSERS = 16  # at the same time; each has a thread
MAX_ROWS = 100  # of one update
# That wait for a browser. Boards that come and go can exceed it: then it has to connect again, and gets everything.
MAX_CHANGES = 2 * (MAX_BOARDS + MAX_SERVERS)
PACE_S = 0.5  # between two updates of a browser
IDLE_S = 10.0  # an update is sent at least so often, which shows a browser that it is still connected


class FullError(AiflowError):
    """Too many browsers."""


class Live:
    """Any thread."""

    def __init__(self, site: Site, history: History, meaning: Meaning, broker: MqttConfig) -> None:
        self._site, self._history, self._meaning, self._broker = site, history, meaning, broker
        self._link = Link(site.name)
        self._changed = threading.Condition()  # and the lock over all here
        self._browsers: list[dict[tuple[str, str], None]] = []
        self._is_closed = False

    def message_arrived(self, message: Message) -> None:
        """On the MQTT client's thread."""
        with self._changed:
            change = self._site.take(message.topic, message.payload, message.retained, time.time())
            self._mark(change.keys)
        if change.answer:
            self._history.put(change.answer)

    def connection_changed(self, state: State, reason: str) -> None:
        """On the MQTT client's thread."""
        with self._changed:
            self._link.broker = shown(connection_text(self._broker, state, reason))
            self._link.is_online = state is State.ONLINE
            self._mark((("link", ""),))

    def picture(self, board: str, camera: str) -> bytes | None:
        with self._changed:
            return self._site.pictures.get((board, camera))

    def close(self) -> None:
        """Ends all `updates`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @contextmanager
    def updates(self) -> Iterator[Callable[[], bytes | None]]:
        """For one browser: a function that waits for the next update and returns it as JSON; None: there is none more.

        Raises FullError.
        """
        with self._changed:
            if len(self._browsers) >= MAX_BROWSERS:
                raise FullError(f"{MAX_BROWSERS} browsers are connected, which is the limit: close one of them")
            keys = [("board", name) for name in sorted(self._site.boards)]
            changed = dict.fromkeys([*keys, *(("server", name) for name in sorted(self._site.servers))])
            self._browsers.append(changed)
        is_first = True

        def next_update() -> bytes | None:
            nonlocal is_first
            with self._changed:
                if not is_first:
                    self._changed.wait_for(lambda: self._is_closed, PACE_S)
                    self._changed.wait_for(lambda: changed or self._is_closed, IDLE_S)
                if self._is_closed or not any(each is changed for each in self._browsers):
                    return None
                keys = list(changed)[:MAX_ROWS]
                for key in keys:
                    del changed[key]
                update = self._update(keys, is_first)
            is_first = False
            return update

        try:
            yield next_update
        finally:
            with self._changed:
                self._browsers[:] = [each for each in self._browsers if each is not changed]

    def _mark(self, keys: tuple[tuple[str, str], ...]) -> None:
        for browser in self._browsers:
            browser.update(dict.fromkeys(keys))
        self._browsers[:] = [each for each in self._browsers if len(each) <= MAX_CHANGES]
        self._changed.notify_all()

    def _update(self, keys: list[tuple[str, str]], is_first: bool) -> bytes:
        boards, servers = self._site.boards, self._site.servers
        named, asked = ([name for kind, name in keys if kind == wanted] for wanted in ("board", "server"))
        problems = {"history": self._history.problem, "meaning": self._meaning.problem}
        link = structs.replace(self._link, **problems, **self._site.counts)
        update = Update(
            time.time(),
            link,
            is_first,
            [boards[name] for name in named if name in boards],
            [servers[name] for name in asked if name in servers],
            [name for name in named if name not in boards],
            [name for name in asked if name not in servers],
        )
        return json.encode(update)
