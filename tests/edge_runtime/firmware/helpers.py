"""Bundles, keys and stores for the tests of updates."""

import shutil
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.firmware.incoming import Incoming
from edge_runtime.firmware.signature import SIGNATURE, Statement, new_key, read_trust, signed, statement_of
from edge_runtime.firmware.store import Store
from edge_runtime.inference.bundle import (
    INTER_TABLES,
    MANIFEST,
    TABLES,
    VOCABULARY,
    Bundle,
    FileRecord,
    file_hash,
    open_bundle,
)

TODAY, NEVER = date(2030, 1, 1), date(2099, 12, 31)
SMALL = (TABLES, INTER_TABLES, VOCABULARY)  # all that a board needs that only offloads
KEY, OTHER_KEY = new_key(), new_key()


def trust(folder: Path, *keys: tuple[bytes, str]) -> tuple[bytes, ...]:
    path = folder / "trust"
    path.write_text("".join(f"{public} # a signer\n" for _, public in keys or [KEY]))
    return read_trust(path)


def variant(bundle: Bundle, folder: Path, word: str, files: tuple[str, ...] = (), **changed: Any) -> Bundle:
    """A copy of these files of a bundle, by default all, with another vocabulary. changed: fields of its manifest."""
    folder.mkdir(parents=True)
    names = files or tuple(bundle.manifest.files)
    for name in names:
        shutil.copyfile(bundle.path / name, folder / name)
    words = (folder / VOCABULARY).read_text().replace("word", word)
    (folder / VOCABULARY).write_text(words)
    return rewritten(bundle, folder, names, **changed)


def rewritten(bundle: Bundle, folder: Path, names: tuple[str, ...], **changed: Any) -> Bundle:
    """With the manifest of the files that are there now."""
    files = {name: FileRecord(file_hash(folder / name), (folder / name).stat().st_size) for name in names}
    changed = {"files": files, "targets": {}, **changed}
    manifest = msgspec.structs.replace(bundle.manifest, **changed)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return open_bundle(folder)


def sign(bundle: Bundle, version: int, expires: date = NEVER, key: tuple[bytes, str] = KEY) -> tuple[Statement, bytes]:
    """Also writes bundle.sig."""
    statement = statement_of(bundle, version, expires)
    signature = signed(statement, key[0])
    (bundle.path / SIGNATURE).write_bytes(signature)
    return statement, signature


def fill(incoming: Incoming, source: Path, piece: int = 1 << 16) -> int:
    """Gives it what it wants, as a sender does. Returns the bytes that were needed."""
    sent = 0
    while wanted := incoming.wanted():
        with (source / wanted.name).open("rb") as file:
            file.seek(wanted.offset)
            data = file.read(min(piece, wanted.size - wanted.offset))
        assert incoming.add(wanted.file, wanted.offset, data)
        sent += len(data)
    return sent


def install(store: Store, bundle: Bundle, version: int, key: tuple[bytes, str] = KEY) -> None:
    incoming = store.incoming(*sign(bundle, version, key=key))
    fill(incoming, bundle.path)
    store.install(incoming, lambda _: None)


def running(store: Store) -> str:
    """What a start of the board runs: a name, or "" for the configuration's bundle."""
    found, _ = store.start()
    return found.bundle.manifest.name if found else ""
