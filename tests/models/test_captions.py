import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.captions import MAX_CAPTION_CHARACTERS, CaptionsError, read_captions, words_of

HEADER = "split\timage\tcaption\n"


def read(folder, text):
    path = folder / "captions.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_captions(path)


def test_captions_are_gathered_by_photo(tmp_path):
    text = HEADER + "dev\ta.jpg\tA dog .\ndev\tb.jpg\tA cat\ndev\ta.jpg\tA brown dog\n"
    assert read(tmp_path, text) == {"a.jpg": ("dev", ["A dog .", "A brown dog"]), "b.jpg": ("dev", ["A cat"])}


def test_the_header_says_the_order_and_further_columns_do_no_harm(tmp_path):
    text = "caption\tid\timage\tsplit\nA dog\t7\ta.jpg\ttrain\n"
    assert read(tmp_path, text) == {"a.jpg": ("train", ["A dog"])}


def test_quotes_are_letters_and_windows_files_are_read(tmp_path):
    text = "\ufeff" + HEADER.replace("\n", "\r\n") + 'dev\ta.jpg\t"Hi", he says\r\n'
    assert read(tmp_path, text) == {"a.jpg": ("dev", ['"Hi", he says'])}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "header line names None, wanted split, image, caption"),
        ("a.jpg\tA dog\n", "wanted split, image, caption"),
        (HEADER + "dev\ta.jpg\n", "line 2: want three columns"),
        ("caption\tsplit\timage\nA dog\n", "line 2: want three columns"),
        (HEADER + f"dev\ta.jpg\t{'x' * (MAX_CAPTION_CHARACTERS + 1)}\n", "line 2: .* at most 2000 letters"),
        (HEADER + f"dev\ta.jpg\t{'x' * 200_000}\n", "field larger than field limit"),
        (HEADER + "dev\ta.jpg\tA dog\ntrain\ta.jpg\tA dog\n", "line 3: a.jpg is in split train and in dev"),
        (HEADER.encode() + b"dev\ta.jpg\t\xff\n", "name a tab-separated UTF-8 file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_the_place_named(tmp_path, text, found):
    with pytest.raises(CaptionsError, match=rf"captions\.tsv.*{found}"):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CaptionsError, match=r"absent\.tsv.*name a tab-separated UTF-8 file"):
        read_captions(tmp_path / "absent.tsv")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog, running!", ["a", "dog", "running"]),
        ("Two T-shirts .", ["two", "t", "shirts"]),
        ("  ", []),
        ("It's 9 o'clock", ["it", "s", "9", "o", "clock"]),
    ],
)
def test_words_are_lower_case_without_punctuation(caption, words):
    assert words_of(caption) == words


@given(st.text())
def test_words_of_words_are_the_same_words(caption):
    words = words_of(caption)
    assert words_of(" ".join(words)) == words
    assert all(re.fullmatch("[a-z0-9]+", word) for word in words)
