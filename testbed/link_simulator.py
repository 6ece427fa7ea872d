"""`aiflow link`: a TCP proxy that behaves like a thin link, to rehearse a site or to measure on one.

All connections share one link, as a board's do. Each end of a connection is read no faster than the link takes its
bytes, so that back-pressure is TCP's own; connecting, closing and resetting cross the link like data does. The rules
are in `shaping.py`; here are the sockets, on an event loop in a thread of its own.
"""

import argparse
import asyncio
import logging
import queue
import random
import select
import selectors
import signal
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

from testbed.shaping import PROFILES, Line, LinkError, Profile, Shape, parse_trace

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256  # a file descriptor is needed twice for each, and 1024 is a common limit
MAX_TRACE_BYTES = 4 << 20
MIN_PACKET, MAX_PACKET = 1400, 16_384  # bytes; the smaller is what fits an Ethernet frame
TICK_S = 0.001  # a fast line's packets are as long as this: fewer, and nobody sees the difference
RECEIVE_BUFFER = 65_536  # bytes; the kernel doubles it, socket(7)
REPORT_S = 60.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: closing then sends a reset, socket(7)

Address = tuple[str, int]


@dataclass(frozen=True)
class Counters:
    """What a link has done so far."""

    accepted: int  # connections since the start
    open: int  # connections now
    up_bytes: int  # that arrived at the target
    down_bytes: int  # that arrived back
    up_waiting: int  # bytes in the link's buffer now
    down_waiting: int


