import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_runtime.inference.bundle import (
    EOS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Bundle,
    BundleError,
    detokenise,
    file_hash,
    open_bundle,
)

WORDS = ("<pad>", "<start>", "<end>", "<unknown>", "a", "dog", "runs")


def write_bundle(folder: Path, **changes: Any) -> Path:
    """A bundle of one file, its manifest changed at will."""
    words = "".join(f"{word}\n" for word in WORDS).encode()
    (folder / "vocabulary.txt").write_bytes(words)
    manifest = {
        "schema": 1,
        "name": "small",
        "files": {"vocabulary.txt": {"sha256": hashlib.sha256(words).hexdigest(), "bytes": len(words)}},
        "pixels": 224,
        "latent": {"channels": 64, "height": 7, "width": 7, "groups": 4, "gains": [1.0]},
        "vocabulary": len(WORDS),
        "max_tokens": 24,
        "targets": {},
        "tail": "tail.safetensors",
        "classes": [],
        "licences": {},
        "training_commit": "none",
        "quality": {},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))
    return folder


def test_a_bundle_opens_and_its_id_is_its_manifests_hash(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path))
    assert bundle.id == hashlib.sha256((tmp_path / MANIFEST).read_bytes()).digest()[:8]
    assert bundle.file("vocabulary.txt") == tmp_path / "vocabulary.txt"
    assert bundle.words == WORDS
    assert bundle.text([4, 5, 6, EOS, 4]) == "a dog runs"


def test_the_manifest_that_a_bundle_was_opened_with_stays_when_its_link_moves_on(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_bundle(tmp_path / name, name=name)
    link = tmp_path / "current"
    link.symlink_to("one")
    bundle = open_bundle(link)
    link.unlink()
    link.symlink_to("two")
    assert bundle.file("vocabulary.txt") == tmp_path / "one" / "vocabulary.txt"


def test_a_directory_without_a_manifest_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match=r"holds no manifest\.json: name a bundle's directory"):
            open_bundle(path)


def test_a_missing_file_is_named(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path))
    (tmp_path / "vocabulary.txt").unlink()
    with pytest.raises(BundleError, match=r"vocabulary\.txt is missing: copy the whole bundle again"):
        bundle.file("vocabulary.txt")


@pytest.mark.parametrize("damage", [lambda b: b + b"x", lambda b: b[:-1], lambda b: b.replace(b"dog", b"cat")])
def test_an_altered_file_is_refused(tmp_path, damage):
    bundle = open_bundle(write_bundle(tmp_path))
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=r"vocabulary\.txt is not the file that the manifest names"):
        bundle.file("vocabulary.txt")


def test_a_file_that_the_manifest_lacks_is_refused_even_if_it_is_there(tmp_path):
    (tmp_path / "head.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"has no file head\.onnx: it has vocabulary\.txt"):
        open_bundle(write_bundle(tmp_path)).file("head.onnx")


def test_another_schema_is_refused_by_its_number_whatever_else_it_holds(tmp_path):
    with pytest.raises(BundleError, match="has schema 2, this version reads 1: update the older"):
        open_bundle(write_bundle(tmp_path, schema=2, news=True, latent=None))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"extra": 1}, "unknown field `extra`"),
        ({"latent": {"channels": 64, "height": 7, "width": 7, "groups": 4, "gains": []}}, r"latent\.gains"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1025}, "max_tokens"),
        ({"vocabulary": "7"}, "vocabulary"),
        ({"files": {"a": {"sha256": "0", "bytes": 1, "url": "http://x"}}}, "unknown field `url`"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_and_the_field_named(tmp_path, changes, found):
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{found}"):
        open_bundle(write_bundle(tmp_path, **changes))


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff\xfe{}", b'{"schema":' + b"[" * 100_000, b'{"schema": 1'])
def test_what_is_no_manifest_is_refused(tmp_path, data):
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        open_bundle(tmp_path)


def test_a_huge_manifest_is_refused_unread(tmp_path):
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match="larger than"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b", ".hidden", "a\n"])
def test_a_file_name_that_leaves_the_bundle_is_refused(tmp_path, name):
    with pytest.raises(BundleError, match="files lie in the bundle's own directory"):
        open_bundle(write_bundle(tmp_path, files={name: {"sha256": "0", "bytes": 1}}))


def test_a_vocabulary_of_another_length_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"vocabulary\.txt has 7 words, the manifest says 8"):
        _ = open_bundle(write_bundle(tmp_path, vocabulary=8)).words


@pytest.mark.parametrize(
    ("tokens", "text"), [([], ""), ([4, 5], "a dog"), ([2, 4], ""), ([1, 3, 0, 6, 99], "runs"), ([5, 2, 6], "dog")]
)
def test_special_and_unknown_ids_have_no_word_and_the_end_token_ends(tokens, text):
    assert detokenise(tokens, WORDS) == text


def test_a_real_bundle_is_whole(board_bundle):
    for name, record in board_bundle.manifest.files.items():
        assert file_hash(board_bundle.file(name)) == record.sha256
    assert board_bundle.tables.channels == board_bundle.manifest.latent.channels


def test_tables_of_another_number_of_levels_than_the_head_has_are_refused(board_bundle):
    latent = msgspec.structs.replace(board_bundle.manifest.latent, gains=(1.0, 2.0))
    other = Bundle(board_bundle.path, msgspec.structs.replace(board_bundle.manifest, latent=latent), board_bundle.id)
    with pytest.raises(BundleError, match="has 1 levels of tables and 2 gains: build it again"):
        _ = other.tables
