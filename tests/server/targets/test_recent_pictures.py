"""The last pictures of each camera: in order, bounded, and never another camera's."""

from hypothesis import given
from hypothesis import strategies as st

from server.prompts import MAX_FRAMES
from server.targets.recent_pictures import ENTRY_BYTES, MAX_AGE_S, MAX_CAMERAS, RecentPictures

START_MS = 1_700_000_000_000


def request_id(seconds: float) -> bytes:
    return ((START_MS + int(1e3 * seconds)) << 16 | 99).to_bytes(8, "big")


def add(recent: RecentPictures, seconds: float, board: str = "b1", camera: str = "door", frames: int = 3) -> list[str]:
    """Adds a picture that says when it was taken. Returns what the earlier ones say."""
    earlier = recent.add(
        board, camera, request_id(seconds), f"{board} {camera} {seconds}".encode(), "image/jpeg", frames
    )
    assert all(abs(float(each.picture.split()[-1]) + each.seconds - seconds) < 2e-3 for each in earlier)
    return [each.picture.decode() for each in earlier]


def test_a_question_gets_the_last_pictures_of_its_camera_the_oldest_first() -> None:
    recent = RecentPictures()
    assert add(recent, 0.0) == []
    assert add(recent, 1.0) == ["b1 door 0.0"]
    assert add(recent, 2.5) == ["b1 door 0.0", "b1 door 1.0"]
    assert add(recent, 4.0) == ["b1 door 1.0", "b1 door 2.5"]
    assert add(recent, 5.0, camera="yard") == []
    assert add(recent, 5.0, board="b2") == []
    assert add(recent, 6.0, frames=1) == []
    assert add(recent, 7.0, frames=2) == ["b1 door 6.0"]


def test_the_order_is_that_of_the_frames_and_a_repeat_gets_the_same() -> None:
    recent = RecentPictures()
    add(recent, 0.0)
    add(recent, 3.0)
    assert add(recent, 2.0) == ["b1 door 0.0"]  # it arrived late
    assert add(recent, 4.0) == ["b1 door 2.0", "b1 door 3.0"]
    assert add(recent, 2.0) == ["b1 door 0.0"]


def test_an_old_picture_shows_another_scene() -> None:
    recent = RecentPictures()
    add(recent, 0.0)
    add(recent, 1.0)
    assert add(recent, MAX_AGE_S + 0.5) == ["b1 door 1.0"]


def test_the_board_that_is_idle_for_longest_loses_its_pictures_first() -> None:
    recent = RecentPictures(max_bytes=4 * (ENTRY_BYTES + 20))
    for board in ("b1", "b2", "b3"):
        add(recent, 0.0, board)
    add(recent, 1.0, "b1")
    add(recent, 0.0, "b4")  # b2 has to go
    assert add(recent, 2.0, "b3") == ["b3 door 0.0"]
    assert add(recent, 2.0, "b2") == []


def test_a_board_that_floods_loses_its_own_pictures() -> None:
    recent = RecentPictures(max_board_bytes=3 * (ENTRY_BYTES + 20))
    add(recent, 0.0, "quiet")
    for number in range(50):
        add(recent, float(number), "loud", f"c{number % 25}")
    assert add(recent, 1.0, "quiet") == ["quiet door 0.0"]
    assert recent.size <= (3 + 2) * (ENTRY_BYTES + 20)


@given(
    st.lists(
        st.tuples(st.floats(0, 2000), st.sampled_from("ab"), st.integers(0, 40), st.integers(1, MAX_FRAMES)),
        max_size=60,
    )
)
def test_whatever_comes_it_is_bounded_and_in_order(added: list[tuple[float, str, int, int]]) -> None:
    limit, of_board = 20 * ENTRY_BYTES, 9 * ENTRY_BYTES
    recent = RecentPictures(limit, of_board)
    for seconds, board, camera, frames in added:
        earlier = recent.add(board, str(camera), request_id(seconds), b"x" * 100, "image/webp", frames)
        assert len(earlier) < frames
        ages = [each.seconds for each in earlier]
        assert ages == sorted(ages, reverse=True)
        assert all(0 <= age <= MAX_AGE_S for age in ages)
        assert recent.size <= limit
        assert all(len(cameras) <= MAX_CAMERAS for cameras in recent._boards.values())
