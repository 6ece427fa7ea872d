"""The simulated link: what it does to a stream is exact, and what it does to sockets is what a thin link does."""

import hashlib
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed import link_simulator
from testbed.link_simulator import LinkSimulator
from testbed.shaping import MAX_PACKETS, PROFILES, Line, LinkError, Profile, Shape, named, parse_trace

PATIENCE_S = 30
FAST = Profile("fast", 100_000, 100_000, 2)
OUTAGE = PROFILES["outage"]

rates = st.floats(10, 1e8)
shapes = st.builds(Shape, rates, st.floats(0, 10), st.floats(0, 5), st.integers(1024, 1 << 20))
sizes = st.integers(0, 20_000)
puts = st.lists(st.tuples(st.floats(0, 5), sizes), min_size=1, max_size=40)  # seconds since the one before, bytes
steps = st.lists(st.tuples(st.floats(0, 5), sizes | shapes | st.just(Shape(0, 0, 0, 1024))), max_size=40)


def moments(line: Line[int], now: float, until: float) -> Iterator[float]:
    """When the line says that something happens; whoever takes them asks the line what."""
    while (event := line.next_event()) is not None and event <= until:
        yield (now := max(now, event))


def arrivals(line: Line[int], until: float) -> dict[int, float]:
    """When each packet arrives."""
    return {number: moment for moment in moments(line, 0, until) for number in line.arrived(moment)}


@given(puts, rates, st.floats(0, 10))
def test_without_jitter_each_packet_arrives_when_the_queue_of_one_server_says(
    puts: list[tuple[float, int]], rate: float, delay_s: float
) -> None:
    line: Line[int] = Line(Shape(rate, delay_s, 0, 1 << 20), random.Random(0))
    now = free = 0.0
    found: dict[int, float] = {}
    wanted = []
    for number, (pause, size) in enumerate(puts):
        found |= arrivals(line, now + pause)
        now += pause
        line.put(now, size, number)
        free = max(now, free) + size / rate  # Lindley's recursion
        wanted.append(free + delay_s)
    found |= arrivals(line, float("inf"))
    assert list(found) == list(range(len(puts)))
    assert list(found.values()) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(steps, shapes, st.integers(0, 9))
def test_nothing_overtakes_outruns_the_rate_or_the_delay_or_is_lost_however_the_link_changes(
    steps: list[tuple[float, int | Shape]], shape: Shape, seed: int
) -> None:
    line: Line[int] = Line(shape, random.Random(seed))
    last = Shape(1e6, 1, 0, 1024)
    least_delay_s = min(
        s.delay_s for s in (shape, last, *(step for _, step in steps)) if isinstance(s, Shape) and s.rate
    )
    now = capacity = carried = 0.0
    sent: list[tuple[float, int]] = []
    found: list[int] = []
    for pause, step in [*steps, (0.0, last), (1e6, 0), (100.0, 0)]:
        end = now + pause
        for moment in chain(moments(line, now, end), [end]):
            capacity += (moment - now) * shape.rate
            now = moment
            for number in line.arrived(now):
                assert now >= sent[number][0] + least_delay_s - 1e-6
                carried += sent[number][1]
                assert carried <= capacity * (1 + 1e-9) + 1e-3
                found.append(number)
        if isinstance(step, Shape):
            shape = step
            line.change(now, shape)
        else:
            sent.append((now, step))
            line.put(now, step, len(sent) - 1)
    assert found == list(range(len(sent) - 1))


@given(puts, shapes, st.integers(0, 9))
def test_jitter_stays_within_its_bound(puts: list[tuple[float, int]], shape: Shape, seed: int) -> None:
    calm, shaken = Line[int](shape._replace(jitter_s=0), random.Random(seed)), Line[int](shape, random.Random(seed))
    now = 0.0
    for number, (pause, size) in enumerate(puts):
        now += pause
        calm.put(now, size, number)
        shaken.put(now, size, number)
    early, late = arrivals(calm, float("inf")), arrivals(shaken, float("inf"))
    assert len(early) == len(late) == len(puts)
    assert all(early[n] - 1e-9 <= late[n] <= early[n] + shape.jitter_s + 1e-9 for n in range(len(puts)))


