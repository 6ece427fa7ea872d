"""The texts of the last days: what a search finds, and what happens if the file is full, foreign or damaged."""

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from firmware_tools.ui import history as history_module
from firmware_tools.ui.history import FOUND, MAX_QUERY, History, SearchError
from firmware_tools.ui.site import Answer
from tests.listener import until

NOW = 1_800_000_000.0

DAY_S = 86_400


def answer(number: int, text: str = "a dog runs", label: str = "", board: str = "porch", at: float = NOW) -> Answer:
    return Answer(at, board, "front", f"{number:016x}", text, label)


def texts(history: History, *what: str) -> list[str]:
    return [found.text for found in history.search(*what)]


@pytest.fixture
def history(tmp_path: Path):
    with History(tmp_path / "history") as history:
        yield history


def test_all_words_are_found_as_beginnings_whatever_their_case_and_accents(history: History):
    history.add([answer(1, "Two dogs in a café"), answer(2, "a cat"), answer(3, "a dog")], NOW)
    assert texts(history, "DOG") == ["a dog", "Two dogs in a café"]
    assert texts(history, "dog cafe") == ["Two dogs in a café"]
    assert texts(history, "dog horse") == []


def test_a_label_and_a_board_narrow_the_search(history: History):
    history.add(
        [answer(1, "a dog", "Irish setter"), answer(2, "a dog", "beagle", "garage"), answer(3, "a setter")], NOW
    )
    assert [found.label for found in history.search("dog", "setter")] == ["Irish setter"]
    assert [found.id for found in history.search("", "setter")] == [1]
    assert [found.board for found in history.search("dog", "", "garage")] == ["garage"]


def test_the_newest_come_first_and_the_older_ones_on_request(history: History):
    history.add([answer(number, f"dog {number}") for number in range(2 * FOUND)], NOW)
    first = history.search("dog")
    older = history.search("dog", before=first[-1].id)
    assert [found.text for found in first + older] == [f"dog {number}" for number in reversed(range(2 * FOUND))]


def test_without_a_word_the_newest_are_found(history: History):
    history.add([answer(1, "a dog"), answer(2, "a cat", board="garage")], NOW)
    assert texts(history, "") == texts(history, " ?! ") == ["a cat", "a dog"]
    assert texts(history, "", "", "porch") == ["a dog"]


def test_a_frame_is_kept_once(history: History):
    history.add([answer(1), answer(1)], NOW)
    history.add([answer(1, at=NOW + 60)], NOW)
    assert [found.at for found in history.search("dog")] == [NOW]


def test_texts_are_found_again_after_a_restart_and_the_file_is_its_owners_alone(tmp_path: Path):
    file = tmp_path / "history"
    for number in range(2):
        with History(file) as history:
            history.put(answer(number))
    with History(file) as history:
        assert len(history.search("dog")) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_old_texts_are_forgotten(tmp_path: Path):
    with History(tmp_path / "history", keep_days=7) as history:
        history.add([answer(1, "an old dog", at=NOW - 8 * DAY_S), answer(2, "a dog", at=NOW - 6 * DAY_S)], NOW)
        assert texts(history, "dog") == ["a dog"]


def test_a_full_file_forgets_the_older_texts_and_keeps_its_bound(tmp_path: Path):
    file, bound = tmp_path / "history", 256 << 10
    with History(file, max_bytes=bound) as history:
        for first in range(0, 1000, 50):  # about four times what fits
            numbers = range(first, first + 50)
            words = {n: " ".join(f"w{n * 7919 + i:x}" for i in range(80)) for n in numbers}
            history.add([answer(n, f"dog number{n} {words[n]}") for n in numbers], NOW)
            assert texts(history, f"number{numbers[-1]}")
        assert file.stat().st_size <= bound
        assert not texts(history, "number0")
        assert history.problem == ""


def test_a_disk_that_has_no_room_to_forget_either_is_survived(monkeypatch: pytest.MonkeyPatch):
    def fill(first: int) -> None:
        for number in range(first, first + 1000, 50):  # more than fits
            history.add([answer(n, f"number{n} " + 20 * "a dog runs ") for n in range(number, number + 50)], NOW)

    with History(None, max_bytes=256 << 10) as history:
        with monkeypatch.context() as full:
            full.setattr(history_module, "OLDEST_HALF", "DELETE FROM answers WHERE there_is_room")
            with pytest.raises(sqlite3.Error):
                fill(0)
        fill(1000)
        assert texts(history, "number1999")
        assert not texts(history, "number0")


@given(st.text(max_size=300), st.text(max_size=100))
def test_any_words_are_searched_or_refused_by_name(words: str, label: str):
    refused = ""
    with History(None) as history:
        try:
            history.search(words, label)
        except SearchError as error:
            refused = str(error)
    assert not refused or f"want at most {MAX_QUERY}" in refused


@pytest.mark.parametrize("words", ['dog" OR "cat', "text : dog", "dog*", "NEAR(dog cat)", "-dog", "dog\0"])
def test_no_character_of_a_search_has_a_meaning(history: History, words: str):
    history.add([answer(1, "a cat")], NOW)
    assert texts(history, words) == []


def test_a_file_of_another_program_is_refused_and_left_alone(tmp_path: Path):
    foreign, text = tmp_path / "foreign", tmp_path / "text"
    with closing(sqlite3.connect(foreign)) as database:
        database.execute("CREATE TABLE states(id)")
    text.write_text("no database at all, and long enough to be read as one" * 100)
    before = foreign.read_bytes(), text.read_bytes()
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere: create it"):
        History(tmp_path / "nowhere" / "history")
    for file in (foreign, text, tmp_path):
        with pytest.raises(ConfigError, match="name a file that this command has written"):
            History(file)
    assert (foreign.read_bytes(), text.read_bytes()) == before


def test_a_file_that_cannot_be_written_any_more_is_reported_and_the_page_goes_on(tmp_path: Path):
    with History(tmp_path / "history") as history:
        history._database.execute("DROP TABLE answers")
        history.put(answer(1))
        until(lambda: "answers" in history.problem)
        with pytest.raises(SearchError, match="the search failed"):
            history.search("dog")
