"""What is kept of the files that a watched folder had: bounded, and of use after a power cut."""

import errno
from pathlib import Path

import pytest

from edge_runtime.capture import seen_files
from edge_runtime.capture.seen_files import ENTRY_BYTES, SeenFiles

A, B = ("/cam/a.jpg", (10, 1000)), ("/cam/b.jpg", (20, 2000))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/door"


def test_a_version_is_done_when_it_has_been_handled_and_another_version_is_not(path):
    seen = SeenFiles(path)
    assert not seen.is_known
    seen.rewrite([A])
    seen.add(*B)
    again = SeenFiles(path)
    assert again.is_known
    assert [again.done_before(*each) for each in (A, B, (A[0], (10, 1001)))] == [True, False, False]
    again.add(*B)
    assert SeenFiles(path).done_before(*B)


def test_a_folder_that_was_empty_is_known(path):
    SeenFiles(path).rewrite([])
    assert SeenFiles(path).is_known


def test_an_entry_that_was_cut_is_left_out_and_the_next_one_is_whole(path):
    seen = SeenFiles(path)
    seen.rewrite([A])
    with path.open("ab") as file:
        file.write(b"cut")
    again = SeenFiles(path)
    for _ in range(2):
        again.add(*B)
    last = SeenFiles(path)
    assert (last.done_before(*A), last.done_before(*B)) == (True, True)


def test_on_a_disk_that_has_become_read_only_what_was_kept_still_counts(path, monkeypatch):
    SeenFiles(path).rewrite([A])
    with path.open("ab") as file:
        file.write(b"cut")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr("os.truncate", refuse)
    assert SeenFiles(path).done_before(*A)


def test_the_file_says_when_it_is_long_and_a_larger_one_is_not_read(path, monkeypatch, caplog):
    monkeypatch.setattr(seen_files, "LONG", 3)
    monkeypatch.setattr(seen_files, "MAX_BYTES", 4 * ENTRY_BYTES)
    seen = SeenFiles(path)
    seen.rewrite([A])
    assert not seen.is_long
    seen.add(*B)
    assert seen.is_long
    assert SeenFiles(path).is_long
    seen.rewrite([B])
    assert not seen.is_long
    assert path.stat().st_size == 2 * ENTRY_BYTES
    path.write_bytes(bytes(5 * ENTRY_BYTES))
    assert not SeenFiles(path).is_known
    assert f"path={path} error=is larger than {4 * ENTRY_BYTES} bytes" in caplog.text


def test_names_that_are_no_text_are_kept(path):
    odd = "/cam/\udcff.jpg", (1, 1)
    SeenFiles(path).rewrite([odd])
    assert SeenFiles(path).done_before(*odd)