class Link:
    """A link from an address of this machine to a target while `with` lasts. All methods may be called from any thread.

    port 0 takes a free one. cut_in_outage: an outage resets every connection, as a modem that restarts does; without
    it they stay up and freeze. Raises LinkError where it cannot listen.
    """

    def __init__(
        self,
        target: Address,
        profile: Profile,
        *,
        listen: Address = ("127.0.0.1", 0),
        cut_in_outage: bool = False,
        seed: int = 0,
    ) -> None:
        self._target = target
        self._listen = listen
        self._cut_in_outage = cut_in_outage
        self._profile = profile
        self._up = _Direction(profile.up, random.Random(seed))
        self._down = _Direction(profile.down, random.Random(seed + 1))
        self._accepted = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._switches: set[asyncio.Task[None]] = set()  # at most one: the trace that plays
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._started: queue.SimpleQueue[Address | OSError | UnicodeError] = queue.SimpleQueue()

    def __enter__(self) -> "Link":
        self._thread.start()
        started = self._started.get()
        if isinstance(started, (OSError, UnicodeError)):
            self._thread.join()
            host, port = self._listen
            raise LinkError(f"cannot listen on {host}:{port}: {started}: choose another address") from started
        self.address = started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.address[1]

    @property
    def profile(self) -> Profile:
        """The one that holds now."""
        return self._profile

    @property
    def counters(self) -> Counters:
        """A reading."""
        up, down = self._up, self._down
        return Counters(self._accepted, len(self._connections), up.passed, down.passed, up.waiting, down.waiting)

    def set(self, profile: Profile) -> None:
        """Has taken effect when it returns, on what waits in the link, too; ends a trace."""
        self.play([(0.0, profile)])

    def play(self, trace: Sequence[tuple[float, Profile]]) -> None:
        """Start a trace now: seconds from this moment, ascending from 0, and the profile that holds from each."""
        asyncio.run_coroutine_threadsafe(self._play(trace), self._loop).result()

    def _run(self) -> None:
        self._loop = asyncio.SelectorEventLoop(_FineSelector())
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        try:
            server = await self._loop.create_server(self._protocol, *self._listen)
        except (OSError, UnicodeError) as error:
            self._started.put(error)
            return
        for listening in server.sockets:
            _limit_receive_buffer(listening)
        self._started.put(server.sockets[0].getsockname()[:2])
        async with server:
            await self._stop.wait()
            server.close()
            for task in self._switches:
                task.cancel()
            self._cut()
            await asyncio.gather(*self._connections, *self._switches, return_exceptions=True)

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = _Reader(limit=MAX_PACKET)
        return asyncio.StreamReaderProtocol(reader, lambda _, writer: self._accept(reader, writer))

    def _accept(self, reader: "_Reader", writer: asyncio.StreamWriter) -> None:
        self._accepted += 1
        if self._is_cut() or len(self._connections) >= MAX_CONNECTIONS:
            if not self._is_cut():
                logger.warning("connection refused open=%d", len(self._connections))
            _reset(writer)
            return
        task = self._loop.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: "_Reader", writer: asyncio.StreamWriter) -> None:
        """A connection's life. Its handshake takes a round trip, though the client was accepted at once."""
        writers = [writer]
        try:
            if not await self._reach_target(reader):
                return
            try:
                target_reader, target_writer = await asyncio.open_connection(*self._target, limit=MAX_PACKET)
            except OSError as error:
                logger.debug("target away error=%s", error)
                await self._down.cross()
                return
            writers.append(target_writer)
            _limit_receive_buffer(target_writer.get_extra_info("socket"))
            handshake = self._loop.create_task(self._down.cross())  # before whatever the target says first
            await asyncio.gather(
                self._down.pump(target_reader, writer), self._up.pump(reader, target_writer, after=handshake)
            )
            for end in writers:
                end.close()
                with suppress(OSError):
                    await end.wait_closed()
        except asyncio.CancelledError:
            for end in writers:
                _reset(end)
        finally:
            for end in writers:
                end.transport.abort()

    async def _reach_target(self, reader: "_Reader") -> bool:
        """False when the client gave up in an outage: over a real link, the target would never hear of it.

        Otherwise the connections that clients tried in an outage would all come to life when it ends.
        """
        crossing = self._loop.create_task(self._up.cross())
        ended = self._loop.create_task(reader.ended.wait())
        try:
            await asyncio.wait({crossing, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not crossing.done() and self._profile.up_kbit == 0:
                return False
            await crossing
            return True
        finally:
            crossing.cancel()
            ended.cancel()

    async def _play(self, trace: Sequence[tuple[float, Profile]]) -> None:
        for task in self._switches:
            task.cancel()
        start = self._loop.time()
        self._change(trace[0][1])
        if trace[1:]:
            task = self._loop.create_task(self._follow(start, trace[1:]))
            self._switches.add(task)
            task.add_done_callback(self._switches.discard)

    async def _follow(self, start: float, trace: Sequence[tuple[float, Profile]]) -> None:
        for seconds, profile in trace:
            await asyncio.sleep(start + seconds - self._loop.time())
            self._change(profile)

    def _change(self, profile: Profile) -> None:
        logger.info("link profile=%s", profile.name)
        self._profile = profile
        self._up.change(profile.up)
        self._down.change(profile.down)
        if self._is_cut():
            self._cut()

    def _is_cut(self) -> bool:
        return self._cut_in_outage and self._profile.is_outage

    def _cut(self) -> None:
        for task in self._connections:
            task.cancel()
        self._up.clear()
        self._down.clear()


class _Direction:
    """A `Line` in real time: bytes of all connections one way."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        self.passed = 0  # bytes that arrived
        self._line: Line[Callable[[], None]] = Line(shape, rng)
        self._turn = asyncio.Lock()  # first come, first served: nobody starves while the buffer is full
        self._room = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._packet_bytes = _packet_bytes(shape)

    def change(self, shape: Shape) -> None:
        self._line.change(asyncio.get_running_loop().time(), shape)
        self._packet_bytes = _packet_bytes(shape)
        self._wake()

    def clear(self) -> None:
        self._line.clear()
        self._wake()

    @property
    def waiting(self) -> int:
        return self._line.buffered

    async def pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, after: "asyncio.Task[None] | None" = None
    ) -> None:
        """Carry one end's bytes to the other until it closes or breaks, which is carried, too."""
        try:
            if after:
                await after
            while data := await reader.read(self._packet_bytes):
                await self._put(len(data), partial(self._deliver, writer, data))
                await writer.drain()  # an end that does not read holds up its peer alone, not the link
        except OSError:
            await self.cross(partial(_reset, writer))
        else:
            await self.cross(partial(_end, writer))

    async def cross(self, signal: Callable[[], None] = lambda: None) -> None:
        """Send a signal without bytes behind what waits; returns when it arrived."""
        arrived = asyncio.get_running_loop().create_future()

        def deliver() -> None:
            if not arrived.done():  # cancelled
                signal()
                arrived.set_result(None)

        await self._put(0, deliver)
        await arrived

    async def _put(self, size: int, deliver: Callable[[], None]) -> None:
        now = asyncio.get_running_loop().time
        async with self._turn:
            while self._line.is_full(now()):
                self._room.clear()
                await self._room.wait()
            self._line.put(now(), size, deliver)
            self._arm()

    def _deliver(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if not writer.is_closing():
            self.passed += len(data)  # first: who has the bytes and looks here finds them counted
            writer.write(data)

    def _wake(self) -> None:
        now = asyncio.get_running_loop().time()
        for deliver in self._line.arrived(now):
            deliver()
        if not self._line.is_full(now):
            self._room.set()
        self._arm()

    def _arm(self) -> None:
        event = self._line.next_event()
        if self._timer and self._timer.when() == event and not self._timer.cancelled():
            return
        if self._timer:
            self._timer.cancel()
        self._timer = None if event is None else asyncio.get_running_loop().call_at(event, self._wake)


class _Reader(asyncio.StreamReader):
    """Tells of a client's end while nobody reads yet."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit=limit)
        self.ended = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.ended.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.ended.set()


class _FineSelector(selectors.EpollSelector):
    """Waits to the microsecond: epoll_wait(2) counts milliseconds, a fifth of what Wi-Fi takes for a round trip."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout and timeout > 0 and self.fileno() < 1024:  # FD_SETSIZE of select(2); above it, milliseconds will do
            select.select([self], [], [], timeout)
            timeout = 0
        return super().select(timeout)


def _packet_bytes(shape: Shape) -> int:
    return max(MIN_PACKET, min(MAX_PACKET, int(shape.rate * TICK_S)))


def _end(writer: asyncio.StreamWriter) -> None:
    if not writer.is_closing():
        with suppress(OSError):  # reset in the meantime: its reader tells
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


def _limit_receive_buffer(sock: socket.socket) -> None:
    """By default the kernel would take megabytes ahead of the link's own buffer, and no sender would be held up."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, to whom, and which link."""
    parser.epilog = """\
a broker behind LTE-M:     aiflow link --to 127.0.0.1:1883 --profile lte-m, then let the board connect to port 1884
a trace, one moment a line: seconds from the start, a tab, a profile; the last one stays"""
    parser.add_argument(
        "--listen", type=_address, default=("127.0.0.1", 1884), metavar="HOST:PORT", help="default: 127.0.0.1:1884"
    )
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT", help="usually the broker")
    link = parser.add_mutually_exclusive_group(required=True)
    link.add_argument(
        "--profile", choices=PROFILES, help="up and down alike: " + "; ".join(map(_describe, PROFILES.values()))
    )
    link.add_argument("--trace", type=Path, metavar="FILE", help="switch profiles while connections stay up")
    link.add_argument("--up-kbit", type=float, metavar="N", help="a link of your own, with --rtt-ms; 0: nothing passes")
    parser.add_argument("--down-kbit", type=float, metavar="N", help="default: as --up-kbit")
    parser.add_argument("--rtt-ms", type=float, metavar="N", help="round trip of the idle link")
    parser.add_argument("--jitter-ms", type=float, metavar="N", help="added one way, 0 to N; order is kept; default: 0")
    parser.add_argument("--buffer-kb", type=int, metavar="N", help="what waits for the line each way; default: 64 KiB")
    parser.add_argument("--cut", action="store_true", help="an outage resets all connections; default: they freeze")


def run(args: argparse.Namespace) -> None:
    """Runs until SIGINT or SIGTERM."""
    trace = _trace(args)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Link(args.to, trace[0][1], listen=args.listen, cut_in_outage=args.cut) as link:
        host, port = link.address
        print(f"listening on {host}:{port}, to {args.to[0]}:{args.to[1]}, {_describe(link.profile)}", flush=True)
        link.play(trace)
        _report(link, stop)


def _report(link: Link, stop: threading.Event) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        while not stop.wait(REPORT_S):
            print(_line(link), flush=True)
        print(_line(link), flush=True)
        return
    with console.status(_line(link)) as status:
        while not stop.wait(0.5):
            status.update(_line(link))


def _line(link: Link) -> str:
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
    """What the arguments ask for; a profile is a trace of one moment."""
    if args.up_kbit is None and (args.down_kbit, args.rtt_ms) != (None, None):
        raise LinkError("--down-kbit and --rtt-ms belong to --up-kbit, not to a profile or a trace: leave them out")
    if args.trace:
        trace = read_trace(args.trace)
    elif args.profile:
        trace = [(0.0, PROFILES[args.profile])]
    elif args.rtt_ms is None:
        raise LinkError("--up-kbit without --rtt-ms: say the round trip, too")
    else:
        down_kbit = args.up_kbit if args.down_kbit is None else args.down_kbit
        trace = [(0.0, Profile("custom", args.up_kbit, down_kbit, args.rtt_ms))]
    changes = {"jitter_ms": args.jitter_ms, "buffer_kb": args.buffer_kb}
    changes = {field: value for field, value in changes.items() if value is not None}
    return [(seconds, replace(profile, **changes)) for seconds, profile in trace]


def read_trace(path: Path) -> list[tuple[float, Profile]]:
    """A file of moments and profiles. Raises LinkError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TRACE_BYTES + 1)
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}: name a file with a trace") from error
    if len(data) > MAX_TRACE_BYTES:
        raise LinkError(f"{path}: more than {MAX_TRACE_BYTES} bytes, want less: cut the trace")
    try:
        return parse_trace(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise LinkError(f"{path}: not UTF-8 at byte {error.start}, want lines such as 0<TAB>wifi") from None
