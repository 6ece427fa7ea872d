"""A TCP proxy that behaves like a thin link, to try out a site or to measure on one.

All connections share one link, as a board's connections do. The proxy reads from each end only as fast as the link
accepts bytes, so that TCP itself makes the sender wait. Connecting, closing and resetting cross the link like data. The
rules are in `shaping.py`; this file has the sockets, on an event loop in its own thread.
"""

import asyncio
import logging
import queue
import random
import select
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edge_runtime.bounded_file import read_bounded
from testbed.shaping import Line, LinkError, Profile, Shape, parse_trace

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256  # each needs two file descriptors, and 1024 is a common limit
MAX_TRACE_BYTES = 1 << 20
MIN_PACKET, MAX_PACKET = 1400, 16_384  # bytes; the smaller one fits an Ethernet frame
TICK_S = 0.001  # a packet on a fast line takes this long to send: smaller packets only cost CPU time
RECEIVE_BUFFER = 65_536  # bytes; the kernel doubles it, socket(7)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: closing then sends a reset, socket(7)

Address = tuple[str, int]


@dataclass(frozen=True)
class LinkCounters:
    """A link's counters."""

    accepted: int  # connections since the start
    open: int  # connections now
    up_bytes: int  # delivered to the target
    down_bytes: int  # delivered back
    up_waiting: int  # bytes in the link's buffer now
    down_waiting: int


