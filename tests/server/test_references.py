"""The latest frames of each board: bounded, and never another one than was asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire.bitstream import KEPT_FRAMES, Header
from server.references import References


def header(name: int | None = None, level: int = 1, groups: int = 4) -> Header:
    return Header(level, groups, 0, name)


def frame(value: int) -> np.ndarray:
    return np.full((4, 5, 5), value, np.int8)  # 100 bytes


def request_id(number: int) -> bytes:
    return (1 << 40 | number).to_bytes(8, "big")


def test_a_board_finds_its_own_frames_of_this_level_and_these_groups_only():
    references = References()
    references.keep("b1", request_id(7), header(), frame(7))
    assert references.find("b1", header(7))[0, 0, 0] == 7
    for board, wanted in (
        ("b2", header(7)),
        ("b1", header(8)),
        ("b1", header(7, level=0)),
        ("b1", header(7, groups=3)),
    ):
        assert references.find(board, wanted) is None


def test_a_board_has_its_last_frames():
    references = References()
    for number in range(KEPT_FRAMES + 1):
        references.keep("b1", request_id(number), header(), frame(number))
    assert references.find("b1", header(0)) is None
    assert references.find("b1", header(1)) is not None
    assert references.bytes == 100 * KEPT_FRAMES


@pytest.mark.parametrize("again", ["b1", "b2"])
def test_without_memory_the_board_that_was_idle_for_longest_loses_its_oldest_frames(again: str):
    references = References(max_bytes=400)
    for number, board in enumerate(["b1", "b1", "b2", "b2", again]):
        references.keep(board, request_id(number), header(), frame(number))
    gone = {"b1": ("b2", 2), "b2": ("b1", 0)}[again]
    assert references.find(gone[0], header(gone[1])) is None
    assert references.bytes == 400


@given(
    st.lists(st.tuples(st.sampled_from(["b1", "b2", "b3"]), st.integers(0, 40), st.booleans()), max_size=200),
    st.sampled_from([0, 250, 2000]),
)
def test_any_order_gives_the_kept_symbols_or_none_within_the_memory(steps: list[tuple[str, int, bool]], size: int):
    references, last = References(max_bytes=size), {}
    for value, (board, number, is_new) in enumerate(steps):
        if is_new:
            last[board, number] = value % 100
            references.keep(board, request_id(number), header(), frame(value % 100))
        elif (found := references.find(board, header(number))) is not None:
            assert (found == last[board, number]).all()
        kept = [kept for frames in references._boards.values() for kept in frames.values()]
        assert references.bytes == sum(each.symbols.nbytes for each in kept) <= size
        assert all(frames for frames in references._boards.values())
