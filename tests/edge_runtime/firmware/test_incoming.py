"""The files of a bundle arrive once, and only as they were signed."""

import shutil
from collections import namedtuple
from pathlib import Path

import msgspec
import pytest

from edge_runtime.firmware.incoming import PART, StoreError, WrongHashError, board_files
from edge_runtime.firmware.store import INCOMING, Store
from edge_runtime.inference.bundle import DRAFT_LABELS, MANIFEST, TABLES, VOCABULARY, Bundle, BundleError
from tests.edge_runtime.firmware.helpers import SMALL, fill, rewritten, sign, trust, variant

PIECE = 100


@pytest.fixture
def new(board_bundle: Bundle, tmp_path: Path) -> Bundle:
    return variant(board_bundle, tmp_path / "new", "newword", SMALL, name="new")


@pytest.fixture
def store(board_bundle: Bundle, tmp_path: Path) -> Store:
    factory = variant(board_bundle, tmp_path / "factory", "oldword", SMALL, name="factory")
    return Store(tmp_path / "store", trust(tmp_path), (), factory.path)


def test_a_board_needs_its_own_files_only(board_bundle: Bundle) -> None:
    onnx = board_files(board_bundle.manifest, [".onnx"])
    networks = ["head.onnx", "draft_look.onnx", "draft_step.onnx", "labels.onnx", DRAFT_LABELS]
    assert sorted(onnx) == sorted([*SMALL, *networks])
    both = board_files(board_bundle.manifest, [".onnx", ".tflite"])
    assert {name for name in board_bundle.manifest.files if name.endswith((".onnx", ".tflite", ".bin", ".txt"))} == set(
        both
    )


def test_files_that_are_here_already_are_not_asked_for(store: Store, new: Bundle) -> None:
    incoming = store.incoming(*sign(new, 1))
    sent = fill(incoming, new.path)
    changed = (MANIFEST, VOCABULARY)
    assert sent == sum((new.path / name).stat().st_size for name in changed)
    assert incoming.received == incoming.total == sent + sum((new.path / name).stat().st_size for name in SMALL[:2])


def test_a_damaged_file_of_another_bundle_is_asked_for(store: Store, new: Bundle) -> None:
    data = bytearray((store.factory / TABLES).read_bytes())
    data[100] ^= 1
    (store.factory / TABLES).write_bytes(data)
    incoming = store.incoming(*sign(new, 1))
    fill(incoming, new.path)
    assert (incoming.folder / TABLES).read_bytes() == (new.path / TABLES).read_bytes()


def test_what_is_stored_is_not_asked_for_again_after_a_restart(store: Store, new: Bundle) -> None:
    offer = sign(new, 1)
    incoming, got = store.incoming(*offer), 0
    while (wanted := incoming.wanted()) and (wanted.name, wanted.offset > 0) != (VOCABULARY, True):
        data = (new.path / wanted.name).read_bytes()[wanted.offset : wanted.offset + PIECE]
        assert incoming.add(wanted.file, wanted.offset, data)
        got += len(data)
    again = store.incoming(*offer)
    assert again.wanted() == wanted
    total = sum((new.path / name).stat().st_size for name in (MANIFEST, VOCABULARY))
    assert fill(again, new.path, piece=PIECE) == total - got


def test_a_damaged_part_of_an_earlier_run_is_fetched_once_more(store: Store, new: Bundle) -> None:
    offer = sign(new, 1)
    incoming = store.incoming(*offer)
    fill(incoming, new.path)
    shutil.move(incoming.folder / VOCABULARY, incoming.folder / f"{VOCABULARY}{PART}")
    with (incoming.folder / f"{VOCABULARY}{PART}").open("r+b") as file:
        file.write(b"\0\0\0\0")  # a hole after a power cut
    again = store.incoming(*offer)
    assert fill(again, new.path) == (new.path / VOCABULARY).stat().st_size


def test_another_offer_starts_from_nothing(store: Store, new: Bundle) -> None:
    fill(store.incoming(*sign(new, 1)), new.path)
    incoming = store.incoming(*sign(new, 2))
    assert incoming.received == 0


def test_a_wrong_file_is_refused_and_can_be_sent_again(store: Store, new: Bundle) -> None:
    incoming = store.incoming(*sign(new, 1))
    wanted = incoming.wanted()
    assert wanted is not None
    with pytest.raises(WrongHashError, match="hash"):
        incoming.add(wanted.file, 0, bytes(wanted.size))
    fill(incoming, new.path)


def test_an_endless_file_is_refused(store: Store, new: Bundle) -> None:
    incoming = store.incoming(*sign(new, 1))
    wanted = incoming.wanted()
    assert wanted is not None
    with pytest.raises(WrongHashError, match="more than"):
        incoming.add(wanted.file, 0, bytes(wanted.size + 1))
    assert incoming.received == 0


def test_pieces_of_other_files_and_places_change_nothing(store: Store, new: Bundle) -> None:
    incoming = store.incoming(*sign(new, 1))
    wanted = incoming.wanted()
    assert wanted is not None
    assert not incoming.add("00" * 32, 0, b"x")
    assert not incoming.add(wanted.file, 1, b"x")
    assert not incoming.add(wanted.file, 0, b"")
    assert incoming.wanted() == wanted


def test_files_of_two_bundles_are_not_mixed(store: Store, new: Bundle, board_bundle: Bundle, tmp_path: Path) -> None:
    """The vocabulary of another bundle that the same key has signed."""
    other = variant(board_bundle, tmp_path / "other", "wordnew", SMALL, name="new")
    sign(other, 1)
    (new.path / VOCABULARY).write_bytes((other.path / VOCABULARY).read_bytes())
    with pytest.raises(WrongHashError, match="hash"):
        fill(store.incoming(*sign(new, 2)), new.path)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", ".."])
def test_a_path_out_of_the_folder_is_refused(store: Store, new: Bundle, name: str) -> None:
    text = (new.path / MANIFEST).read_text().replace(f'"{VOCABULARY}"', f'"{name}"')
    (new.path / MANIFEST).write_text(text)
    incoming = store.incoming(*sign(new, 1))
    with pytest.raises(BundleError, match="files has the name"):
        fill(incoming, new.path)
    assert {path.name for path in store.folder.iterdir()} == {INCOMING}


def test_a_bundle_without_a_needed_file_and_one_with_an_empty_file_are_refused(
    store: Store, new: Bundle, board_bundle: Bundle
) -> None:
    (new.path / VOCABULARY).write_bytes(b"")
    for names in (SMALL, SMALL[:2]):
        changed = rewritten(board_bundle, new.path, names, name="new")
        with pytest.raises(BundleError, match=f"has no {VOCABULARY}"):
            fill(store.incoming(*sign(changed, 1)), new.path)


def test_a_signature_for_another_name_is_refused(store: Store, new: Bundle, board_bundle: Bundle) -> None:
    statement, signature = sign(new, 1)
    incoming = store.incoming(msgspec.structs.replace(statement, name="x"), signature)
    with pytest.raises(BundleError, match="was signed, and its manifest says new"):
        fill(incoming, new.path)


def test_a_bundle_that_does_not_fit_the_disk_is_refused_before_its_files_come(
    store: Store, new: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("edge_runtime.firmware.incoming.shutil.disk_usage", lambda _: usage(1, 1, 4 << 20))
    with pytest.raises(StoreError, match="make room"):
        fill(store.incoming(*sign(new, 1)), new.path)