def test_a_new_rate_holds_from_the_middle_of_a_packet() -> None:
    line: Line[str] = Line(Shape(1000, 0, 0, 1 << 16), random.Random(0))
    line.put(0.0, 1000, "a")
    line.put(0.0, 100, "b")
    line.change(0.5, Shape(100, 0, 0, 1 << 16))  # 500 bytes of `a` have left
    assert line.arrived(5.4) == []
    assert line.arrived(5.5) == ["a"]
    assert line.arrived(6.4) == []
    assert line.arrived(6.5) == ["b"]


def test_an_outage_freezes_what_waits_and_what_travels() -> None:
    line: Line[str] = Line(Shape(1000, 1, 0, 1 << 16), random.Random(0))
    line.put(0.0, 100, "travels")
    line.put(0.0, 1000, "waits")
    line.change(0.6, OUTAGE.up)
    assert line.next_event() is None
    assert line.arrived(1000) == []
    line.change(1000, Shape(1000, 1, 0, 1 << 16))
    assert line.arrived(1000) == ["travels"]
    assert line.next_event() == pytest.approx(1000.5)  # half of `waits` had left before
    assert line.arrived(1001.4) == []
    assert line.arrived(1001.6) == ["waits"]


def test_a_line_is_full_at_its_buffer_and_at_its_number_of_packets() -> None:
    line: Line[int] = Line(Shape(1000, 0, 0, 2000), random.Random(0))
    line.put(0.0, 1999, 0)
    assert not line.is_full(0.0)
    line.put(0.0, 1, 1)
    assert line.is_full(0.0)
    assert not line.is_full(2.0)
    assert line.arrived(2.0) == [0, 1]
    for number in range(MAX_PACKETS):
        assert not line.is_full(3.0)
        line.put(3.0, 0, number)
    assert line.is_full(3.0)


@pytest.mark.parametrize(
    ("name", "kbit", "rtt_ms"),
    [("nb-iot", 20, 800), ("lte-m", 200, 150), ("3g", 1e3, 90), ("4g", 1e4, 45), ("wifi", 5e4, 5)],
)
def test_a_profile_is_rate_and_half_of_the_round_trip_each_way(name: str, kbit: float, rtt_ms: float) -> None:
    profile = named(name)
    assert profile.up == profile.down
    assert profile.up.rate == kbit * 1000 / 8
    assert profile.up.delay_s == rtt_ms / 2 / 1000


@pytest.mark.parametrize("field", ["up_kbit", "down_kbit", "rtt_ms", "jitter_ms", "buffer_kb"])
@pytest.mark.parametrize("value", [-1, 10**10, float("nan")])
def test_a_profile_out_of_range_is_refused_by_field(field: str, value: float) -> None:
    with pytest.raises(LinkError, match=f"link odd: {field} = .*, want "):
        Profile(**{"name": "odd", "up_kbit": 1, "down_kbit": 1, "rtt_ms": 1, field: value})  # type: ignore[arg-type]


def test_a_trace_has_a_time_and_a_profile_per_line() -> None:
    trace = parse_trace("# a drive\n0\twifi\n\n20.5\tlte-m\r\n40\toutage\n", "t")
    assert trace == [(0.0, PROFILES["wifi"]), (20.5, PROFILES["lte-m"]), (40.0, OUTAGE)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "t.tsv: no lines, want"),
        ("5\twifi", "t.tsv, line 1: seconds = 5 first, want 0"),
        ("0\twifi\n# x\n0\t3g", "t.tsv, line 3: seconds = 0 after 0, want ascending"),
        ("0\t5g", "t.tsv, line 1: no link profile '5g', want one of nb-iot, lte-m"),
        ("0 wifi", "t.tsv, line 1: '0 wifi', want seconds<TAB>profile"),
        ("nan\twifi", "t.tsv, line 1: seconds = nan, want 0 to"),
        ("0\twifi\n-1\t3g", "t.tsv, line 2: seconds = -1.0, want 0 to"),
    ],
)
def test_a_bad_trace_is_named_with_file_line_and_what_is_wanted(text: str, error: str) -> None:
    with pytest.raises(LinkError, match=error):
        parse_trace(text, "t.tsv")


@given(st.text() | st.lists(st.sampled_from(["0\twifi", "1\t3g", "1e999\twifi", "inf", "\t"])).map("\n".join))
def test_any_text_is_a_trace_or_a_link_error(text: str) -> None:
    with suppress(LinkError):
        assert parse_trace(text, "t")[0][0] == 0


# From here on: real sockets.


