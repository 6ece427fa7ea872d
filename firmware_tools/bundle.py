"""`aiflow bundle`: signs bundles, installs them on a board or sends them to one, and goes back."""

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeAlias

from edge_runtime.config import RuntimeConfig, load_toml
from edge_runtime.errors import AiflowError
from edge_runtime.firmware.archive import Archive
from edge_runtime.firmware.incoming import Incoming
from edge_runtime.firmware.signature import (
    SIGNATURE,
    check_new,
    claimed,
    new_key,
    read_signature,
    read_trust,
    required_signature,
    signed,
    statement_of,
    verified,
)
from edge_runtime.firmware.store import UNSIGNED, Store
from edge_runtime.firmware.updates import self_test, store_of, today
from edge_runtime.inference.bundle import CHUNK, Bundle, open_bundle
from firmware_tools.broker_arguments import add_broker_arguments, broker_settings
from firmware_tools.push import Push
from testbed.argument_types import number
from testbed.terminal import print_rows

DAYS, MAX_DAYS = 365, 36500  # that a signature is good for
PUSH_S = 3600  # for 14 MB over a thin link, and the trial
MAX_KEY_BYTES = 16 * 1024
Read: TypeAlias = Callable[[str, int, int], bytes]  # of a bundle: a file's name, an offset, at most so many bytes
EPILOG = """\
a key, once:    aiflow bundle key signing.pem; its public key goes into the boards' trust_file
a new bundle:   aiflow bundle sign --key signing.pem --version 2 models/zoo/mine
on a board:     aiflow bundle install --config board.toml models/zoo/mine
over MQTT:      aiflow bundle push --board porch --broker broker.lan models/zoo/mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    key = actions.add_parser("key", help="make a key to sign with, and print its public key")
    key.add_argument("file", type=Path, help="the new file of the private key; keep it off boards and servers")
    sign = actions.add_parser("sign", help="write the signature beside the manifest")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="the private key")
    sign.add_argument(
        "--version",
        type=number,
        required=True,
        metavar="N",
        help="higher than that of every bundle that the boards had",
    )
    sign.add_argument("--days", type=number, default=DAYS, help=f"until the signature expires (default: {DAYS})")
    verify = actions.add_parser("verify", help="check the files that are there, and the signature")
    verify.add_argument("--trust", type=Path, metavar="FILE", help="public keys, one per line (default: files only)")
    install = actions.add_parser(
        "install", help="install a bundle from a directory or a .tar file; the board's next start tries it"
    )
    install.add_argument("--force", action="store_true", help="also an older version, or an expired one")
    rollback = actions.add_parser("rollback", help="go back to the bundle before; the board's next start runs it")
    shown = actions.add_parser("list", help="the installed bundles")
    for action in (install, rollback, shown):
        action.add_argument("--config", type=Path, required=True, metavar="FILE", help="board.toml, with [updates]")
    push = actions.add_parser("push", help="send a bundle to a board, which installs it and starts again")
    push.add_argument("--board", required=True, metavar="ID")
    push.add_argument("--timeout", type=number, default=PUSH_S, metavar="S", help=f"seconds (default: {PUSH_S})")
    add_broker_arguments(push)
    for action in (sign, verify, install, push):
        where = "its directory, or a .tar file of it" if action is install else "its directory"
        action.add_argument("bundle", type=Path, help=where)


def run(args: argparse.Namespace) -> None:
    """Prints what was done. Raises AiflowError."""
    actions = {"key": _key, "sign": _sign, "verify": _verify, "install": _install, "push": _push}
    actions |= {"rollback": _rollback, "list": _list}
    try:
        actions[args.action](args)
    except OSError as error:
        if isinstance(error, AiflowError):
            raise
        advice = "is the disk full or read-only, or the file another account's?"
        if isinstance(error, FileNotFoundError):
            advice = "is the path right?"
        raise AiflowError(f"{error.filename or 'disk'}: {error.strerror}: {advice}") from error


def _key(args: argparse.Namespace) -> None:
    pem, public = new_key()
    try:
        with open(args.file, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(pem)
    except FileExistsError:
        raise AiflowError(f"{args.file} exists already, and boards may trust it: name another file") from None
    print(f"{public} # {args.file.name}")


def _sign(args: argparse.Namespace) -> None:
    if args.days > MAX_DAYS:
        raise AiflowError(f"--days {args.days}: want at most {MAX_DAYS}")
    bundle = _checked(args.bundle, complete=True)
    with args.key.open("rb") as file:
        key = file.read(MAX_KEY_BYTES)
    statement = statement_of(bundle, args.version, today() + timedelta(days=args.days))
    path = bundle.path / SIGNATURE
    path.write_bytes(signed(statement, key))
    print(f"{path}: {statement.name} version {statement.version}, id {statement.id}, until {statement.expires}")


def _verify(args: argparse.Namespace) -> None:
    if args.trust:
        statement = verified(required_signature(args.bundle), read_trust(args.trust))
    bundle = _checked(args.bundle, complete=False)
    if not args.trust:
        if not (signature := read_signature(args.bundle)):
            print(f"{args.bundle}: {bundle.manifest.name}, id {bundle.id.hex()}, its files match; it is unsigned")
            return
        statement = claimed(signature)
    if statement.id != bundle.id.hex():
        raise AiflowError(f"{args.bundle}: the signature is of another manifest: sign the bundle again")
    check_new(statement, 0, today())
    unchecked = "" if args.trust else "; its files match, but the signature was not checked: name the keys with --trust"
    said = f"{statement.name} version {statement.version}, id {statement.id}, until {statement.expires}"
    print(f"{args.bundle}: {said}{unchecked}")


def _install(args: argparse.Namespace) -> None:
    config, store = _store(args)
    with ExitStack() as stack:
        read: Read
        if args.bundle.is_file():
            archive = stack.enter_context(Archive(args.bundle))
            read, statement = archive.read, archive.statement(UNSIGNED, today())
            signature = archive.signature() if store.trust else b""
        else:
            bundle = _checked(args.bundle, complete=False)
            read, statement = partial(_read, bundle.path), statement_of(bundle, UNSIGNED, today())
            signature = required_signature(args.bundle) if store.trust else b""
        if store.trust:
            statement = verified(signature, store.trust)
            if not args.force:
                store.check_new(statement, today())
        incoming = store.incoming(statement, signature)
        _fill(incoming, read)
    store.install(incoming, lambda folder: self_test(config, folder))
    print(f"{statement.name} version {statement.version} is installed: the board tries it at its next start")


def _read(folder: Path, name: str, offset: int, size: int) -> bytes:
    with (folder / name).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _fill(incoming: Incoming, read: Read) -> None:
    """Copies what the store needs, as it would arrive over MQTT."""
    while wanted := incoming.wanted():
        data = read(wanted.name, wanted.offset, min(CHUNK, wanted.size - wanted.offset))
        if not incoming.add(wanted.file, wanted.offset, data):
            raise AiflowError(f"{wanted.name} changes while it is read: try again")


def _rollback(args: argparse.Namespace) -> None:
    _, store = _store(args)
    state = store.roll_back()
    print(f"the board's next start runs {state.current or store.factory}")


def _list(args: argparse.Namespace) -> None:
    _, store = _store(args)
    state = store.state()
    words = {state.previous: "previous", state.failed: f"given up: {state.why}"}
    words[state.current] = "in use" if state.starts is None else f"on trial, {state.starts} starts"
    rows = [(entry, words.get(entry, "")) for entry in store.entries()]
    rows.append((str(store.factory), "of the configuration" if state.current else "of the configuration, in use"))
    print_rows(("bundle", "state"), rows)


def _push(args: argparse.Namespace) -> None:
    bundle = _checked(args.bundle, complete=False)
    push = Push(bundle, required_signature(args.bundle), args.site, args.board, lambda text: print(text, flush=True))
    push.run(broker_settings(args, "push"), float(args.timeout))
    print(f"{push.sent} bytes were sent")


def _store(args: argparse.Namespace) -> tuple[RuntimeConfig, Store]:
    config = load_toml(args.config, RuntimeConfig, "board")
    if (store := store_of(config)) is None:
        raise AiflowError(f"{args.config} has no [updates]: add the table, with a folder")
    place = next(path for path in (store.folder, *store.folder.absolute().parents) if path.exists())
    if os.geteuid() == 0 and (owner := place.stat().st_uid):  # what root puts there, the service could not change
        raise AiflowError(
            f"{place} belongs to user {owner}: run this as that user: runuser -u aiflow -- aiflow bundle ..."
        )
    return config, store


def _checked(path: Path, *, complete: bool) -> Bundle:
    """Compares the files that are there with the manifest. complete: none may be missing. Raises BundleError."""
    bundle = open_bundle(path)
    for name in bundle.manifest.files:
        if complete or (bundle.path / name).exists():
            bundle.file(name)
    return bundle
