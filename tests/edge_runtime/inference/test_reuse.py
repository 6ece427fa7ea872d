"""Whether an earlier answer holds for a new frame."""

from datetime import datetime, timezone

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.inference.head import SHIFT, Latent
from edge_runtime.inference.reuse import ASKED, ReusableAnswers, distance
from edge_runtime.wire import Event, Options, Tier
from edge_runtime.wire.event import AnsweredBy

STEP = np.full((1, 1, 1), 1 << SHIFT - 4, np.int32)  # a code is a sixteenth of a symbol
ANY = Options()


def latent(code: int = 100, **places: int) -> Latent:
    codes = np.full((64, 7, 7), code, np.uint8)
    for place, value in places.items():
        codes[:, int(place[1]), int(place[2])] = value
    return Latent(codes, 128, (STEP,))


def answer(frame: str, final: bool = True, camera: str = "door", **fields: object) -> Event:
    captured = datetime.now(timezone.utc)
    values = {"answered_by": AnsweredBy("edge", "s1"), "text": f"answer to {frame}"} | fields
    return Event(type="update", frame=frame, camera=camera, captured=captured, final=final, **values)


def find(
    answers: ReusableAnswers, found: Latent, at: float = 1.0, options: Options = ANY, camera: str = "door"
) -> str | None:
    """The text of the answer that holds."""
    holds = answers.find(camera, found, options, at, 0.15, 60.0)
    return holds[0].text if holds else None


def test_the_distance_is_that_of_the_place_that_differs_most():
    assert distance(latent(), latent()) == 0
    assert distance(latent(100), latent(101)) == distance(latent(101), latent(100)) == 1 / 16
    assert distance(latent(), latent(p34=120)) == 20 / 16
    assert distance(latent(0), latent(255)) == 255 / 16


def test_codes_of_both_kinds_and_factors_of_channels_count():
    factors = np.arange(1, 65, dtype=np.int32)[:, None, None] << SHIFT - 8
    one, other = (Latent(np.full((64, 7, 7), code, np.int8), 0, (factors,)) for code in (-128, 127))
    assert distance(one, other) == 255 * 32.5 / 256


def test_only_an_answered_frame_lends_its_answer():
    answers = ReusableAnswers()
    assert find(answers, latent()) is None
    answers.asked("f1", latent(), 0.0, ANY)
    assert find(answers, latent()) is None
    answers.published(answer("f1", final=False))
    answers.published(answer("f2"))  # nobody asked
    answers.published(Event(type="lost", frame="f1", camera="door", captured=datetime.now(timezone.utc), final=True))
    assert find(answers, latent()) is None
    answers.published(answer("f1"))
    assert find(answers, latent(101)) == "answer to f1"
    assert find(answers, latent(103)) is None


def test_an_answer_holds_for_its_camera_its_question_and_its_time_only():
    answers = ReusableAnswers()
    answers.asked("f1", latent(), 0.0, ANY)
    answers.published(answer("f1"))
    assert find(answers, latent(), at=60.0) == "answer to f1"
    assert find(answers, latent(), at=60.1) is None
    assert find(answers, latent(), camera="yard") is None
    for options in (Options(tier=Tier.CLOUD), Options(questions=("door",)), Options(prompt="door")):
        assert find(answers, latent(), options=options) is None


def test_an_answer_that_comes_late_does_not_replace_that_of_a_newer_frame():
    answers = ReusableAnswers()
    for frame, code in (("f1", 50), ("f2", 100)):
        answers.asked(frame, latent(code), 0.0, ANY)
    answers.published(answer("f2"))
    answers.published(answer("f1"))
    assert find(answers, latent(50)) is None
    assert find(answers, latent(100)) == "answer to f2"


def test_a_scene_that_changes_slowly_cannot_drift_away_from_its_answer():
    answers = ReusableAnswers()
    answers.asked("f1", latent(100), 0.0, ANY)
    answers.published(answer("f1"))
    reused = [find(answers, latent(100 + drift)) is not None for drift in range(6)]
    assert reused == [True, True, True, False, False, False]


@given(st.lists(st.tuples(st.sampled_from(["ask", "answer", "find"]), st.integers(0, 200), st.integers(0, 3))))
def test_any_order_reuses_the_answer_to_a_near_frame_only_and_memory_is_bounded(steps: list[tuple[str, int, int]]):
    answers, codes = ReusableAnswers(), {}
    for number, (what, code, ago) in enumerate(steps):
        frame = f"{number:05d}"
        if what == "ask":
            codes[frame] = code
            answers.asked(frame, latent(code), number, ANY)
        elif what == "answer" and codes:
            answers.published(answer(list(codes)[-1 - ago % len(codes)]))
        elif holds := answers.find("door", latent(code), ANY, number, 0.15, 10.0):
            event, found = holds
            assert found == abs(codes[event.frame] - code) / 16 <= 0.15
            assert number - int(event.frame) <= 10
        assert len(answers._asked) <= ASKED
        assert len(answers._answered) <= 1


def test_frames_without_an_answer_are_forgotten():
    answers = ReusableAnswers()
    for number in range(ASKED + 1):
        answers.asked(f"{number:03d}", latent(), 0.0, ANY)
    answers.published(answer("000"))
    assert find(answers, latent()) is None
    answers.published(answer("001"))
    assert find(answers, latent()) == "answer to 001"