@pytest.fixture
def target() -> Iterator[socket.socket]:
    """A listening socket that stands for the broker."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        yield server


@pytest.fixture
def connect(target: socket.socket) -> Iterator[Callable[[LinkSimulator], tuple[socket.socket, socket.socket]]]:
    """A function that gives both ends of a new connection through a link."""
    with ExitStack() as stack:

        def both(link: LinkSimulator) -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(socket.create_connection(link.address, timeout=PATIENCE_S))
            end, _ = target.accept()
            stack.enter_context(end).settimeout(PATIENCE_S)
            return client, end

        yield both


Connect = Callable[[LinkSimulator], tuple[socket.socket, socket.socket]]


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def is_silent(sock: socket.socket) -> bool:
    sock.settimeout(0.2)
    try:
        return not sock.recv(1) and False
    except TimeoutError:
        return True
    finally:
        sock.settimeout(PATIENCE_S)


def send_until_held_up(sock: socket.socket, is_full: Callable[[], bool] = lambda: True) -> int:
    """How many bytes the kernel took before it took none for a second, with the link being full."""
    sent = 0
    while sent < 40_000_000:  # more than all kernels' buffers
        if select.select([], [sock], [], 1.0)[1]:
            sent += sock.send(b"x" * 10_000, socket.MSG_DONTWAIT)
        elif is_full():  # else the machine is busy
            break
    return sent


def wait_until(holds: Callable[[], bool]) -> None:
    """For what another thread counts: there is nothing to wait on."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "never"
        time.sleep(0.005)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_both_ends_hear_each_other_and_bytes_are_counted(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), FAST) as link:
        client, end = connect(link)
        client.sendall(b"question")
        assert read(end, 8) == b"question"
        end.sendall(b"answers")
        assert read(client, 7) == b"answers"
        counters = link.counters
        assert (counters.up_bytes, counters.down_bytes, counters.accepted, counters.open) == (8, 7, 1, 1)
        client.close()
        assert read(end, 1) == b""
        end.close()
        wait_until(lambda: link.counters.open == 0)


def test_a_round_trip_is_never_shorter_than_the_links(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), Profile("slow", 1000, 1000, 60, jitter_ms=5)) as link:
        client, end = connect(link)
        for _ in range(3):
            start = time.monotonic()
            client.sendall(b"x" * 100)
            end.sendall(read(end, 100))
            read(client, 100)
            assert time.monotonic() - start >= 0.060 + 2 * 100 * 8 / 1e6


def test_a_target_that_speaks_first_is_heard(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), FAST) as link:
        client, end = connect(link)
        end.sendall(b"hello")
        assert read(client, 5) == b"hello"


def test_megabytes_survive_both_ways_at_once_over_a_link_that_changes(target: socket.socket, connect: Connect) -> None:
    data = random.Random(1).randbytes(3_000_000)
    digests: list[str] = []

    def send(sock: socket.socket) -> None:
        rng, at = random.Random(2), 0
        while at < len(data):
            size = rng.randrange(1, 50_000)
            sock.sendall(data[at : at + size])
            at += size
        sock.shutdown(socket.SHUT_WR)

    def receive(sock: socket.socket) -> None:
        digest = hashlib.sha256()
        while more := sock.recv(65_536):
            digest.update(more)
        digests.append(digest.hexdigest())

    with LinkSimulator(target.getsockname(), FAST) as link:
        ends = connect(link)
        threads = [threading.Thread(target=work, args=(end,)) for end in ends for work in (send, receive)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            link.set(Profile("shaky", 80_000, 200_000, 4, jitter_ms=3, buffer_kb=16))
            threads[0].join(0.05)
            link.set(OUTAGE)
            link.set(FAST)
            threads[1].join(0.05)
        assert digests == [hashlib.sha256(data).hexdigest()] * 2
        assert (link.counters.up_bytes, link.counters.down_bytes) == (len(data), len(data))


def test_a_half_closed_connection_still_carries_the_answer(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), FAST) as link:
        client, end = connect(link)
        client.sendall(b"all")
        client.shutdown(socket.SHUT_WR)
        assert read(end, 99) == b"all"
        end.sendall(b"thanks")
        assert read(client, 6) == b"thanks"
        end.close()
        assert read(client, 1) == b""


