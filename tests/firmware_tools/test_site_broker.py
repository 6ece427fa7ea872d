"""The files of `aiflow broker config`, without a broker: names, passwords, certificates, and what a second run does."""

import re
import ssl
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.capture import mqtt_pictures
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig
from edge_runtime.errors import AiflowError
from edge_runtime.password_file import MAX_PASSWORD_BYTES
from edge_runtime.reporting import board_settings
from firmware_tools import certificates
from firmware_tools.certificates import CertificateError
from firmware_tools.cli import EXIT_FAILED, main
from firmware_tools.site_broker import MAX_PICTURE, Board, Login, Site, _switches, mosquitto_conf, write_site

SITE = Site("home", (Board("porch", ("front",)), Board("gate")), ("attic",), ("anna",))
NAMES = ("porch", "gate", "attic", "anna")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logins(folder: Path) -> dict[str, Login]:
    clients = msgspec.json.decode((folder / "broker" / "rights.json").read_bytes())["clients"]
    return {client["username"]: msgspec.convert(client, Login) for client in clients}


def conf_value(conf: str, key: str) -> int:
    return int(next(line.split()[1] for line in conf.splitlines() if line.startswith(f"{key} ")))


# ---- passwords ----


def test_each_account_has_a_password_of_its_own_that_fits_its_hash_and_only_its_owner_reads(tmp_path: Path) -> None:
    result = write_site(tmp_path / "site", SITE)
    assert result.new == NAMES
    passwords = {name: (tmp_path / "site" / "passwords" / name).read_text().strip() for name in NAMES}
    assert len(set(passwords.values())) == len(NAMES)
    assert all(login.fits(passwords[name]) for name, login in logins(tmp_path / "site").items())
    for path in (tmp_path / "site").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_second_run_changes_nothing_and_a_new_account_is_added(tmp_path: Path) -> None:
    write_site(tmp_path, SITE)
    before = files(tmp_path)
    assert write_site(tmp_path, SITE).new == ()
    assert files(tmp_path) == before
    bigger = Site("home", (*SITE.boards, Board("shed")), SITE.servers, SITE.people)
    result = write_site(tmp_path, bigger)
    assert (result.new, result.kept) == (("shed",), ("porch", "gate", "attic", "anna"))
    assert {name: logins(tmp_path)[name] for name in NAMES} == {
        client["username"]: msgspec.convert(client, Login)
        for client in msgspec.json.decode(before["broker/rights.json"])["clients"]
    }


def test_a_password_stays_valid_when_its_file_was_moved_to_its_machine(tmp_path: Path) -> None:
    write_site(tmp_path, SITE)
    before = logins(tmp_path)["porch"]
    (tmp_path / "passwords" / "porch").unlink()
    assert write_site(tmp_path, SITE).new == ()
    assert logins(tmp_path)["porch"] == before
    assert not (tmp_path / "passwords" / "porch").exists()


def test_a_password_that_was_changed_in_its_file_is_the_new_one(tmp_path: Path) -> None:
    write_site(tmp_path, SITE)
    (tmp_path / "passwords" / "anna").write_text("one that anna can remember\n")
    write_site(tmp_path, SITE)
    assert logins(tmp_path)["anna"].fits("one that anna can remember")


def test_an_account_loses_its_access_only_when_that_is_asked_for(tmp_path: Path) -> None:
    write_site(tmp_path, SITE)
    before = files(tmp_path)
    smaller = Site("home", SITE.boards[:1], SITE.servers, SITE.people)
    with pytest.raises(AiflowError, match="--remove gate"):
        write_site(tmp_path, smaller)
    assert files(tmp_path) == before
    assert write_site(tmp_path, smaller, remove=["gate"]).removed == ("gate",)
    assert set(logins(tmp_path)) == {"porch", "attic", "anna"}
    assert not (tmp_path / "passwords" / "gate").exists()
    with pytest.raises(AiflowError, match="named as an account"):
        write_site(tmp_path, smaller, remove=["porch"])


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 5000, b'{"clients": [{"username": 1}]}', b"\xff"])
def test_a_rights_file_of_somebody_else_is_not_overwritten(tmp_path: Path, damage: bytes) -> None:
    write_site(tmp_path, SITE)
    (tmp_path / "broker" / "rights.json").write_bytes(damage)
    with pytest.raises(AiflowError, match="move it away"):
        write_site(tmp_path, SITE)


@pytest.mark.parametrize("damage", [b"", b"\xff", b"x" * (MAX_PASSWORD_BYTES + 1)])
def test_a_password_file_that_no_client_could_use_is_refused(tmp_path: Path, damage: bytes) -> None:
    write_site(tmp_path, SITE)
    (tmp_path / "passwords" / "anna").write_bytes(damage)
    with pytest.raises(AiflowError, match="passwords/anna"):
        write_site(tmp_path, SITE)


