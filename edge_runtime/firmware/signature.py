"""Who has signed a bundle: Ed25519 (RFC 8032) over a statement of its name, version, expiry date and manifest.

The manifest has the size and the hash of each file, so the signature covers all of them. The file `bundle.sig` beside
the manifest has two lines: the statement as JSON, and the signature in base64. It signs CONTEXT and the bytes
of the first line, which are parsed only after a trusted key has confirmed them.
"""

import base64
import binascii
import hashlib
from datetime import date
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from edge_runtime.bounded_file import read_bounded
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import MANIFEST, MAX_MANIFEST_BYTES, Bundle, BundleError, BundleName, Sha256
from edge_runtime.packages import require

SIGNATURE = "bundle.sig"
CONTEXT = b"aiflow bundle\n"  # so that a key that also signs other things signs no bundle by accident
SCHEMA = 1
MAX_SIGNATURE_BYTES = 1024
MAX_VERSION = (1 << 31) - 1
MAX_KEY_FILE_BYTES = 64 * 1024
MAX_KEYS = 16
KEY_BYTES, SIGNATURE_BYTES = 32, 64
FIRST_YEAR = 2026  # a clock before this has lost its time

Trust: TypeAlias = tuple[bytes, ...]  # public keys, 32 bytes each


class SignatureError(BundleError):
    """A bundle is unsigned, signed by nobody who is trusted, expired, or older than what was installed."""


class Statement(Struct, frozen=True, forbid_unknown_fields=True):
    """The signed statement about a bundle."""

    name: BundleName
    version: Annotated[int, Meta(ge=0, le=MAX_VERSION)]  # of one series for all names; 0: it is not signed
    expires: date  # the last day (UTC) on which a board installs it
    manifest: Sha256
    manifest_bytes: Annotated[int, Meta(ge=1, le=MAX_MANIFEST_BYTES)]
    schema: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA

    @property
    def id(self) -> str:
        """The bundle's id, 16 hex digits."""
        return self.manifest[:16]


def statement_of(bundle: Bundle, version: int, expires: date) -> Statement:
    return statement_about(bundle.manifest.name, (bundle.path / MANIFEST).read_bytes(), version, expires)


def statement_about(name: str, manifest: bytes, version: int, expires: date) -> Statement:
    """name: of the bundle whose manifest this is."""
    return Statement(name, version, expires, hashlib.sha256(manifest).hexdigest(), len(manifest))


def new_key() -> tuple[bytes, str]:
    """A private key as PEM (PKCS 8), and its public key as a line for a trust file."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, base64.b64encode(key.public_key().public_bytes_raw()).decode()


def signed(statement: Statement, private_key: bytes) -> bytes:
    """The content of bundle.sig. private_key: PEM. Raises SignatureError for what is no Ed25519 key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private_key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"this is no private key in PEM: {error}: make one with `aiflow bundle key`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError("this key is not of Ed25519: make one with `aiflow bundle key`")
    line = msgspec.json.encode(statement)
    _statement(line)  # a value outside its bounds
    return line + b"\n" + base64.b64encode(key.sign(CONTEXT + line)) + b"\n"


def verified(data: bytes, trust: Trust) -> Statement:
    """The statement of a bundle.sig that one of these keys has signed. Raises SignatureError."""
    signer(data, trust)
    return claimed(data)


def signer(data: bytes, trust: Trust) -> bytes:
    """Which of these keys has signed a bundle.sig. Raises SignatureError if none has."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    line, signature = _parts(data)
    for key in trust:
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, CONTEXT + line)
            break
        except InvalidSignature:
            continue
    else:
        raise SignatureError(
            f"none of the {len(trust)} trusted keys has signed this: sign it with one of theirs, or add its signer's "
            "public key to the trust file"
        )
    return key


def claimed(data: bytes) -> Statement:
    """The statement of a bundle.sig, whoever has signed it. Raises SignatureError."""
    return _statement(_parts(data)[0])


def _parts(data: bytes) -> tuple[bytes, bytes]:
    """The signed line, and the signature."""
    lines = data.split(b"\n") if len(data) <= MAX_SIGNATURE_BYTES else []
    try:
        line, text, end = lines
        signature = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        line, signature, end = b"", b"", b""
    if len(signature) != SIGNATURE_BYTES or end:
        raise SignatureError(
            f"this is no signature: want two lines and at most {MAX_SIGNATURE_BYTES} bytes, as `aiflow bundle sign` "
            "writes them"
        )
    return line, signature


def _statement(line: bytes) -> Statement:
    try:
        return msgspec.json.decode(line, type=Statement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SignatureError(f"the statement of a signature: {error}: update the older side") from error


def check_new(statement: Statement, highest: int, today: date) -> None:
    """Whether a board may still install it. highest: version that was installed of the keys that are trusted now.

    Raises SignatureError.
    """
    if today > statement.expires:
        raise SignatureError(
            f"bundle {statement.name} version {statement.version} expired on {statement.expires}: sign it again"
        )
    if statement.version <= highest:
        raise SignatureError(
            f"bundle {statement.name} has version {statement.version}, and {highest} was installed before: sign it "
            "with a higher version"
        )


def check_clock(today: date) -> None:
    """Whether expiry dates can be judged. Raises SignatureError."""
    if today.year < FIRST_YEAR:
        raise SignatureError(
            f"this board's clock says {today}, so whether a bundle has expired is unknown: offer it again when the "
            "clock is right (connect the board to a network, start a time service)"
        )


def read_signature(folder: Path) -> bytes:
    """The content of a bundle's bundle.sig, b"" if it has none. Raises SignatureError."""
    path = folder / SIGNATURE
    try:
        return read_bounded(path, MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise SignatureError(f"{path} cannot be read: {error.strerror}") from error


def required_signature(folder: Path) -> bytes:
    """The same, for boards with a trust file. Raises SignatureError if there is none."""
    if data := read_signature(folder):
        return data
    raise SignatureError(
        f"{folder} is unsigned, it has no {SIGNATURE}: a board with a trust_file runs it only as the bundle of its "
        "[board], and does not install it; one without a trust_file installs it from a folder. Sign it with: "
        f"aiflow bundle sign --key signing.pem --version N {folder}"
    )


def read_trust(path: Path) -> Trust:
    """The keys of a trust file: one per line, in base64, with an optional comment behind it. Raises ConfigError, and
    MissingPackageError now, not when the first signature is checked.
    """
    require("cryptography")
    try:
        text = read_bounded(path, MAX_KEY_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trust file {path} cannot be read: {error}") from error
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split(maxsplit=1)
        try:
            key = base64.b64decode(words[0], validate=True) if words else b""
        except (ValueError, binascii.Error):
            key = b"?"
        if key and len(key) != KEY_BYTES:
            raise ConfigError(f"{path}, line {number}: no public key: want one as `aiflow bundle key` prints it")
        keys += [key] if key else []
    if not 1 <= len(keys) <= MAX_KEYS:
        raise ConfigError(f"trust file {path} has {len(keys)} keys: want 1 to {MAX_KEYS}, one per line")
    return tuple(keys)
