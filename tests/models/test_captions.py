import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import AiflowError
from models.captions import MAX_CAPTION_CHARACTERS, captioned_as, captions_of, read_captions, words_of

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
        ("", "header line names None, wanted image, caption and perhaps split"),
        ("a.jpg\tA dog\n", "wanted image, caption"),
        (HEADER + "dev\ta.jpg\n", "line 2: want all columns"),
        ("caption\tsplit\timage\nA dog\n", "line 2: want all columns"),
        (HEADER + f"dev\ta.jpg\t{'x' * (MAX_CAPTION_CHARACTERS + 1)}\n", "line 2: .* at most 2000 letters"),
        (HEADER + f"dev\ta.jpg\t{'x' * 200_000}\n", "field larger than field limit"),
        (HEADER + "dev\ta.jpg\tA dog\ntrain\ta.jpg\tA dog\n", "line 3: a.jpg is in split train and in dev"),
        (HEADER.encode() + b"dev\ta.jpg\t\xff\n", "name a tab-separated UTF-8 file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_the_place_named(tmp_path, text, found):
    with pytest.raises(AiflowError, match=rf"captions\.tsv.*{found}"):
        read(tmp_path, text)


def test_without_splits_no_column_is_needed(tmp_path):
    assert read(tmp_path, "image\tcaption\na.jpg\tA dog\n") == {"a.jpg": ("", ["A dog"])}


def test_the_captions_of_a_split_are_taken_or_all(tmp_path):
    read(tmp_path, HEADER + "dev\ta.jpg\tA dog\ntrain\tb.jpg\tA cat\n")
    assert captions_of(tmp_path / "captions.tsv", "dev") == {"a.jpg": ["A dog"]}
    assert captions_of(tmp_path / "captions.tsv") == {"a.jpg": ["A dog"], "b.jpg": ["A cat"]}
    with pytest.raises(AiflowError, match="no photo is in split test: want one of dev, train"):
        captions_of(tmp_path / "captions.tsv", "test")


def test_a_photo_is_known_by_its_path_first_and_else_by_its_file_s_name():
    captions = {"sub/b.jpg": [], "b.jpg": [], "c.jpg": []}
    assert captioned_as(captions, "sub/b.jpg") == "sub/b.jpg"
    assert captioned_as(captions, "other/b.jpg") == "b.jpg"
    assert captioned_as(captions, "other/d.jpg") is None


def test_the_same_letters_in_another_spelling_are_the_same_name(tmp_path):
    composed, apart = "caf\u00e9.jpg", "cafe\u0301.jpg"
    for written, met in ((composed, apart), (apart, composed)):
        read(tmp_path, f"image\tcaption\n{written}\tA dog\n")
        assert captioned_as(captions_of(tmp_path / "captions.tsv"), met) == composed


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AiflowError, match=r"absent\.tsv.*name a tab-separated UTF-8 file"):
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
