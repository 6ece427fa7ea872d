"""A tar file is read as the bundle that it holds, or refused; it decides nothing about the disk."""

import gzip
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.firmware.archive import MAX_MEMBERS, Archive
from edge_runtime.firmware.signature import MAX_SIGNATURE_BYTES, SIGNATURE, SignatureError
from edge_runtime.inference.bundle import MANIFEST, MAX_MANIFEST_BYTES, VOCABULARY, Bundle, BundleError
from tests.edge_runtime.firmware.helpers import NEVER, SMALL, sign

Change = Callable[[tarfile.TarInfo], None]


@pytest.fixture
def bundle(bundles: list[Bundle]) -> Bundle:
    sign(bundles[1], 3)
    return bundles[1]


def pack(bundle: Bundle, *extra: tuple[str, bytes, Change], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """The bundle as a tar file, and further members: a name, its data, and what is changed in its header."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as tar:
        for name in (MANIFEST, SIGNATURE, *SMALL):
            tar.addfile(tar.gettarinfo(bundle.path / name, name), io.BytesIO((bundle.path / name).read_bytes()))
        for name, data, change in extra:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            change(header)
            tar.addfile(header, io.BytesIO(data))
    return packed.getvalue()


def opened(folder: Path, data: bytes) -> Archive:
    path = folder / "bundle.tar"
    path.write_bytes(data)
    return Archive(path)


def unchanged(_: tarfile.TarInfo) -> None:
    pass


def of_type(kind: bytes, target: str = "") -> Change:
    def change(header: tarfile.TarInfo) -> None:
        header.type, header.linkname = kind, target

    return change


@pytest.mark.parametrize("format", ["ustar", "gnu"])
@pytest.mark.parametrize("parts", [("-C", "{folder}", "."), ("-C", "{parent}", "b1")])
def test_what_tar_packs_is_read(bundle: Bundle, tmp_path: Path, format: str, parts: tuple[str, ...]) -> None:
    where = [part.format(folder=bundle.path, parent=bundle.path.parent) for part in parts]
    subprocess.run(["tar", f"--format={format}", "-cf", tmp_path / "bundle.tar", *where], check=True)
    with Archive(tmp_path / "bundle.tar") as archive:
        for name in SMALL:
            data = (bundle.path / name).read_bytes()
            assert archive.read(name, 0, len(data) + 1) == data
            assert archive.read(name, 5, 7) == data[5:12]
            assert archive.read(name, len(data), 7) == b""
        assert archive.signature() == (bundle.path / SIGNATURE).read_bytes()
        assert archive.statement(3, NEVER) == sign(bundle, 3)[0]


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (("link", b"", of_type(tarfile.SYMTYPE, "/etc/passwd")), "no plain file"),
        (("link", b"", of_type(tarfile.LNKTYPE, VOCABULARY)), "no plain file"),
        (("device", b"", of_type(tarfile.CHRTYPE)), "no plain file"),
        (("pipe", b"", of_type(tarfile.FIFOTYPE)), "no plain file"),
        (("sparse", b"", of_type(tarfile.GNUTYPE_SPARSE)), "no plain file"),
        (("long", b"x" * 600, of_type(tarfile.GNUTYPE_LONGNAME)), "no plain file"),
        (("extended", b"20 path=/etc/passwd\n", of_type(tarfile.XHDTYPE)), "no plain file"),
        (("directory", b"x", of_type(tarfile.DIRTYPE)), "no plain file"),
        (("../labels.onnx", b"x", unchanged), "leaves the archive's own directory"),
        (("a/../../labels.onnx", b"x", unchanged), "leaves the archive's own directory"),
        (("/etc/passwd", b"x", unchanged), "leaves the archive's own directory"),
        ((VOCABULARY, b"x", unchanged), "is there twice"),
        (("other/labels.onnx", b"x", unchanged), "in another directory"),
        (("extra.txt", b"x", unchanged), "the manifest names no 'extra.txt'"),
    ],
)
def test_a_member_that_no_bundle_has_is_refused(
    bundle: Bundle, tmp_path: Path, member: tuple[str, bytes, Change], why: str
) -> None:
    with pytest.raises(BundleError, match=why):
        opened(tmp_path, pack(bundle, member))


def test_extended_headers_are_refused_with_the_command_that_packs_without_them(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="tar --format=ustar"):
        opened(tmp_path, pack(bundle, format=tarfile.PAX_FORMAT))


def test_a_member_that_is_larger_than_the_file_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    header = tarfile.TarInfo("labels.onnx")
    header.size = 8**11 - 1
    with pytest.raises(BundleError, match="behind the end of the file"):
        opened(tmp_path, header.tobuf(tarfile.USTAR_FORMAT) + pack(bundle))


def test_a_negative_size_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("labels.onnx").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"  # -256, in base 256
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    with pytest.raises(BundleError):
        opened(tmp_path, bytes(header))


def test_a_file_of_another_size_than_the_manifest_says_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with (bundle.path / VOCABULARY).open("ab") as file:
        file.write(b"more")
    with pytest.raises(BundleError, match=f"the manifest names no '{VOCABULARY}' of"):
        opened(tmp_path, pack(bundle))


def test_a_file_that_was_cut_or_compressed_or_is_no_archive_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    packed = pack(bundle)
    end = len(packed.rstrip(b"\0")) - 10
    for data in (packed[:end], packed[:700], packed[:200], gzip.compress(packed), b"x" * 2000, b""):
        with pytest.raises(BundleError):
            opened(tmp_path, data)


@pytest.mark.parametrize(("name", "bound"), [(MANIFEST, MAX_MANIFEST_BYTES), (SIGNATURE, MAX_SIGNATURE_BYTES)])
def test_a_large_manifest_or_signature_is_refused(bundle: Bundle, tmp_path: Path, name: str, bound: int) -> None:
    (bundle.path / name).write_bytes(b" " * (bound + 1))
    with (
        pytest.raises(BundleError, match=f"{name} is larger than {bound} bytes"),
        opened(tmp_path, pack(bundle)) as archive,
    ):
        archive.signature()


def test_more_members_than_a_bundle_can_have_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    folders = [(f"d{number}", b"", of_type(tarfile.DIRTYPE)) for number in range(MAX_MEMBERS)]
    with pytest.raises(BundleError, match="more than"):
        opened(tmp_path, pack(bundle, *folders))


def test_an_archive_without_a_signature_says_so(bundle: Bundle, tmp_path: Path) -> None:
    subprocess.run(["tar", "-cf", tmp_path / "t.tar", "-C", bundle.path, MANIFEST, *SMALL], check=True)
    with Archive(tmp_path / "t.tar") as archive, pytest.raises(SignatureError, match="is unsigned"):
        archive.signature()
