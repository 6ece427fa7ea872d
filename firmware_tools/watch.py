"""`aiflow watch`: live events of a site, one line each."""

import argparse
import os
import queue
import sys
import threading
from contextlib import suppress
from datetime import datetime

from edge_runtime.logs import printable
from edge_runtime.wire import Event
from firmware_tools.broker_arguments import add_broker_arguments, broker_settings, topic_level
from firmware_tools.event_parts import labels
from testbed.argument_types import number

MAX_WAITING = 1000  # lines that wait for a slow reader; further ones are counted and not shown
CLOSE_S = 2.0  # for the last lines to be printed
QUIET_S = 5.0  # after this time without a connection, and then without an event, a line says what it waits for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_broker_arguments(parser)
    parser.add_argument("--board", type=topic_level, default="+", metavar="ID", help="one board only (default: all)")
    parser.add_argument("--count", type=number, metavar="N", help="stop after N events")


def run(args: argparse.Namespace) -> None:
    """Prints events until interrupted, until N were printed, or until the reader of the output has ended."""
    from edge_runtime.mqtt import Message, MqttClient
    from edge_runtime.wire import WireError, decode_event

    settings = broker_settings(args, "watch")
    shown, heard = 0, threading.Event()

    def arrived(message: Message) -> None:
        nonlocal shown
        heard.set()
        if lines.done.is_set():
            return
        try:
            event = decode_event(message.payload)
        except WireError as error:
            lines.put(f"{message.topic}: {error}")
            return
        retained = "  (retained by the broker, not live)" if message.retained else ""
        lines.put(line(message.topic.split("/")[2], event) + retained)
        shown += 1
        if shown == args.count:
            lines.done.set()

    topic = f"aiflow/{args.site}/{args.board}/up/event"
    with Lines() as lines, MqttClient(settings, subscriptions=[(topic, 1)], on_message=arrived) as client:
        if not client.wait_online(QUIET_S):
            address = f"{settings.host}:{settings.port}"
            print(f"no connection to {address} yet: are --broker and --broker-port those of a broker?", file=sys.stderr)
            client.wait_online()
        if not heard.wait(QUIET_S):
            print(f"nothing has been published on {topic} yet: does a board of that site run?", file=sys.stderr)
        lines.done.wait()


class Lines:
    """Prints lines on a separate thread, so that a slow reader, or one that has ended, delays nothing else."""

    def __init__(self) -> None:
        self.done = threading.Event()  # lines are no longer read; callers may set it for other reasons
        self._waiting: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._missed = 0
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)

    def __enter__(self) -> "Lines":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(queue.Full):  # only if nobody reads: the thread ends with the process
            self._waiting.put_nowait(None)
        self._thread.join(CLOSE_S)

    def put(self, text: str) -> None:
        """Never blocks. Control characters are replaced: the text may come from a stranger."""
        try:
            self._waiting.put_nowait(printable(text))
        except queue.Full:
            self._missed += 1

    def _run(self) -> None:
        told = 0
        try:
            while (text := self._waiting.get()) is not None:
                if self._missed > told:
                    _write(f"({self._missed - told} lines were not shown: they came faster than they were read)")
                    told = self._missed
                _write(text)
        except OSError:  # as of `aiflow watch | head -1`; a full disk is no reason to go on either
            self.done.set()


def _write(text: str) -> None:
    """Writes without Python's buffer: a thread that waits in it would abort the interpreter when that ends."""
    data = f"{text}\n".encode(sys.stdout.encoding, "replace")
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


def line(board: str, event: Event) -> str:
    """An event as a line: time, board and camera, text, label, taught answers, who answered, bytes, time, and why."""
    by = event.answered_by.tier if event.answered_by else "nobody"
    doubt = ", unsure" * event.unsure + ", cut" * event.cut + ", not valid" * (event.valid is False)
    price = f"{event.bytes_up} B" if event.bytes_up else "nothing sent"
    state = "" if event.final or event.type == "new" else "for now, "
    named = {"label": event.scores, **event.answers}
    parts = [
        f"{_local(event.captured):%H:%M:%S}",
        f"{board}/{event.camera}",
        f"{event.type:6}",
        event.trigger or event.text or "(no text)",
        *(f"{name}: {labels(shares, 1)}" for name, shares in named.items() if shares),
        f"[{state}{by}{doubt}, {price}, {event.after_ms:.0f} ms]",
    ]
    planned = event.explain.reason if event.explain else ""  # later events would only repeat it
    if event.type == "new" or event.why not in ("", planned):
        parts.append(event.why or planned)
    if event.proposed:
        parts.append(f"{event.accepted} of {event.proposed} proposed tokens accepted")
    return printable("  ".join(parts))


def _local(captured: datetime) -> datetime:
    """In the time zone of this machine; unchanged for the years 1 and 9999, which some zones cannot show."""
    try:
        return captured.astimezone()
    except (OverflowError, ValueError):
        return captured
