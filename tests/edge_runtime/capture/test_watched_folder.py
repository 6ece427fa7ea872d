"""A folder that gets pictures: each new file once, complete, in order; with everything else that lands in a folder."""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_runtime.capture import Cameras, Counters, Frame, readers, watched_folder
from edge_runtime.capture.frame import CameraError
from edge_runtime.capture.watched_folder import WatchedFolder
from edge_runtime.config import CameraConfig
from tests.edge_runtime.capture.helpers import in_background, jpeg, shade_of
from tests.listener import PATIENCE_S, until

Watch = Callable[..., "queue.Queue[Frame]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watched_folder, "POLL_S", 0.02)
    monkeypatch.setattr(watched_folder, "MAX_PAUSE_S", 0.1)
    monkeypatch.setattr(watched_folder, "STABLE_S", 0.1)
    (tmp_path / "cam").mkdir()
    return tmp_path / "cam"


class Watching:
    """A folder that is watched. `listed` waits until it has been listed once more."""

    def __init__(self, folder: Path, stop: threading.Event, state: Path | None = None, **settings: object) -> None:
        self.counters, self._listings = Counters(), threading.Semaphore(0)
        watched = WatchedFolder(CameraConfig("door", f"watch:{folder}", **settings), self.counters, state=state)
        list_files = watched._files

        def counted() -> Iterator[tuple[str, os.stat_result]]:
            yield from list_files()
            self._listings.release()

        watched._files = counted  # type: ignore[method-assign]
        self.taken = in_background(watched.frames(stop))
        self.listed()

    def listed(self) -> None:
        while self._listings.acquire(blocking=False):
            pass
        assert self._listings.acquire(timeout=PATIENCE_S)
        assert self._listings.acquire(timeout=PATIENCE_S)  # the first one may have begun before

    def next(self) -> tuple[str, int]:
        frame = self.taken.get(timeout=PATIENCE_S)
        return frame.name, shade_of(frame)


def test_the_home_of_a_user_who_is_not_here_is_a_folder_that_does_not_exist_yet():
    (warning,) = Cameras([CameraConfig("door", "watch:~nobody-has-this-name/cam")]).check()
    assert warning == "camera door: ~nobody-has-this-name/cam does not exist yet"


def test_new_pictures_come_once_and_those_that_were_there_do_not(folder, stop):
    (folder / "old.jpg").write_bytes(jpeg(10))
    watching = Watching(folder, stop)
    (folder / "a.jpg").write_bytes(jpeg(50))
    assert watching.next() == ("a.jpg", 50)
    (folder / "b.jpg").write_bytes(jpeg(100))
    assert watching.next() == ("b.jpg", 100)
    watching.listed()
    assert watching.taken.empty()


def test_a_folder_without_a_new_picture_says_once_what_it_waits_for(folder, stop, caplog):
    caplog.set_level("INFO")
    (folder / "old.jpg").write_bytes(jpeg(10))
    cameras = Cameras([CameraConfig("door", f"watch:{folder}")])
    taken = in_background(cameras.frames(stop))
    until(lambda: cameras.states()["door"].state == "waiting")
    (folder / "new.jpg").write_bytes(jpeg(50))
    assert taken.get(timeout=PATIENCE_S).name == "new.jpg"
    assert cameras.states()["door"].state == "live"
    assert caplog.text.count(f"camera waiting camera=door reason={folder} has no new picture (old ones: 1)") == 1


def test_pictures_that_were_there_come_if_they_are_asked_for(folder, stop):
    (folder / "old.jpg").write_bytes(jpeg(10))
    assert Watching(folder, stop, existing=True).next() == ("old.jpg", 10)


def test_pictures_that_were_there_and_are_not_answered_are_counted_and_logged(folder, stop, caplog):
    caplog.set_level("INFO")
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(jpeg(10))
    assert Watching(folder, stop).counters.skipped == 2
    assert caplog.text.count("pictures that were there before are not answered camera=door count=2") == 1


# ---- over a restart ----


def names_of_a_board(config: CameraConfig, state: Path, last: str) -> list[str]:
    """Of the pictures that a board with this camera handles from its start to its end, after the last one."""
    stop, names = threading.Event(), list[str]()
    for frame in Cameras([config], state_folder=state).frames(stop):
        names.append(frame.name)
        if frame.name == last:
            stop.set()
    return names


def test_pictures_that_come_while_the_board_is_away_are_read_once_whatever_their_times_are(folder, tmp_path):
    config, state = CameraConfig("door", f"watch:{folder}"), tmp_path / "state"
    (folder / "old.jpg").write_bytes(jpeg(10))
    stop = threading.Event()
    cameras = Cameras([config], state_folder=state)
    taken = in_background(cameras.frames(stop))
    until(lambda: cameras.states()["door"].state == "waiting")  # it has been listed
    (folder / "a.jpg").write_bytes(jpeg(50))
    assert taken.get(timeout=PATIENCE_S).name == "a.jpg"
    stop.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "source-door"])
    (folder / "b.jpg").write_bytes(jpeg(100))
    os.utime(folder / "b.jpg", (1000, 1000))  # as an upload may that keeps the time of its file
    (folder / "old.jpg").write_bytes(jpeg(150))
    assert names_of_a_board(config, state, "old.jpg") == ["b.jpg", "old.jpg"]
    (folder / "c.jpg").write_bytes(jpeg(200))
    assert names_of_a_board(config, state, "c.jpg") == ["c.jpg"]