@pytest.mark.parametrize("breaks", [0, 1])
def test_a_reset_of_either_end_reaches_the_other(target: socket.socket, connect: Connect, breaks: int) -> None:
    with LinkSimulator(target.getsockname(), FAST) as link:
        ends = connect(link)
        ends[0].sendall(b"x")
        read(ends[1], 1)
        reset(ends[breaks])
        with pytest.raises(ConnectionResetError):
            ends[1 - breaks].recv(1)
        wait_until(lambda: link.counters.open == 0)


def test_a_target_that_is_away_closes_what_was_accepted_and_may_come_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with LinkSimulator(address, FAST) as link:
        with socket.create_connection(link.address, timeout=PATIENCE_S) as client:
            assert read(client, 1) == b""
        with (
            socket.create_server(address) as server,
            socket.create_connection(link.address, timeout=PATIENCE_S) as client,
        ):
            client.sendall(b"x")
            end, _ = server.accept()
            with end:
                assert read(end, 1) == b"x"


def test_an_outage_freezes_bytes_and_connects_and_loses_none(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), FAST) as link:
        client, end = connect(link)
        link.set(OUTAGE)
        client.sendall(b"kept")
        end.sendall(b"also")
        assert is_silent(end)
        assert is_silent(client)
        with socket.create_connection(link.address, timeout=PATIENCE_S) as late:
            late.sendall(b"late")
            assert is_silent(late)
            link.set(FAST)
            assert read(end, 4) == b"kept"
            assert read(client, 4) == b"also"
            late_end, _ = target.accept()
            with late_end:
                assert read(late_end, 4) == b"late"


def test_a_client_that_gave_up_in_an_outage_never_reaches_the_target(target: socket.socket) -> None:
    with LinkSimulator(target.getsockname(), OUTAGE) as link:
        with socket.create_connection(link.address, timeout=PATIENCE_S) as gone:
            gone.sendall(b"gone")
        wait_until(lambda: link.counters.accepted == 1 and link.counters.open == 0)
        with socket.create_connection(link.address, timeout=PATIENCE_S) as client:
            client.sendall(b"here")
            link.set(FAST)
            end, _ = target.accept()
            with end:
                assert read(end, 4) == b"here"
        assert link.counters.up_bytes == 4


def test_where_it_is_asked_for_an_outage_resets_connections(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), FAST, cut_in_outage=True) as link:
        ends = connect(link)
        ends[0].sendall(b"x")
        read(ends[1], 1)
        link.set(OUTAGE)
        for end in ends:
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        with pytest.raises(ConnectionError), socket.create_connection(link.address, timeout=PATIENCE_S) as refused:
            assert refused.recv(1)
        link.set(FAST)
        client, end = connect(link)
        client.sendall(b"x")
        assert read(end, 1) == b"x"


def test_a_full_buffer_holds_the_sender_up_and_loses_nothing(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), Profile("thin", 100_000, 100_000, 2, buffer_kb=8)) as link:
        client, end = connect(link)
        client.sendall(b"x")
        read(end, 1)
        link.set(OUTAGE)
        sent = send_until_held_up(client, lambda: link.counters.up_waiting >= OUTAGE.buffer_kb * 1024)
        assert link.counters.up_waiting < OUTAGE.buffer_kb * 1024 + link_simulator.MAX_PACKET
        assert sent < 16_000_000  # mostly the sender's own kernel
        link.set(FAST)
        assert len(read(end, sent)) == sent


def test_an_end_that_does_not_read_holds_up_its_peer_alone(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), FAST) as link:
        (deaf_client, _), (client, end) = connect(link), connect(link)
        assert send_until_held_up(deaf_client) < 32_000_000  # three kernels' buffers; the link's own are under 1 MB
        client.sendall(b"x")
        assert read(end, 1) == b"x"


def test_all_connections_wait_in_one_queue(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), FAST) as link:
        (first, first_end), (second, second_end) = connect(link), connect(link)
        for client, end in ((first, first_end), (second, second_end)):
            client.sendall(b"x")
            read(end, 1)
        link.set(OUTAGE)
        first.sendall(b"x" * 5000)
        wait_until(lambda: link.counters.up_waiting == 5000)
        second.sendall(b"x")
        wait_until(lambda: link.counters.up_waiting == 5001)
        link.set(Profile("slow", 400, 400, 0))
        assert read(second_end, 1) == b"x"
        assert len(first_end.recv(9000, socket.MSG_DONTWAIT)) == 5000


