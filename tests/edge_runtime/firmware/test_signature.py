"""Only a trusted key makes a bundle installable, and only a newer and valid one."""

from contextlib import suppress
from datetime import date

import pytest
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.firmware.signature import (
    MAX_SIGNATURE_BYTES,
    MAX_VERSION,
    SignatureError,
    Statement,
    check_new,
    claimed,
    read_trust,
    signed,
    verified,
)
from tests.edge_runtime.firmware.helpers import KEY, OTHER_KEY, trust

STATEMENT = Statement("porch", 3, date(2030, 6, 30), "ab" * 32, 4000)
SIGNED = signed(STATEMENT, KEY[0])


@given(
    st.builds(
        Statement,
        st.from_regex(r"\A[a-z0-9.-]{1,64}\Z"),
        st.integers(1, MAX_VERSION),
        st.dates(),
        st.binary(min_size=32, max_size=32).map(bytes.hex),
        st.integers(1, 1000),
    )
)
def test_what_was_signed_is_read_again(tmp_path_factory, statement):
    keys = trust(tmp_path_factory.mktemp("trust"))
    data = signed(statement, KEY[0])
    assert verified(data, keys) == claimed(data) == statement
    assert len(data) <= MAX_SIGNATURE_BYTES


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_a_changed_byte_is_found(tmp_path_factory, place, change):
    keys = trust(tmp_path_factory.mktemp("trust"))
    data = bytearray(SIGNED)
    data[place] ^= change
    with pytest.raises(SignatureError):
        verified(bytes(data), keys)


@given(st.binary(max_size=2 * MAX_SIGNATURE_BYTES))
def test_any_bytes_are_refused_by_name(tmp_path_factory, data):
    keys = trust(tmp_path_factory.mktemp("trust"))
    with pytest.raises(SignatureError):
        verified(data, keys)
    with suppress(SignatureError):
        claimed(data)


def test_a_foreign_signature_is_refused_and_a_second_key_is_accepted(tmp_path):
    data = signed(STATEMENT, OTHER_KEY[0])
    with pytest.raises(SignatureError, match="none of the 1 trusted keys"):
        verified(data, trust(tmp_path))
    assert verified(data, trust(tmp_path, KEY, OTHER_KEY)) == STATEMENT


def test_a_key_that_signed_the_same_bytes_for_another_purpose_has_not_signed_the_bundle(tmp_path):
    import base64

    line = SIGNED.split(b"\n")[0]
    key = load_pem_private_key(KEY[0], None)
    assert isinstance(key, Ed25519PrivateKey)
    forged = line + b"\n" + base64.b64encode(key.sign(line)) + b"\n"
    with pytest.raises(SignatureError, match="none of the"):
        verified(forged, trust(tmp_path))


def test_only_an_ed25519_key_signs():
    other = Ed448PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for key, why in ((other, "Ed25519"), (b"no key", "private key"), (KEY[1].encode(), "private key")):
        with pytest.raises(SignatureError, match=why):
            signed(STATEMENT, key)


@pytest.mark.parametrize(
    ("highest", "today", "why"),
    [(3, date(2030, 1, 1), "3 was installed"), (7, date(2030, 1, 1), "7 was"), (2, date(2030, 7, 1), "expired")],
)
def test_an_older_the_same_and_an_expired_version_are_refused(highest, today, why):
    with pytest.raises(SignatureError, match=why):
        check_new(STATEMENT, highest, today)
    check_new(STATEMENT, 2, date(2030, 6, 30))


@pytest.mark.parametrize("text", ["", "# nothing\n", "not base64\n", "YWJj\n", f"{KEY[1]}\n" * 17])
def test_a_trust_file_without_keys_or_with_others_is_refused_by_name(tmp_path, text):
    (tmp_path / "trust").write_text(text)
    with pytest.raises(ConfigError, match="trust"):
        read_trust(tmp_path / "trust")


def test_a_trust_file_may_have_comments(tmp_path):
    (tmp_path / "trust").write_text(f"# ours\n\n{KEY[1]} # the office\n{OTHER_KEY[1]} next year's\n")
    assert len(read_trust(tmp_path / "trust")) == 2