# ---- names ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Home"}, "Home"),
        ({"boards": [Board("server")]}, "server"),
        ({"boards": [Board("porch/up")]}, "porch/up"),
        ({"boards": [Board("porch", ("a" * 25,))]}, "a" * 25),
        ({"boards": [Board("porch", ("front/#",))]}, "front/#"),
        ({"servers": ["+"]}, r"'\+'"),
        ({"people": ["anna\n"]}, "anna"),
        ({"people": [""]}, "want names"),
        ({"pool": "$share"}, "share"),
        ({"people": ["porch"]}, "porch: named twice"),
        ({"boards": [Board("porch"), Board("porch")]}, "porch: named twice"),
        ({"boards": []}, "at least one board"),
        ({"servers": []}, "one server"),
        ({"people": [f"p{number}" for number in range(1000)]}, "at most 1000"),
    ],
)
def test_a_name_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    wanted = {"name": "home", "boards": [Board("porch")], "servers": ["attic"]} | changes
    with pytest.raises(AiflowError, match=said):
        Site(**wanted)


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_any_name_is_a_plain_level_of_a_topic_or_an_error(board: str, camera: str, person: str) -> None:
    try:
        site = Site("home", [Board(board, [camera])], ["attic"], [person])
    except AiflowError:
        return
    for rights in site.rights().values():
        assert all(not set(topic) & set("+#\0\n\"' ") for topic in rights.writes)


def test_the_switches_and_the_size_of_pictures_are_those_of_the_board() -> None:
    cameras = (CameraConfig("front", "front.jpg"), CameraConfig("yard", "yard.jpg"))
    config = RuntimeConfig(BoardConfig("porch", "bundle"), cameras)
    switches = [switch.name for switch in board_settings(config)]
    assert sorted(_switches(Board("porch", ("front", "yard")))) == sorted(switches)
    assert MAX_PICTURE == mqtt_pictures.MAX_PICTURE


# ---- bounds ----


def test_no_right_to_write_has_a_wildcard_so_that_retained_messages_are_bounded() -> None:
    for rights in SITE.rights().values():
        assert rights.writes
        assert not any("+" in topic or "#" in topic for topic in rights.writes)


def test_the_bounds_have_room_for_everything_that_may_be_retained() -> None:
    for site in (SITE, Site("home", [Board(f"b{n}", ["c"]) for n in range(50)], ["s1", "s2"], ["p1", "p2"], "x", True)):
        conf = mosquitto_conf(site, True, None, "/etc/mosquitto/aiflow", "plugin.so")
        topics_written = {topic for rights in site.rights().values() for topic in rights.writes}
        packet, queued = conf_value(conf, "max_packet_size"), conf_value(conf, "max_queued_messages")
        assert queued >= len(topics_written)  # or a new subscription misses what is retained
        assert conf_value(conf, "memory_limit") > packet * len(topics_written)
        assert conf_value(conf, "max_connections") > 2 * len(list(site.accounts()))


# ---- certificates ----


def test_a_made_certificate_is_kept_until_the_broker_has_another_name(tmp_path: Path) -> None:
    write_site(tmp_path, SITE, make_tls=["localhost", "127.0.0.1", "::1"])
    before = files(tmp_path)
    write_site(tmp_path, SITE, make_tls=["localhost", "127.0.0.1", "::1"])
    assert files(tmp_path) == before
    certificates._openssl("verify", "-x509_strict", "-CAfile", tmp_path / "ca.pem", tmp_path / "broker" / "broker.pem")
    write_site(tmp_path, SITE, make_tls=["localhost", "broker.lan"])
    after = files(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"broker/broker.pem", "broker/broker.key"}
    assert stat.S_IMODE((tmp_path / "ca.key").stat().st_mode) == 0o600


def test_a_made_certificate_is_renewed_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_site(tmp_path, SITE, make_tls=["localhost"])
    before = files(tmp_path)
    monkeypatch.setattr(certificates, "RENEWAL_DAYS", certificates.CERTIFICATE_DAYS + 1)
    write_site(tmp_path, SITE, make_tls=["localhost"])
    after = files(tmp_path)
    assert after["broker/broker.pem"] != before["broker/broker.pem"]
    assert after["ca.pem"] == before["ca.pem"]


