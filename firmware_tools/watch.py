"""`aiflow watch`: live events of a site, one line each."""

import argparse
import queue

from edge_runtime.wire import Event
from firmware_tools.terminal import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to listen."""
    parser.add_argument("--site", default="home", help="default: home")
    parser.add_argument("--board", default="+", help="one board only")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--username")
    parser.add_argument("--password-file")
    parser.add_argument("--ca-file")
    parser.add_argument("--insecure", action="store_true", help="plain text to a broker that is not on this machine")
    parser.add_argument("--count", type=int, help="stop after so many events")


def run(args: argparse.Namespace) -> None:
    """Prints events until interrupted."""
    import secrets

    from rich.console import Console

    from edge_runtime.config import MqttConfig
    from edge_runtime.mqtt import Message, MqttClient
    from edge_runtime.wire import WireError, decode_event

    console = Console()
    messages: queue.Queue[Message] = queue.Queue(1000)
    config = MqttConfig(
        host=args.host,
        port=args.port,
        username=args.username,
        password_file=args.password_file,
        ca_file=args.ca_file,
        insecure=args.insecure,
    )
    settings = config.settings(f"watch-{secrets.token_hex(4)}")
    topic = f"aiflow/{args.site}/{args.board}/up/event"
    with MqttClient(settings, subscriptions=[(topic, 1)], on_message=messages.put_nowait) as client:
        if not client.wait_online(5.0):
            console.print(f"no broker at {args.host}:{args.port} yet, still trying", style="yellow")
        shown = 0
        while args.count is None or shown < args.count:
            message = messages.get()
            try:
                event = decode_event(message.payload)
            except WireError as error:
                console.print(f"{message.topic}: {error}", style="red", markup=False)
                continue
            console.print(line(message.topic.split("/")[2], event), markup=False, highlight=False)
            shown += 1


def line(board: str, event: Event) -> str:
    """An event for people: when, who, what, by whom, at which price."""
    by = event.answered_by.tier if event.answered_by else "nobody"
    price = f"{event.bytes_up} B" if event.bytes_up else "nothing sent"
    state = "" if event.final or event.type == "new" else "for now, "
    parts = [
        f"{event.captured:%H:%M:%S}",
        f"{board}/{event.camera}",
        f"{event.type:6}",
        printable(event.text or f"({event.why})"),
        f"[{state}{by}, {price}, {event.after_ms:.0f} ms]",
    ]
    if event.type == "new" and event.explain:  # the later events of a frame would only repeat it
        parts.append(printable(event.explain.reason))
    return "  ".join(parts)