def test_existing_pictures_are_answered_once_and_not_at_each_start(folder, tmp_path):
    config = CameraConfig("door", f"watch:{folder}", existing=True)
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(jpeg(50))
    assert names_of_a_board(config, tmp_path / "state", "b.jpg") == ["a.jpg", "b.jpg"]
    (folder / "c.jpg").write_bytes(jpeg(100))
    assert names_of_a_board(config, tmp_path / "state", "c.jpg") == ["c.jpg"]


def test_a_picture_that_ends_the_board_is_tried_once_more_and_not_at_each_start(folder, stop, tmp_path):
    config, state = CameraConfig("door", f"watch:{folder}", existing=True), tmp_path / "state"
    (folder / "a.jpg").write_bytes(jpeg(50))
    for _ in range(2):
        frames = WatchedFolder(config, Counters(), state=state).frames(stop)
        assert next(frames).name == "a.jpg"
        frames.close()  # as if the board had been killed: nobody says that it has been handled
    (folder / "b.jpg").write_bytes(jpeg(100))
    assert next(WatchedFolder(config, Counters(), state=state).frames(stop)).name == "b.jpg"


def test_another_folder_is_a_new_one_also_for_a_camera_of_the_same_name(folder, stop, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/old.jpg").write_bytes(jpeg(10))
    for place in (folder, tmp_path / "other"):
        watching = Watching(place, stop, state=tmp_path / "state")
    (tmp_path / "other/new.jpg").write_bytes(jpeg(50))
    assert watching.next() == ("new.jpg", 50)


def test_a_state_folder_that_cannot_be_written_is_told_once_and_pictures_are_answered(folder, stop, tmp_path, caplog):
    (tmp_path / "state").touch()
    watching = Watching(folder, stop, state=tmp_path / "state")
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(jpeg(50))
        assert watching.next() == (name, 50)
    assert caplog.text.count("which pictures have been read is not kept") == 1


# ---- what else lands in a folder ----


def test_pictures_that_are_found_together_come_in_the_order_of_their_times_and_names(folder, stop):
    for name, shade, time_s in (("a", 10, 2000), ("c", 50, 1000), ("b", 100, 1000), ("d", 150, 500)):
        (folder / f"{name}.jpg").write_bytes(jpeg(shade))
        os.utime(folder / f"{name}.jpg", (time_s, time_s))
    watching = Watching(folder, stop, existing=True)
    frames = [watching.taken.get(timeout=PATIENCE_S) for _ in range(4)]
    assert [frame.name for frame in frames] == ["d.jpg", "b.jpg", "c.jpg", "a.jpg"]
    assert [frame.captured_unix for frame in frames] == [500, 1000, 1000, 2000]


def test_a_picture_that_is_being_written_is_waited_for(folder, stop, monkeypatch):
    now = [time.monotonic()]
    monkeypatch.setattr(watched_folder, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    watching, data = Watching(folder, stop), jpeg(50)
    with (folder / "slow.jpg").open("wb", buffering=0) as file:
        for at in range(0, len(data), 100):
            file.write(data[at : at + 100])
            watching.listed()
            now[0] += 0.6 * watched_folder.STABLE_S  # two of these are more than a file may rest
    watching.listed()
    now[0] += watched_folder.STABLE_S
    assert watching.next() == ("slow.jpg", 50)
    assert watching.counters.unreadable == 0


def test_an_upload_that_pauses_for_long_is_read_again_when_it_is_complete(folder, stop):
    watching, data = Watching(folder, stop), jpeg(50)
    with (folder / "slow.jpg").open("wb", buffering=0) as file:
        file.write(data[:300])
        until(lambda: watching.counters.unreadable == 1)
        file.write(data[300:])
    assert watching.next() == ("slow.jpg", 50)


def test_a_picture_that_is_renamed_to_its_name_and_one_that_is_overwritten_are_new(folder, stop):
    watching = Watching(folder, stop)
    (folder / ".a.jpg.part").write_bytes(jpeg(50))
    watching.listed()
    (folder / ".a.jpg.part").rename(folder / "a.jpg")
    assert watching.next() == ("a.jpg", 50)
    (folder / "a.jpg").write_bytes(jpeg(100))
    assert watching.next() == ("a.jpg", 100)


def test_hidden_and_foreign_files_are_ignored(folder, stop):
    watching = Watching(folder, stop)
    for name in (".hidden.jpg", "notes.txt", "a.jpg.tmp", "video.mp4", "jpg"):
        (folder / name).write_bytes(jpeg(10))
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "good.PNG").write_bytes(jpeg(50))
    assert watching.next() == ("good.PNG", 50)
    assert (watching.taken.empty(), watching.counters.unreadable) == (True, 0)


def test_a_huge_file_is_refused_by_name_once_however_it_grows(folder, stop, caplog):
    watching = Watching(folder, stop)
    with (folder / "huge.jpg").open("wb") as file:
        for size in (10 << 30, 11 << 30):
            file.truncate(size)
            until(lambda: watching.counters.unreadable == 1)
            watching.listed()
    (folder / "after.jpg").write_bytes(jpeg(50))
    assert watching.next() == ("after.jpg", 50)
    assert watching.counters.unreadable == 1
    assert caplog.text.count("name=huge.jpg error=it has 10737418240 bytes, at most 33554432 are read") == 1


def test_each_unreadable_file_has_a_line_until_there_are_too_many(folder, stop, caplog, monkeypatch):
    monkeypatch.setattr(watched_folder, "MAX_LINES", 6)
    monkeypatch.setattr(watched_folder, "MINUTE_S", 600.0)
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(b"no picture" + jpeg(10)[: 10 * number])
    (folder / "huge.jpg").touch()
    os.truncate(folder / "huge.jpg", 10 << 30)
    watching = Watching(folder, stop, existing=True)
    until(lambda: watching.counters.unreadable == 8)
    assert re.findall(r"count=(\d+) name=(\S+)", caplog.text) == [
        ("1", "huge.jpg"),
        *((str(number + 2), f"{number}.jpg") for number in range(5)),
    ]
    assert caplog.text.count("only counted for a minute camera=door") == 1
    monkeypatch.setattr(watched_folder, "MINUTE_S", 0.0)  # it is over
    (folder / "later.jpg").write_bytes(b"no picture")
    until(lambda: watching.counters.unreadable == 9)
    until(lambda: "count=9 name=later.jpg" in caplog.text)


def test_links_are_followed_even_in_circles_and_broken_ones_are_named_once(folder, stop, tmp_path, caplog):
    (tmp_path / "disk/today").mkdir(parents=True)
    watching = Watching(folder, stop)
    (tmp_path / "disk/today/a.jpg").write_bytes(jpeg(50))
    (tmp_path / "disk/circle").symlink_to(tmp_path / "disk")
    (folder / "disk").symlink_to(tmp_path / "disk")
    (folder / "nowhere.jpg").symlink_to(tmp_path / "missing.jpg")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    name, shade = watching.next()
    assert (name.endswith("today/a.jpg"), shade) == (True, 50)
    watching.listed()
    assert watching.taken.empty()
    for name in ("nowhere.jpg", "self.jpg"):
        assert caplog.text.count(f"name={name} error=the link cannot be followed") == 1
    assert watching.counters.unreadable == 2


def test_folders_in_folders_are_watched_to_a_depth(folder, stop, caplog, monkeypatch):
    monkeypatch.setattr(watched_folder, "MAX_DEPTH", 2)
    watching = Watching(folder, stop)
    (folder / "2026/11/29").mkdir(parents=True)
    (folder / "2026/11/29/deep.jpg").write_bytes(jpeg(10))
    (folder / "2026/11/a.jpg").write_bytes(jpeg(50))
    assert watching.next() == ("2026/11/a.jpg", 50)
    watching.listed()
    assert caplog.text.count("name=2026/11/29 error=it is more than 2 folders deep") == 1


def test_too_many_files_are_an_error_that_says_how_to_delete_them(folder, stop, monkeypatch):
    monkeypatch.setattr(watched_folder, "MAX_ENTRIES", 3)
    for number in range(4):
        (folder / f"{number}.jpg").touch()
    with pytest.raises(CameraError, match=r"more than 3 files: delete old ones.*-delete"):
        next(WatchedFolder(CameraConfig("door", f"watch:{folder}"), Counters()).frames(stop))


def test_a_folder_that_goes_and_comes_back_gives_only_what_is_new(folder, stop, no_pause):
    """A lost mount: what it held before was read before."""
    cameras = Cameras([CameraConfig("door", f"watch:{folder}", existing=True)])
    (folder / "a.jpg").write_bytes(jpeg(50))
    taken = in_background(cameras.frames(stop))
    assert taken.get(timeout=PATIENCE_S).name == "a.jpg"
    folder.rename(folder.parent / "unmounted")
    until(lambda: cameras.states()["door"].state in ("stalled", "lost"))
    assert "cannot be listed: No such file" in cameras.states()["door"].why
    (folder.parent / "unmounted").rename(folder)
    until(lambda: cameras.states()["door"].state == "waiting")
    (folder / "b.jpg").write_bytes(jpeg(100))
    assert taken.get(timeout=PATIENCE_S).name == "b.jpg"
    assert taken.empty()


# ---- a drive that does not answer ----


class Drive:
    """Its calls block while it is away, as those of a network drive whose server is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
        self.is_there = threading.Event()
        self.is_there.set()

        def slow(call: Callable[..., object]) -> Callable[..., object]:
            def answer(path: object, *args: object, **settings: object) -> object:
                if isinstance(path, str | Path) and Path(path) in folders:
                    self.is_there.wait()
                return call(path, *args, **settings)

            return answer

        for name in ("scandir", "stat", "open"):
            monkeypatch.setattr(os, name, slow(getattr(os, name)))
        monkeypatch.setattr(Path, "stat", slow(Path.stat))  # in Python 3.10, it does not look for `stat` in `os`


@pytest.mark.parametrize("blocked", ["cam", "cam/b.jpg"])
def test_a_drive_that_does_not_answer_is_a_stall_until_it_answers_and_the_other_cameras_go_on(
    folder, stop, tmp_path, monkeypatch, caplog, blocked
):
    drive = Drive(monkeypatch, tmp_path / blocked)
    (tmp_path / "here").mkdir()
    cameras = Cameras([CameraConfig(name, f"watch:{tmp_path}/{name}", stall_s=1) for name in ("cam", "here")])
    taken = in_background(cameras.frames(stop))
    until(lambda: [state.state for state in cameras.states().values()] == ["waiting", "waiting"])
    (folder / "a.jpg").write_bytes(jpeg(50))
    assert taken.get(timeout=PATIENCE_S).name == "a.jpg"
    drive.is_there.clear()
    (folder / "b.jpg").write_bytes(jpeg(100))
    until(lambda: cameras.states()["cam"].state == "stalled")
    assert cameras.states()["cam"].why.startswith(f"{folder} has not answered for 1 s: is its drive")
    (tmp_path / "here/c.jpg").write_bytes(jpeg(150))
    assert taken.get(timeout=PATIENCE_S).name == "c.jpg"
    drive.is_there.set()
    assert taken.get(timeout=PATIENCE_S).name == "b.jpg"
    assert cameras.states()["cam"].state == "live"
    assert caplog.text.count("camera stalled camera=cam") == 1


def test_a_board_starts_and_ends_while_a_drive_does_not_answer(folder, stop, monkeypatch):
    drive = Drive(monkeypatch, folder)
    drive.is_there.clear()
    monkeypatch.setattr(readers, "ANSWER_S", 0.1)
    monkeypatch.setattr("edge_runtime.capture.cameras.CLOSE_S", 0.1)
    cameras = Cameras([CameraConfig("door", f"watch:{folder}", stall_s=1)])
    (warning,) = cameras.check()
    assert warning.startswith(f"camera door: {folder} cannot be read: it has not answered for 0.1 s: is its drive")
    ended = threading.Event()

    def run() -> None:
        list(cameras.frames(stop))
        ended.set()

    threading.Thread(target=run).start()
    until(lambda: cameras.states()["door"].state == "stalled")
    stop.set()
    assert ended.wait(PATIENCE_S)
    drive.is_there.set()


def test_names_that_are_no_text_reach_neither_log_nor_fail(folder, stop, caplog):
    watching = Watching(folder, stop)
    with open(os.fsencode(folder) + b"/\xff\x1b[2J.jpg", "wb") as file:
        file.write(b"no picture")
    until(lambda: watching.counters.unreadable == 1)
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(("make", "error"), [(Path.touch, True), (Path.mkdir, False), (lambda _: None, False)])
def test_a_folder_that_is_none_is_found_before_the_start(tmp_path, make, error):
    make(tmp_path / "cam")
    cameras = Cameras([CameraConfig("door", f"watch:{tmp_path}/cam")])
    if error:
        with pytest.raises(ValueError, match="is not a folder"):
            cameras.check()
    else:
        assert len(cameras.check()) == (0 if make is Path.mkdir else 1)
