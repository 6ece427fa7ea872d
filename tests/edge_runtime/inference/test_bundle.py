import hashlib
import json
import shutil
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
    FileRecord,
    Manifest,
    detokenise,
    file_hash,
    open_bundle,
)
from edge_runtime.wire.tables import Tables

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
        with pytest.raises(BundleError, match=r"holds no manifest\.json: name the directory of a bundle"):
            open_bundle(path)


def test_a_missing_file_is_named(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path))
    (tmp_path / "vocabulary.txt").unlink()
    with pytest.raises(BundleError, match=r"lacks vocabulary\.txt: copy the whole bundle again"):
        bundle.file("vocabulary.txt")


def test_a_board_needs_no_file_of_the_servers_part_and_a_server_hears_which_it_lacks(board_bundle, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    weights = [name for name in board_bundle.manifest.files if name.endswith(".safetensors")]
    for name in {MANIFEST, *board_bundle.manifest.files} - set(weights):
        (copy / name).symlink_to(board_bundle.path / name)
    bundle = open_bundle(copy)
    assert "files match, the board's part: without " in bundle.check(for_server=False)
    for ask in (lambda: bundle.check(for_server=True), lambda: bundle.file("tail.safetensors")):
        with pytest.raises(BundleError) as error:
            ask()
        assert all(name in str(error.value) for name in [*weights, "pip install aiflow_edge_server_models-*.whl"])
    (copy / "head.onnx").unlink()
    with pytest.raises(BundleError, match=r"lacks head\.onnx: copy the whole bundle again"):
        bundle.check(for_server=False)


def test_what_a_board_has_of_the_servers_part_is_checked_too(board_bundle, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (MANIFEST, *board_bundle.manifest.files):
        (copy / name).symlink_to(board_bundle.path / name)
    bundle = open_bundle(copy)
    assert bundle.check(for_server=False) == bundle.check(for_server=True)
    (copy / "tail.safetensors").unlink()
    (copy / "tail.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"tail\.safetensors is not the file"):
        bundle.check(for_server=False)


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
        ({"files": {"a": {"sha256": 64 * "0", "bytes": 1, "url": "http://x"}}}, "unknown field `url`"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_and_the_field_named(tmp_path, changes, found):
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{found}"):
        open_bundle(write_bundle(tmp_path, **changes))


LATENT = {"channels": 64, "height": 7, "width": 7, "groups": 4, "gains": [1.0]}
TARGET = {"file": "edge.safetensors", "width": 160, "heads": 4, "encoder_layers": 0, "decoder_layers": 1}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(({"latent": LATENT | {"gains": [gain]}}, r"latent\.gains") for gain in (0, -1, 1e308, 1e-300)),
        *(({"latent": LATENT | {name: 10**9}}, rf"latent\.{name}") for name in LATENT if name != "gains"),
        ({"latent": LATENT | {"gains": [1.0, 0.5]}}, r"latent.*must rise"),
        ({"latent": LATENT | {"level_bytes": [200.0, 400.0]}}, r"latent.*as many level_bytes"),
        ({"latent": LATENT | {"default_level": 1}}, r"latent.*default_level below 1"),
        ({"latent": LATENT | {"scales": [1.0, 0.5]}}, r"latent.*2 scales, want 1 or one for each of 64"),
        ({"classes": ["cat", "dog"], "class_ids": ["n02121808"]}, r"class_ids has 1 entries, classes 2"),
        *(({"targets": {"edge": TARGET | {name: 10**9}}}, rf"targets.*{name}") for name in TARGET if name != "file"),
        ({"targets": {"edge": TARGET | {"heads": 0}}}, r"targets.*heads"),
        ({"targets": {"edge": TARGET | {"heads": 7}}}, r"targets\.edge: width 160 does not divide into 7 heads"),
        ({"targets": {"moon": TARGET}}, r"targets"),
        ({"pixels": 10**9}, "pixels"),
        ({"vocabulary": 10**9}, "vocabulary"),
        ({"vocabulary": 3}, "vocabulary"),
        ({"name": "x" * 5000}, "name"),
        ({"name": "a\x1b[2J"}, "name"),
        ({"classes": ["x" * 65]}, "classes"),
        ({"classes": [""]}, "classes"),
        ({"training_commit": "x" * 65}, "training_commit"),
        ({"quality": {"dev": 1e300}}, "quality"),
        ({"licences": {"weights": "x" * 1025}}, "licences"),
        ({"draft_calibration": [[0.5, 0.9], [0.6, 0.1]]}, "both must rise"),
        ({"draft_calibration": [[0.5, 2.0]]}, "draft_calibration"),
        ({"files": {"a": {"sha256": "0", "bytes": 1}}}, r"files.*sha256"),
        ({"files": {"a": {"sha256": 64 * "0", "bytes": -1}}}, r"files.*bytes"),
        ({"files": {f"file{i}": {"sha256": 64 * "0", "bytes": 1} for i in range(257)}}, "files"),
    ],
)
def test_a_number_or_a_text_out_of_bounds_is_refused_and_its_field_named(tmp_path, changes, field):
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{field}"):
        open_bundle(write_bundle(tmp_path, **changes))


def test_layers_that_cannot_be_in_their_file_are_refused_before_anything_is_allocated(tmp_path):
    files = {"edge.safetensors": {"sha256": 64 * "0", "bytes": 4 * 160**2}}
    open_bundle(write_bundle(tmp_path, files=files, targets={"edge": TARGET}))
    with pytest.raises(
        BundleError, match=r"targets\.edge: these layers have 204800 parameters or more, too many for the"
    ):
        open_bundle(write_bundle(tmp_path, files=files, targets={"edge": TARGET | {"encoder_layers": 1}}))


def bounds(info: Any) -> list[Any]:
    """The names of fields that have no bound, of a manifest's type."""
    inspect = msgspec.inspect
    if isinstance(info, inspect.StructType):
        return [f"{field.name}.{name}" for field in info.fields for name in bounds(field.type)]
    if isinstance(info, inspect.DictType):
        own = [] if info.max_length else ["length"]
        return own + bounds(info.key_type) + bounds(info.value_type)
    if isinstance(info, inspect.VarTupleType):
        return ([] if info.max_length else ["length"]) + bounds(info.item_type)
    if isinstance(info, inspect.TupleType):
        return [name for item in info.item_types for name in bounds(item)]
    if isinstance(info, inspect.StrType):
        return [] if info.max_length or info.pattern else ["length"]
    return [] if info.ge is not None and info.le is not None else ["range"]


def test_every_field_of_a_manifest_has_bounds():
    assert bounds(msgspec.inspect.type_info(Manifest)) == []


def test_the_shipped_bundle_is_within_all_bounds():
    zoo = Path(__file__).parents[3] / "models" / "zoo"
    for manifest in zoo.glob("*/manifest.json"):
        bundle = open_bundle(manifest.parent)
        assert bundle.tables.levels == len(bundle.manifest.latent.gains)
        assert bundle.inter_tables is not None


def test_a_file_is_read_up_to_its_size_and_never_whole(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert file_hash(tmp_path / "huge", max_bytes=10) == hashlib.sha256(bytes(11)).hexdigest()
    records = {"vocabulary.txt": {"sha256": 64 * "0", "bytes": 1 << 36}}
    bundle = open_bundle(write_bundle(tmp_path, files=records))
    with pytest.raises(BundleError, match="is not the file that the manifest names"):  # and its size is asked first
        _ = bundle.words


def test_a_vocabulary_or_tables_too_large_to_be_some_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_runtime.inference.bundle.MAX_VOCABULARY_BYTES", 10)
    with pytest.raises(BundleError, match=r"vocabulary\.txt is larger than 10 bytes"):
        _ = open_bundle(write_bundle(tmp_path)).words


@pytest.mark.parametrize("data", [b"\xff\n" * 7, b"w" * 200 + b"\nb\nc\nd\ne\nf\ng\n", b""])
def test_a_vocabulary_that_is_no_text_is_refused(tmp_path, data):
    folder = write_bundle(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["vocabulary.txt"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "vocabulary.txt").write_bytes(data)
    with pytest.raises(BundleError, match=r"vocabulary\.txt"):
        _ = open_bundle(folder).words


def test_tables_that_are_none_are_named_with_their_bundle(tmp_path):
    (tmp_path / "tables.bin").write_bytes(b"x")
    record = {"tables.bin": {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}}
    with pytest.raises(BundleError, match=r"tables\.bin: 1 bytes that begin with 78"):
        _ = open_bundle(write_bundle(tmp_path, files=record)).tables


def test_tables_for_frames_with_a_reference_must_fit_the_others(board_bundle, tmp_path):
    folder = Path(shutil.copytree(board_bundle.path, tmp_path / "copy"))

    def opened(**contents: bytes | None) -> Bundle:
        """The bundle with other table files; None: without it."""
        files = dict(board_bundle.manifest.files)
        for name, data in contents.items():
            files.pop(f"{name}.bin")
            if data is not None:
                (folder / f"{name}.bin").write_bytes(data)
                files[f"{name}.bin"] = FileRecord(hashlib.sha256(data).hexdigest(), len(data))
        (folder / MANIFEST).write_bytes(
            msgspec.json.encode(msgspec.structs.replace(board_bundle.manifest, files=files))
        )
        return open_bundle(folder)

    tables, inter = board_bundle.tables, board_bundle.inter_tables
    assert opened(inter_tables=None).inter_tables is None
    other = Tables(inter.frequencies.copy(), 7, 7, 4, inter.set_id + 1)
    for wrong in (other, tables):
        with pytest.raises(BundleError, match=r"inter_tables\.bin does not fit"):
            _ = opened(inter_tables=wrong.to_bytes()).inter_tables
    with pytest.raises(BundleError, match=r"tables\.bin has the seven contexts"):
        _ = opened(tables=inter.to_bytes()).tables


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
    with pytest.raises(BundleError, match=r"files lie in the bundle's own directory|length >= 1"):
        open_bundle(write_bundle(tmp_path, files={name: {"sha256": 64 * "0", "bytes": 1}}))


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
    latent = msgspec.structs.replace(board_bundle.manifest.latent, gains=(1.0, 2.0, 4.0))
    other = Bundle(board_bundle.path, msgspec.structs.replace(board_bundle.manifest, latent=latent), board_bundle.id)
    with pytest.raises(
        BundleError, match=r"has \(2, 64, 7, 7, 4\) levels, .* the manifest \(3, 64, 7, 7, 4\): build it again"
    ):
        _ = other.tables
