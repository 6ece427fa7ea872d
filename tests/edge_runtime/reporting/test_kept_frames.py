"""A board keeps some frames as files: their names, their number, and faults of the disk."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime.config import KeptFramesConfig
from edge_runtime.picture_checks import decode_picture
from edge_runtime.reporting import kept_frames
from edge_runtime.reporting.kept_frames import MAX_SIDE, KeptFrames
from firmware_tools.label_page import Labels


def frame(
    second: float, grey: int = 128, camera: str = "gate", size: tuple[int, int] = (48, 64)
) -> tuple[str, np.ndarray, float]:
    """A grey picture that was captured at this time of 1970."""
    return camera, np.full((*size, 3), grey, np.uint8), second


def kept(folder: Path, every_s: float = 0.0, max_files: int = 500) -> tuple[KeptFrames, list[str]]:
    """And what it tells of its trouble."""
    told: list[str] = []
    return KeptFrames(KeptFramesConfig(str(folder), every_s, max_files), told.append), told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_named_by_its_capture_and_a_person_can_sort_it(tmp_path: Path) -> None:
    frames, told = kept(tmp_path / "frames")
    frames.keep(*frame(1.25, grey=200))
    frames.keep(*frame(2.0, camera="yard"))
    assert names(tmp_path / "frames" / "gate") == ["19700101T000001250Z.jpg"]
    assert names(tmp_path / "frames" / "yard") == ["19700101T000002000Z.jpg"]
    labels = Labels(tmp_path / "frames" / "gate", ["open", "closed"], tmp_path / "sorted")
    assert labels.show() is not None
    labels.put(labels.name, "open")
    (copy,) = (tmp_path / "sorted" / "open").iterdir()
    assert abs(int(decode_picture(copy.read_bytes()).mean()) - 200) < 3
    assert frames.counts() == {"frames_kept": {"kept": 2, "failed": 0}}
    assert told == []


def test_each_camera_has_an_interval_of_its_own(tmp_path: Path) -> None:
    frames, _ = kept(tmp_path, every_s=3600)
    for second in range(3):
        frames.keep(*frame(second))
        frames.keep(*frame(second, camera="yard"))
    assert names(tmp_path / "gate") == names(tmp_path / "yard") == ["19700101T000000000Z.jpg"]


def test_a_full_folder_loses_its_oldest_frame_also_after_a_restart_and_never_a_file_of_somebody_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "19700101.jpg").write_bytes(b"mine")
    first, _ = kept(tmp_path, max_files=3)
    for second in range(5):
        first.keep(*frame(second))
    again, _ = kept(tmp_path, max_files=3)
    again.keep(*frame(5))
    seconds = [f"19700101T00000{second}000Z.jpg" for second in (3, 4, 5)]
    assert names(tmp_path / "gate") == ["19700101.jpg", *seconds]


def test_a_large_frame_is_kept_smaller_in_its_proportions(tmp_path: Path) -> None:
    frames, _ = kept(tmp_path)
    frames.keep(*frame(0, size=(1080, 1920)))
    (file,) = (tmp_path / "gate").iterdir()
    assert cv2.imread(str(file)).shape == (MAX_SIDE * 9 // 16, MAX_SIDE, 3)


def test_a_folder_that_takes_no_file_is_told_once_and_its_end_too(tmp_path: Path) -> None:
    place = tmp_path / "frames"
    place.write_text("a file")
    frames, told = kept(place)
    frames.keep(*frame(0))
    frames.keep(*frame(1))
    assert told == [f"{place / 'gate'} takes no frames: Not a directory"]
    place.unlink()
    frames.keep(*frame(2))
    assert told[1:] == [""]
    assert names(place / "gate") == ["19700101T000002000Z.jpg"]
    assert frames.counts() == {"frames_kept": {"kept": 1, "failed": 2}}


def test_a_folder_that_somebody_removes_is_made_again(tmp_path: Path) -> None:
    frames, told = kept(tmp_path)
    frames.keep(*frame(0))
    os.rename(tmp_path / "gate", tmp_path / "moved")
    frames.keep(*frame(1))
    frames.keep(*frame(2))
    assert names(tmp_path / "gate") == ["19700101T000002000Z.jpg"]
    assert [bool(text) for text in told] == [True, False]


def test_each_camera_has_its_own_trouble_and_the_last_one_to_end_ends_it(tmp_path: Path) -> None:
    for name in ("gate", "hall"):
        (tmp_path / name).write_text("a file")
    frames, told = kept(tmp_path)
    for second in range(3):
        for camera in ("gate", "hall", "yard"):
            frames.keep(*frame(second, camera=camera))
    gate, hall = (f"{tmp_path / name} takes no frames: File exists" for name in ("gate", "hall"))
    assert told == [gate, gate]
    for name in ("gate", "hall"):
        (tmp_path / name).unlink()
        frames.keep(*frame(9, camera=name))
    assert told[2:] == [hall, ""]


def test_frames_of_one_time_are_all_kept(tmp_path: Path) -> None:
    frames, _ = kept(tmp_path)
    for _ in range(3):
        frames.keep(*frame(1.0))
    assert names(tmp_path / "gate") == [f"19700101T00000100{number}Z.jpg" for number in range(3)]


def test_a_disk_that_is_nearly_full_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_frames, "MIN_FREE", 1 << 60)
    frames, told = kept(tmp_path)
    frames.keep(*frame(0))
    assert told == [f"{tmp_path / 'gate'} takes no frames: less than {1 << 40} MB are free"]
    assert names(tmp_path / "gate") == []


def test_only_their_owner_can_read_them(tmp_path: Path) -> None:
    frames, _ = kept(tmp_path / "frames")
    frames.keep(*frame(0))
    (file,) = (tmp_path / "frames" / "gate").iterdir()
    assert [path.stat().st_mode & 0o777 for path in (file, file.parent)] == [0o600, 0o700]
