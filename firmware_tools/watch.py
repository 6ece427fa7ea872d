"""`aiflow watch`: live events of a site, one line each."""

import argparse
import queue

from edge_runtime.logs import printable
from edge_runtime.wire import Event
from testbed.terminal import number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to listen."""
    parser.add_argument("--site", default="home", metavar="ID", help="default: home")
    parser.add_argument("--board", default="+", metavar="ID", help="one board only (default: all)")
    parser.add_argument("--host", default="127.0.0.1", help="of the broker with the events (default: 127.0.0.1)")
    parser.add_argument("--port", type=number, default=1883, help="default: 1883")
    parser.add_argument("--username", metavar="NAME", help="to log in with")
    parser.add_argument("--password-file", metavar="FILE", help="its first line is the password")
    parser.add_argument("--tls", action="store_true", help="trust the system's authorities")
    parser.add_argument("--ca-file", metavar="FILE", help="trust this authority instead; implies TLS")
    parser.add_argument("--cert-file", metavar="FILE", help="a client certificate to log in with; implies TLS")
    parser.add_argument("--key-file", metavar="FILE", help="its key")
    parser.add_argument("--insecure", action="store_true", help="plain text to a broker that is not on this machine")
    parser.add_argument("--count", type=number, metavar="N", help="stop after N events")


def run(args: argparse.Namespace) -> None:
    """Prints events until interrupted."""
    import secrets

    from rich.console import Console

    from edge_runtime.config import MqttConfig
    from edge_runtime.mqtt.client import Message, MqttClient
    from edge_runtime.wire import WireError, decode_event

    console = Console()
    messages: queue.Queue[Message] = queue.Queue(1000)
    config = MqttConfig(
        host=args.host,
        port=args.port,
        username=args.username,
        password_file=args.password_file,
        ca_file=args.ca_file,
        cert_file=args.cert_file,
        key_file=args.key_file,
        tls=args.tls,
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
                refused = printable(f"{message.topic}: {error}")
                console.print(refused, style="red", markup=False, highlight=False, soft_wrap=True)
                continue
            console.print(line(message.topic.split("/")[2], event), markup=False, highlight=False, soft_wrap=True)
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
        event.text or f"({event.why})",
        f"[{state}{by}, {price}, {event.after_ms:.0f} ms]",
    ]
    if event.type == "new" and event.explain:  # the later events of a frame would only repeat it
        parts.append(event.explain.reason)
    return printable("  ".join(parts))