class LinkSimulator:
    """A link from an address of this machine to a target, during the `with` block. Every method is thread-safe.

    Port 0 takes a free one. cut_in_outage: an outage resets all connections, like a modem that restarts; otherwise
    they stay open and freeze. Raises LinkError if it cannot listen.
    """

    def __init__(
        self,
        target: Address,
        profile: Profile,
        *,
        listen: Address = ("127.0.0.1", 0),
        cut_in_outage: bool = False,
    ) -> None:
        self._target = target
        self._listen = listen
        self._cut_in_outage = cut_in_outage
        self.profile = profile  # the present one, to read: `set` changes it
        self._up = _Direction(profile.up, random.Random(0))
        self._down = _Direction(profile.down, random.Random(1))
        self._accepted = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._traces: set[asyncio.Task[None]] = set()  # at most one: the trace that is playing
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._started: queue.Queue[Address | OSError | UnicodeError] = queue.Queue()

    def __enter__(self) -> "LinkSimulator":
        self._thread.start()
        started = self._started.get()
        if isinstance(started, (OSError, UnicodeError)):
            self._thread.join()
            host, port = self._listen
            raise LinkError(f"cannot listen on {host}:{port}: {started}: choose another address") from started
        self.address = started
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def port(self) -> int:
        return self.address[1]

    @property
    def counters(self) -> LinkCounters:
        up, down = self._up, self._down
        waiting = up.line.buffered, down.line.buffered
        return LinkCounters(self._accepted, len(self._connections), up.passed, down.passed, *waiting)

    def set(self, profile: Profile) -> None:
        """Changes the profile before it returns, also for bytes already in the link, and stops a trace."""
        self.play([(0.0, profile)])

    def play(self, trace: Sequence[tuple[float, Profile]]) -> None:
        """Starts a trace now: times in seconds from now, ascending from 0, and the profile from each time on."""
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
            for task in self._traces:
                task.cancel()
            self._cut()
            await asyncio.gather(*self._connections, *self._traces, return_exceptions=True)

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
        """Carries one connection until it ends. Its handshake takes a round trip, although accept() was immediate."""
        writers = [writer]
        try:
            if not await self._reach_target(reader):
                return
            try:
                target_reader, target_writer = await asyncio.open_connection(*self._target, limit=MAX_PACKET)
            except OSError as error:
                logger.debug("target unreachable error=%s", error)
                await self._down.cross()
                return
            writers.append(target_writer)
            _limit_receive_buffer(target_writer.get_extra_info("socket"))
            handshake = self._loop.create_task(self._down.cross())  # ahead of the target's first bytes
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
        """False if the client gave up during an outage: over a real link, its SYN would never reach the target.

        Otherwise every connection that a client tried during an outage would open when the outage ends.
        """
        crossing = self._loop.create_task(self._up.cross())
        ended = self._loop.create_task(reader.ended.wait())
        try:
            await asyncio.wait({crossing, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not crossing.done() and self.profile.up_kbit == 0:
                return False
            await crossing
            return True
        finally:
            crossing.cancel()
            ended.cancel()

    async def _play(self, trace: Sequence[tuple[float, Profile]]) -> None:
        for task in self._traces:
            task.cancel()
        start = self._loop.time()
        self._change(trace[0][1])
        if trace[1:]:
            task = self._loop.create_task(self._follow(start, trace[1:]))
            self._traces.add(task)
            task.add_done_callback(self._traces.discard)

    async def _follow(self, start: float, trace: Sequence[tuple[float, Profile]]) -> None:
        for seconds, profile in trace:
            await asyncio.sleep(start + seconds - self._loop.time())
            self._change(profile)

    def _change(self, profile: Profile) -> None:
        logger.info("link profile=%s", profile.name)
        self.profile = profile
        self._up.change(profile.up)
        self._down.change(profile.down)
        if self._is_cut():
            self._cut()

    def _is_cut(self) -> bool:
        return self._cut_in_outage and self.profile.is_outage

    def _cut(self) -> None:
        for task in self._connections:
            task.cancel()
        self._up.clear()
        self._down.clear()


class _Direction:
    """A `Line` in real time: the bytes of all connections in one direction."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        self.passed = 0  # bytes delivered
        self.line: Line[Callable[[], None]] = Line(shape, rng)
        self._turn = asyncio.Lock()  # first come, first served: no connection starves while the buffer is full
        self._room = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._packet_bytes = _packet_bytes(shape)

    def change(self, shape: Shape) -> None:
        self.line.change(asyncio.get_running_loop().time(), shape)
        self._packet_bytes = _packet_bytes(shape)
        self._wake()

    def clear(self) -> None:
        self.line.clear()
        self._wake()

    async def pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, after: "asyncio.Task[None] | None" = None
    ) -> None:
        """Carries the bytes of one end to the other until it closes or fails, and then carries that too."""
        try:
            if after:
                await after
            while data := await reader.read(self._packet_bytes):
                await self._put(len(data), partial(self._deliver, writer, data))
                await writer.drain()  # an end that does not read only blocks its own peer, not the link
        except OSError:
            await self.cross(partial(_reset, writer))
        else:
            await self.cross(partial(_end, writer))

    async def cross(self, signal: Callable[[], None] = lambda: None) -> None:
        """Sends a signal of no bytes behind the waiting data, and returns when it has arrived."""
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
            while self.line.is_full(now()):
                self._room.clear()
                await self._room.wait()
            self.line.put(now(), size, deliver)
            self._arm()

    def _deliver(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if not writer.is_closing():
            self.passed += len(data)  # before the write, so that received bytes are always counted
            writer.write(data)

    def _wake(self) -> None:
        now = asyncio.get_running_loop().time()
        for deliver in self.line.arrived(now):
            deliver()
        if not self.line.is_full(now):
            self._room.set()
        self._arm()

    def _arm(self) -> None:
        event = self.line.next_event()
        if self._timer and self._timer.when() == event and not self._timer.cancelled():
            return
        if self._timer:
            self._timer.cancel()
        self._timer = None if event is None else asyncio.get_running_loop().call_at(event, self._wake)


class _Reader(asyncio.StreamReader):
    """A stream that reports the client's end before anybody reads from it."""

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
    """A selector with timeouts in microseconds. epoll_wait(2) has milliseconds, a fifth of a Wi-Fi round trip."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout and timeout > 0 and self.fileno() < 1024:  # FD_SETSIZE of select(2); above it, use milliseconds
            select.select([self], [], [], timeout)
            timeout = 0
        return super().select(timeout)


def _packet_bytes(shape: Shape) -> int:
    return max(MIN_PACKET, min(MAX_PACKET, int(shape.rate * TICK_S)))


def _end(writer: asyncio.StreamWriter) -> None:
    if not writer.is_closing():
        with suppress(OSError):  # already reset; its reader reports that
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # already closed
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


def _limit_receive_buffer(sock: socket.socket) -> None:
    """By default the kernel would buffer megabytes before the link's own buffer, and no sender would ever block."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def read_trace(path: Path) -> list[tuple[float, Profile]]:
    """Reads a trace file, see `parse_trace`. Raises LinkError."""
    try:
        return parse_trace(read_bounded(path, MAX_TRACE_BYTES).decode(), str(path))
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}: name a file with a trace that can be read") from error
    except UnicodeDecodeError as error:
        raise LinkError(f"{path}: not UTF-8 at byte {error.start}, want lines such as 0<TAB>wifi") from None
