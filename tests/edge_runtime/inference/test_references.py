"""Which earlier frame a new one is coded against, over a network that loses, doubles, delays and reorders."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_runtime.inference.references import (
    MAX_LOSSES,
    PAUSE_S,
    SERVERS,
    WAITING,
    ReferenceFrames,
    SentFrame,
)
from edge_runtime.wire import Hop, ReferenceLostError, Reply, Status, Tier
from edge_runtime.wire.bitstream import KEPT_FRAMES, Header, Inter, Reference, decode, encode
from edge_runtime.wire.tables import count_inter_tables, count_tables
from server.references import References
from tests.edge_runtime.wire.conftest import later, peaked

REFRESH_S = 60.0
BLANK = np.zeros((8, 3, 4), np.int8)


def name(number: int) -> bytes:
    return (1 << 40 | number).to_bytes(8, "big")


def sent(number: int, at: float = 0.0, camera: str = "door", **changes: object) -> SentFrame:
    return replace(SentFrame(name(number), camera, BLANK, 1, 4, at), **changes)


def reply(number: int, status: Status = Status.OK, server: str = "s1", is_reference: bool = True) -> Reply:
    is_kept = is_reference and status is Status.OK
    hops = (Hop(Tier.EDGE, server, 0, 0), Hop(Tier.CLOUD, "c1", 0, 0)) if status is Status.OK else ()
    return Reply(id=name(number), status=status, server="c1" if hops else server, hops=hops, is_reference=is_kept)


def answered(number: int = 1, **of_reply: object) -> ReferenceFrames:
    frames = ReferenceFrames(REFRESH_S)
    frames.sent(sent(number))
    frames.heard(reply(number, **of_reply))
    return frames


def found(
    frames: ReferenceFrames, camera: str = "door", level: int = 1, groups: int = 4, at: float = 1.0
) -> int | None:
    reference = frames.find(camera, level, groups, at)
    return reference.name if reference else None


def test_a_frame_is_a_reference_when_its_reply_says_that_the_server_has_it():
    frames = ReferenceFrames(REFRESH_S)
    frames.sent(sent(1))
    assert found(frames) is None
    frames.heard(reply(1))
    assert found(frames) == 1
    assert found(answered(is_reference=False)) is None
    assert found(answered(status=Status.FAILED)) is None


def test_a_reference_is_of_the_same_camera_level_and_groups():
    frames = answered()
    assert found(frames) == 1
    assert [found(frames, "yard"), found(frames, level=0), found(frames, groups=3)] == [None, None, None]


def test_a_reply_to_an_older_frame_does_not_replace_a_newer_one():
    frames = ReferenceFrames(REFRESH_S)
    for number in (1, 2, 3):
        frames.sent(sent(number))
    for number in (2, 1, 2, 7):  # late, doubled, unknown
        frames.heard(reply(number))
        assert found(frames) == 2


def test_a_frame_is_sent_alone_after_the_refresh_time_and_never_coded_if_that_is_zero():
    frames = answered()
    frames.sent(sent(2, at=50.0, has_reference=True))
    frames.heard(reply(2))
    assert found(frames, at=59.9) == 2
    assert found(frames, at=60.0) is None
    frames.sent(sent(3, at=60.0))
    assert found(frames, at=61.0) == 2
    never = ReferenceFrames(0)
    never.sent(sent(1))
    never.heard(reply(1))
    assert found(never) is None


def test_a_reference_is_used_while_the_server_keeps_it():
    frames = answered()
    for number in range(2, KEPT_FRAMES + 1):
        assert found(frames) == 1
        frames.sent(sent(number, camera="yard"))
    frames.sent(sent(99, camera="yard"))
    assert found(frames) is None


def test_after_a_disconnection_nothing_is_a_reference():
    frames = answered()
    frames.sent(sent(2))
    frames.disconnected()
    frames.heard(reply(2))
    assert found(frames) is None


def test_a_pool_of_servers_gets_no_references_until_one_server_alone_answers():
    frames = answered()
    for number in range(2, 2 + SERVERS):
        frames.sent(sent(number))
        frames.heard(reply(number, server="s2"))
        assert (found(frames) is None) == (number < 1 + SERVERS)


def test_lost_references_one_after_the_other_end_their_use_for_a_while():
    frames, number = answered(), 1
    for _ in range(MAX_LOSSES):
        assert found(frames) == number
        frames.sent(sent(number + 1, has_reference=True))
        frames.heard(reply(number + 1, Status.REFERENCE_LOST))
        assert found(frames) is None
        frames.heard(reply(number + 1))  # to the frame alone
        number += 1
    assert found(frames, at=1.0) is None
    assert found(frames, at=1.0 + PAUSE_S - 0.1) is None
    frames.sent(sent(9, at=PAUSE_S))
    assert found(frames, at=1.0 + PAUSE_S) == number


def test_a_restart_of_the_server_is_one_loss_however_many_frames_were_on_their_way():
    frames = answered()
    for number in (2, 3, 4):
        frames.sent(sent(number, has_reference=True))
    for number in (2, 3, 4):
        frames.heard(reply(number, Status.REFERENCE_LOST))
    frames.heard(reply(4))
    assert found(frames) == 4


def test_a_reference_that_worked_ends_the_count_of_losses():
    frames = answered()
    for number in range(2, 12, 2):
        frames.sent(sent(number, has_reference=True))
        frames.heard(reply(number, Status.REFERENCE_LOST))
        frames.heard(reply(number))
        assert found(frames) == number
        frames.sent(sent(number + 1, has_reference=True))
        frames.heard(reply(number + 1))
        assert found(frames) == number + 1


def test_memory_is_bounded():
    frames = ReferenceFrames(REFRESH_S)
    for number in range(3 * WAITING):
        frames.sent(sent(number))
        frames.heard(reply(max(0, number - WAITING + 1)))
        frames.find(f"camera {number % 16}", 1, 4, 1.0)
    assert len(frames._waiting) <= WAITING
    assert len(frames._latest) == 1


# ---- board and server over any network ----

TABLES = count_tables([peaked(50, 0.6, 1), peaked(50, 1.2, 2)], contexts=3, largest=3)
INTER = count_inter_tables([(f, later(f, 4)) for f in (peaked(50, 0.6, 1), peaked(50, 1.2, 2))], TABLES)
ANY = st.integers(0, 7)


class AnyNetwork(RuleBasedStateMachine):
    """What the server reads is always what the board meant. A frame that it cannot read is sent alone and then read."""

    def __init__(self) -> None:
        super().__init__()
        self.board, self.server = ReferenceFrames(REFRESH_S), References(max_bytes=40 * BLANK.size)
        self.now, self.meant, self.read = 0.0, {}, set()
        self.alone: dict[int, bytes] = {}
        self.seen = {"door": peaked(1, 1.0, 5)[0], "yard": peaked(1, 1.0, 6)[0]}
        self.up: list[tuple[int, bytes]] = []
        self.down: list[Reply] = []

    @rule(camera=st.sampled_from(["door", "yard"]), is_cut=st.booleans(), level=st.sampled_from([1, 1, 1, 0]))
    def send(self, camera: str, is_cut: bool, level: int) -> None:
        number = len(self.meant) + 1
        symbols = peaked(1, 1.0, number)[0] if is_cut else later(self.seen[camera], number)
        self.seen[camera] = self.meant[number] = symbols
        reference: Reference | None = self.board.find(camera, level, 4, self.now)
        self.alone[number] = encode(symbols, TABLES, level)
        content = encode(symbols, INTER, level, 4, reference) if reference else self.alone[number]
        self.up.append((number, content))
        frame = sent(number, self.now, camera, symbols=symbols, level=level, has_reference=reference is not None)
        self.board.sent(frame)

    @precondition(lambda self: self.up)
    @rule(which=ANY, again=st.booleans())
    def server_reads(self, which: int, again: bool) -> None:
        number, content = self.up[which % len(self.up)] if again else self.up.pop(which % len(self.up))
        try:
            decoded = decode(content, TABLES, Inter(INTER, lambda header: self.server.find("b1", header)))
        except ReferenceLostError:
            assert Header.from_bytes(content).reference is not None
            self.down.append(reply(number, Status.REFERENCE_LOST))
        else:
            assert decoded.checked
            assert np.array_equal(decoded.symbols, self.meant[number])
            self.server.keep("b1", name(number), decoded.header, decoded.symbols)
            self.read.add(number)
            self.down.append(reply(number))

    @precondition(lambda self: self.down)
    @rule(which=ANY, again=st.booleans())
    def board_hears(self, which: int, again: bool) -> None:
        heard = self.down[which % len(self.down)] if again else self.down.pop(which % len(self.down))
        self.board.heard(heard)
        if heard.status is Status.REFERENCE_LOST:
            number = int.from_bytes(heard.id, "big") & 0xFFFF
            self.up.append((number, self.alone[number]))

    @rule(which=ANY)
    def a_message_is_lost(self, which: int) -> None:
        for messages in (self.up, self.down):
            if messages:
                messages.pop(which % len(messages))

    @rule()
    def the_server_starts_again(self) -> None:
        self.server = References(max_bytes=40 * BLANK.size)

    @rule()
    def the_board_connects_again(self) -> None:
        self.board.disconnected()

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.board._waiting) <= WAITING
        assert len(self.board._latest) <= 2
        assert self.server.bytes <= 40 * BLANK.size

    def teardown(self) -> None:
        """On a network without faults, all that is on its way is read in the end."""
        wanted = {number for number, _ in self.up}
        for _ in range(4 * len(self.up) + 4 * len(self.down)):
            if self.up:
                self.server_reads(0, again=False)
            if self.down:
                self.board_hears(0, again=False)
        assert wanted <= self.read


AnyNetwork.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyNetwork = AnyNetwork.TestCase


@pytest.mark.parametrize("number", [0, 0xFFFF])
def test_a_reference_is_named_by_the_end_of_its_request(number: int):
    assert found(answered(number)) == number