def test_a_trace_switches_while_connections_stay_up_and_its_last_profile_stays(
    target: socket.socket, connect: Connect
) -> None:
    with LinkSimulator(target.getsockname(), FAST) as link:
        client, end = connect(link)
        link.play([(0.0, OUTAGE), (3600.0, FAST)])
        assert link.profile == OUTAGE
        client.sendall(b"x")
        link.play([(0.0, OUTAGE), (0.1, PROFILES["3g"]), (0.2, FAST)])
        assert read(end, 1) == b"x"
        wait_until(lambda: link.profile == FAST)
        link.play([(0.0, FAST), (0.1, OUTAGE)])
        link.set(PROFILES["wifi"])  # ends the trace
        assert is_silent(client)
        assert link.profile == PROFILES["wifi"]


def test_connections_beyond_the_bound_are_refused(
    target: socket.socket, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_simulator, "MAX_CONNECTIONS", 1)
    with LinkSimulator(target.getsockname(), FAST) as link:
        client, end = connect(link)
        with pytest.raises(ConnectionError), socket.create_connection(link.address, timeout=PATIENCE_S) as refused:
            assert refused.recv(1)
        client.sendall(b"x")
        assert read(end, 1) == b"x"


def test_a_link_that_ends_resets_its_connections_and_leaves_no_thread(target: socket.socket, connect: Connect) -> None:
    with LinkSimulator(target.getsockname(), PROFILES["nb-iot"]) as link:
        link.set(FAST)
        client, _ = connect(link)
        link.set(OUTAGE)
        client.sendall(b"x" * 10_000)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert "link" not in [thread.name for thread in threading.enumerate()]


def test_a_port_that_is_taken_is_an_error_of_the_caller(target: socket.socket) -> None:
    with pytest.raises(LinkError, match="in use"), LinkSimulator(("127.0.0.1", 1), FAST, listen=target.getsockname()):
        pass


def test_an_address_that_is_none_is_an_error_of_the_caller(target: socket.socket) -> None:
    with (
        pytest.raises(LinkError, match="cannot listen on"),
        LinkSimulator(target.getsockname(), FAST, listen=("..", 0)),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_where_it_listens_and_ends_cleanly(
    target: socket.socket, tmp_path: Path, number: signal.Signals
) -> None:
    trace = tmp_path / "trace.tsv"
    trace.write_text("0\twifi\n")
    address = f"127.0.0.1:{target.getsockname()[1]}"
    command = [sys.executable, "-m", "firmware_tools", "link", "--to", address, "--listen", "127.0.0.1:0"]
    command += ["--trace", str(trace), "--jitter-ms", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            hello = re.match(r"listening on 127\.0\.0\.1:(\d+), to ", process.stdout.readline())
            assert hello
            with socket.create_connection(("127.0.0.1", int(hello[1])), timeout=PATIENCE_S) as client:
                client.sendall(b"x" * 100)
                end, _ = target.accept()
                with end:
                    assert len(read(end, 100)) == 100
            process.send_signal(number)
            output, errors = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    assert "wifi: up 100 B" in output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--profile", "5g"], "invalid choice: '5g'"),
        ([], "one of the arguments --profile --trace --up-kbit is required"),
        (["--profile", "wifi", "--up-kbit", "3"], "not allowed with argument"),
        (["--up-kbit", "3"], "--up-kbit without --rtt-ms"),
        (["--profile", "wifi", "--rtt-ms", "3"], "--rtt-ms belong to --up-kbit"),
        (["--up-kbit", "-3", "--rtt-ms", "1"], "link custom: up_kbit = -3.0, want 0 to"),
        (["--profile", "wifi", "--buffer-kb", "0"], "link wifi: buffer_kb = 0, want 1 to"),
        (["--trace", "{tmp}/none.tsv"], "none.tsv"),
        (["--trace", "{tmp}/latin.tsv"], "latin.tsv: not UTF-8 at byte 0"),
        (["--profile", "wifi", "--listen", "1883"], "'1883', want HOST:PORT"),
        (["--profile", "wifi", "--listen", "..:1884"], "no host can be called '..'"),
        (["--profile", "wifi", "--to", "a..b:1883"], "no host can be called 'a..b'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from firmware_tools.cli import main

    (tmp_path / "latin.tsv").write_bytes(b"\xff")
    with suppress(SystemExit):  # of argparse
        assert main(["link", "--to", "127.0.0.1:1", *(a.format(tmp=tmp_path) for a in arguments)]) != 0
    message = capsys.readouterr().err
    assert error in message
    assert "Traceback" not in message
