"""`aiflow link`: puts a simulated thin link in front of a broker."""

import argparse
import threading
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGTERM, signal

from testbed.link_simulator import Address, LinkSimulator, read_trace
from testbed.shaping import PROFILES, LinkError, Profile

REPORT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
a broker behind LTE-M:     aiflow link --to 127.0.0.1:1883 --profile lte-m, then let the board connect to port 1884
a trace file, line by line: seconds from the start, a tab, a profile; the last profile stays"""
    parser.add_argument(
        "--listen", type=_address, default=("127.0.0.1", 1884), metavar="HOST:PORT", help="default: 127.0.0.1:1884"
    )
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT", help="usually the broker")
    link = parser.add_mutually_exclusive_group(required=True)
    link.add_argument(
        "--profile", choices=PROFILES, help="the same up and down: " + "; ".join(map(_describe, PROFILES.values()))
    )
    link.add_argument("--trace", type=Path, metavar="FILE", help="switch profiles while connections stay open")
    link.add_argument("--up-kbit", type=float, metavar="N", help="your own link, with --rtt-ms; 0: nothing passes")
    parser.add_argument("--down-kbit", type=float, metavar="N", help="default: the same as --up-kbit")
    parser.add_argument("--rtt-ms", type=float, metavar="N", help="round trip of the idle link")
    parser.add_argument(
        "--jitter-ms", type=float, metavar="N", help="0 to N ms more delay each way, in order; default: 0"
    )
    parser.add_argument("--buffer-kb", type=int, metavar="N", help="buffer in front of the line, each way; default: 64")
    parser.add_argument("--cut", action="store_true", help="an outage resets all connections; default: they freeze")


def run(args: argparse.Namespace) -> None:
    """Runs until SIGINT or SIGTERM."""
    trace = _trace(args)
    stop = threading.Event()
    for number in (SIGTERM, SIGINT):
        signal(number, lambda *_: stop.set())
    with LinkSimulator(args.to, trace[0][1], listen=args.listen, cut_in_outage=args.cut) as link:
        host, port = link.address
        print(f"listening on {host}:{port}, to {args.to[0]}:{args.to[1]}, {_describe(link.profile)}", flush=True)
        link.play(trace)
        while not stop.wait(REPORT_S):
            print(_line(link), flush=True)
        print(_line(link), flush=True)


def _line(link: LinkSimulator) -> str:
    counters = link.counters
    return (
        f"{link.profile.name}: up {counters.up_bytes} B ({counters.up_waiting} waiting), "
        f"down {counters.down_bytes} B ({counters.down_waiting} waiting), "
        f"connections {counters.open} open, {counters.accepted} so far"
    )


def _describe(profile: Profile) -> str:
    if profile.is_outage:
        return f"{profile.name}: nothing passes"
    rates = f"up {profile.up_kbit:g} kbit/s, down {profile.down_kbit:g} kbit/s"
    return f"{profile.name}: {rates}, round trip {profile.rtt_ms:g} ms"


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}, want HOST:PORT")
    try:
        host.encode("idna")  # as the socket module does
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: no host can be called {host!r}, want HOST:PORT") from error
    return host.strip("[]"), int(port)


def _trace(args: argparse.Namespace) -> list[tuple[float, Profile]]:
    """The link that the arguments describe; a single profile is a trace with one entry."""
    if args.up_kbit is None and (args.down_kbit, args.rtt_ms) != (None, None):
        raise LinkError("--down-kbit and --rtt-ms belong to --up-kbit, not to a profile or a trace: leave them out")
    if args.trace:
        trace = read_trace(args.trace)
    elif args.profile:
        trace = [(0.0, PROFILES[args.profile])]
    elif args.rtt_ms is None:
        raise LinkError("--up-kbit without --rtt-ms: add the round trip")
    else:
        down_kbit = args.up_kbit if args.down_kbit is None else args.down_kbit
        trace = [(0.0, Profile("custom", args.up_kbit, down_kbit, args.rtt_ms))]
    changes = {"jitter_ms": args.jitter_ms, "buffer_kb": args.buffer_kb}
    changes = {field: value for field, value in changes.items() if value is not None}
    return [(seconds, replace(profile, **changes)) for seconds, profile in trace]