def test_an_authoritys_key_may_be_kept_elsewhere_and_is_asked_for_only_when_it_is_needed(tmp_path: Path) -> None:
    write_site(tmp_path, SITE, make_tls=["localhost"])
    (tmp_path / "ca.key").unlink()
    before = files(tmp_path)
    write_site(tmp_path, SITE, make_tls=["localhost"])
    with pytest.raises(CertificateError, match="put it back"):
        write_site(tmp_path, SITE, make_tls=["broker.lan"])
    assert files(tmp_path) == before


def test_a_certificate_from_files_is_copied_and_one_that_does_not_fit_its_key_is_refused(tmp_path: Path) -> None:
    write_site(tmp_path / "one", SITE, make_tls=["localhost"])
    write_site(tmp_path / "two", SITE, make_tls=["localhost"])
    pem, key, other = (
        tmp_path / "one/broker/broker.pem",
        tmp_path / "one/broker/broker.key",
        tmp_path / "two/broker/broker.key",
    )
    write_site(tmp_path / "three", SITE, tls_files=(pem, key))
    assert (tmp_path / "three/broker/broker.pem").read_bytes() == pem.read_bytes()
    assert not (tmp_path / "three/ca.pem").exists()
    for wrong in (other, tmp_path / "missing", tmp_path / "one/broker/aiflow.conf"):
        with pytest.raises(CertificateError, match="want two PEM files"):
            write_site(tmp_path / "four", SITE, tls_files=(pem, wrong))


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    write_site(tmp_path, SITE, make_tls=["localhost"])
    locked = tmp_path / "locked.key"
    key, pem = tmp_path / "broker/broker.key", tmp_path / "broker/broker.pem"
    certificates._openssl("ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked)
    with pytest.raises(CertificateError, match="without a passphrase"):
        write_site(tmp_path / "other", SITE, tls_files=(pem, locked))


@pytest.mark.parametrize("host", ["", "broker lan", "broker.lan,DNS:evil", "a\nb", "-x", "b" * 300, "*.lan"])
def test_a_name_that_no_machine_has_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(CertificateError, match="not a machine's name"):
        write_site(tmp_path, SITE, make_tls=[host])


def test_without_a_certificate_the_broker_listens_on_loopback_alone() -> None:
    conf = mosquitto_conf(SITE, False, None, "/etc/mosquitto/aiflow", "plugin.so")
    assert [line for line in conf.splitlines() if "listener" in line] == ["listener 1883 127.0.0.1"]


# ---- the command ----


def test_a_site_with_tls_keeps_it_until_the_command_says_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(options: str) -> tuple[str, list[str], str]:
        """The first line of the output, the lines of aiflow.conf about TLS, and all output."""
        words = f"broker config --boards porch --servers attic {options} --out {tmp_path}"
        assert main(words.split()) == 0
        said = capsys.readouterr().out
        conf = (tmp_path / "broker" / "aiflow.conf").read_text().splitlines()
        return said.splitlines()[0], [line for line in conf if re.match("listener|certfile|keyfile", line)], said

    first, tls, _ = config("--make-tls localhost --port 9000")
    assert first.endswith("TLS with a certificate for localhost.")
    assert [line.split()[0] for line in tls] == ["listener", "certfile", "keyfile"]
    assert tls[0] == "listener 9000"
    before = files(tmp_path)
    again, kept, said = config("")
    assert kept == tls
    assert files(tmp_path) == before
    assert again.endswith("TLS with a certificate for localhost.")
    assert "ca.key" in said
    replaced, _, _ = config("--make-tls other.lan")
    assert replaced.endswith("TLS with a certificate for other.lan in place of one for localhost.")
    without, plain, _ = config("--no-tls")
    assert plain == ["listener 1883 127.0.0.1"]
    assert "no TLS" in without
    assert config("")[1] == plain


def test_the_command_writes_the_files_and_says_what_goes_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "broker config --boards porch:front:yard,gate --servers attic --people anna --make-tls localhost --out"
    assert main([*words.split(), str(tmp_path / "site")]) == 0
    said = capsys.readouterr().out
    for name in ("porch", "gate", "attic", "anna", "ca.pem", "/etc/mosquitto/aiflow", "restart"):
        assert name in said
    text = (tmp_path / "site" / "broker" / "rights.json").read_text()
    assert "aiflow/home/porch/up/state/yard_motion" in text
    context = ssl.create_default_context(cafile=str(tmp_path / "site" / "ca.pem"))
    assert context.get_ca_certs()[0]["subject"] == ((("commonName", "aiflow site home"),),)


@pytest.mark.parametrize(
    "words",
    ["--boards x/y --servers attic", "--boards porch --servers attic --tls-cert c.pem", "--boards porch --servers ,"],
)
def test_the_command_ends_with_one_line_for_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert main(["broker", "config", "--out", str(tmp_path / "site"), *words.split()]) == EXIT_FAILED
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "site").exists()
