import bz2
import gzip
import io
import lzma
import tarfile
import tempfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.capture import Cameras
from edge_runtime.capture.picture_files import read_pictures
from edge_runtime.config import CameraConfig
from edge_runtime.picture_checks import MAX_PICTURE_BYTES, PictureError, decode_picture

JPEG = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
NAMES = ["a.jpg", "b/a.PNG", "b/c/x.webp", "z.jpeg"]  # sorted


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(JPEG) if size is None else size
    return info


def write_tar(path: Path, members: list[tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info in members:
            tar.addfile(info, io.BytesIO(JPEG) if info.isreg() and info.size == len(JPEG) else None)
    return path


def write_files(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG + name.encode())
    return folder


def test_a_directory_is_read_with_its_subdirectories_in_the_order_of_names(tmp_path):
    folder = write_files(tmp_path, [*reversed(NAMES), "notes.txt"])
    (folder / "folder.jpg").mkdir()
    pictures = list(read_pictures(folder))
    assert [p.name for p in pictures] == NAMES
    assert [p.data for p in pictures] == [JPEG + name.encode() for name in NAMES]


def test_a_tar_is_read_in_the_order_of_names(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [member(name) for name in ["./z.jpeg", "b/a.PNG", "n.txt", "a.jpg"]])
    pictures = list(read_pictures(tar))
    assert [p.name for p in pictures] == ["z.jpeg", "a.jpg", "b/a.PNG"]
    assert all(p.data == JPEG for p in pictures)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_read_too(tmp_path, compress):
    tar = write_tar(tmp_path / "x.tar", [member(name) for name in reversed(NAMES)])
    (tmp_path / "x.tar.z").write_bytes(compress(tar.read_bytes()))
    assert [(p.name, p.data) for p in read_pictures(tmp_path / "x.tar.z")] == [(name, JPEG) for name in NAMES]


def test_a_compressed_tar_is_decompressed_once_whatever_the_order_in_it(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "x.tar", [member(f"{number:03}.jpg") for number in range(400, 0, -1)])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    monkeypatch.setattr("gzip._GzipReader._rewind", lambda _: pytest.fail("decompressed again from its start"))
    assert len(list(read_pictures(tmp_path / "x.tar.gz"))) == 400


def test_a_compressed_tar_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "x.tar", [member("a.jpg")])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    monkeypatch.setattr("edge_runtime.capture.picture_files.MAX_TAR_BYTES", 5000)
    with pytest.raises(PictureError, match=r"x\.tar\.gz has more than 5000 bytes once decompressed"):
        list(read_pictures(tmp_path / "x.tar.gz"))


def test_a_picture_is_read_alone(tmp_path):
    (picture,) = read_pictures(write_files(tmp_path, ["a.jpg"]) / "a.jpg")
    assert picture.name == "a.jpg"


@pytest.mark.parametrize(
    ("name", "found"), [("absent.jpg", "does not exist: name a directory, a tar or a picture"), ("notes.txt", "no tar")]
)
def test_a_source_that_is_no_directory_tar_or_picture_is_an_error(tmp_path, name, found):
    write_files(tmp_path, ["notes.txt"])
    with pytest.raises(PictureError, match=f"{name} .*{found}"):
        list(read_pictures(tmp_path / name))


def test_a_source_without_pictures_is_refused(tmp_path):
    write_files(tmp_path / "empty", ["notes.txt"])
    for source in (tmp_path / "empty", write_tar(tmp_path / "x.tar", [member("notes.txt")])):
        with pytest.raises(PictureError, match="holds no picture"):
            list(read_pictures(source))


def test_links_in_a_tar_are_not_followed(tmp_path):
    secret = write_files(tmp_path, ["secret.jpg"]) / "secret.jpg"
    hostile = [
        member("link.jpg", tarfile.SYMTYPE, str(secret), 0),
        member("hard.jpg", tarfile.LNKTYPE, str(secret), 0),
        member("pipe.jpg", tarfile.FIFOTYPE, size=0),
        member("disk.jpg", tarfile.BLKTYPE, size=0),
        member("folder.jpg", tarfile.DIRTYPE, size=0),
        member(str(tmp_path / "absolute.jpg")),
        member("../../up.jpg"),
    ]
    before = sorted(tmp_path.rglob("*"))
    tar = write_tar(tmp_path / "x.tar", hostile)
    pictures = list(read_pictures(tar))
    assert [Path(p.name).name for p in pictures] == ["up.jpg", "absolute.jpg"]  # names, and nothing but names
    assert all(p.data == JPEG for p in pictures)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tar])


@pytest.mark.parametrize("size", [1 << 20, 1 << 40, 1 << 80])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_member_that_is_longer_than_the_tar_is_an_error(tmp_path, size, kind):
    path = tmp_path / "x.tar"
    header = member("a.jpg", kind, size=size).tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(member("0.jpg").tobuf() + JPEG.ljust(1024, b"\0") + header + bytes(2048))
    with pytest.raises(PictureError, match=r"x\.tar is no tar, or a damaged one .*copy it again"):
        list(read_pictures(path))


def test_a_full_disk_is_no_damage_of_a_compressed_tar(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "x.tar", [member("a.jpg")])
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(open, "/dev/full", "w+b", buffering=0))
    (warning,) = Cameras([CameraConfig("door", str(tar))]).check()  # tried again later
    assert warning == f"camera door: {tar} cannot be read: No space left on device"


def test_a_file_that_is_too_large_is_cut_so_that_it_is_refused(tmp_path):
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(1 << 34)  # a hole
    (picture,) = read_pictures(tmp_path)
    assert len(picture.data) == MAX_PICTURE_BYTES + 1
    with pytest.raises(PictureError, match="at most"):
        decode_picture(picture.data)


def test_a_file_that_has_vanished_does_not_end_the_reading(tmp_path):
    pictures = read_pictures(write_files(tmp_path, NAMES))
    first = next(pictures)
    (tmp_path / NAMES[1]).unlink()
    rest = list(pictures)
    assert [first.name, *(p.name for p in rest)] == NAMES
    assert [bool(p.data) for p in rest] == [False, True, True]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_tar_gives_pictures_or_a_picture_error(tmp_path, data):
    path = write_tar(tmp_path / "x.tar", [member("a.jpg"), member("b.jpg")])
    damaged = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        damaged = bytearray(gzip.compress(damaged, mtime=0))
    for at in data.draw(st.lists(st.integers(0, min(2048, len(damaged) - 1)), max_size=4)):
        damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    sizes, message = [], "x.tar"
    try:
        sizes = [len(p.data) for p in read_pictures(path)]
    except PictureError as error:
        message = str(error)
    assert all(size <= MAX_PICTURE_BYTES + 1 for size in sizes)
    assert "x.tar" in message
