"""Settings that cannot reach any broker are refused before anything starts, with the fix."""

from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.mqtt.settings import MqttSettings


def settings(**changes: Any) -> MqttSettings:
    return MqttSettings(**{"host": "127.0.0.1", "port": 1883, "client_id": "b1", **changes})


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("secret\n")
    return path


@pytest.mark.parametrize(
    ("host", "fix"),
    [
        ("mqtts://broker.lan:8884", 'want host = "broker.lan", port = 8884, tls = true'),
        ("mqtts://broker.lan", 'want host = "broker.lan", port = 8883, tls = true'),
        ("mqtt://broker.lan/x", 'want host = "broker.lan", port = 1883; as options'),
        ("mqtts://broker.lan:99999", "8883, .*--broker-port 8883 --tls; a port is a number from 1 to 65535"),
        ("broker.lan:0", "1883; .*--broker-port 1883; a port is a number from 1 to 65535"),
        ("broker.lan:8883", 'want host = "broker.lan", port = 8883'),
        ("[::1]:8883", r'want host = "\[::1\]", port = 8883'),
        ("a b", "want the name or address"),
        ("@broker.lan", "want the name or address"),
        ("x" * 254, "want the name or address"),
        ("broker..lan", "want the name or address"),
        ("x" * 64 + ".lan", "want the name or address"),
        ("broker\0.lan", "want the name or address"),
    ],
)
def test_a_host_that_no_broker_can_have_is_refused_with_the_right_spelling(host: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"mqtt host = .*{fix}"):
        settings(host=host, insecure=True)


@pytest.mark.parametrize(
    ("host", "fix"),
    [
        ("mqtt://anna:secret@broker.lan:1884", 'host = "broker.lan", port = 1884, username = "anna" and password_file'),
        ("MQTTS://anna:secret@broker.lan", 'host = "broker.lan", port = 8883, tls = true, username = "anna"'),
        ("anna:secret@broker.lan:1884", 'host = "broker.lan", port = 1884, username = "anna"'),
        ("anna:secret@broker.lan", 'host = "broker.lan", port = 1883, username = "anna"'),
        ("mqtt://anna:secret/@:7@[::1]:1884/x", r'host = "\[::1\]", port = 1884, username = "anna"'),
        (f"mqtt://anna:secret{'x' * 600}@broker.lan", 'host = "broker.lan", port = 1883, username = "anna"'),
    ],
)
def test_a_host_with_a_login_is_refused_with_the_keys_of_a_login_and_without_its_password(host: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"mqtt host = .* want {fix}") as error:
        settings(host=host, insecure=True)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("written", "host"), [("[::1]", "::1"), ("::1", "::1"), ("broker_1.lan", "broker_1.lan")])
def test_an_ipv6_address_may_stand_in_brackets(written: str, host: str) -> None:
    assert settings(host=written, insecure=True).host == host


def test_a_password_without_a_user_is_refused(password: Path) -> None:
    with pytest.raises(ConfigError, match="without a username"):
        settings(password_file=str(password))
    assert settings(password_file=str(password), username="b1").password() == "secret"


def test_a_key_without_its_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="a certificate needs both"):
        settings(key_file="board.key", tls=True)


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\nsecret\n", b"\xef\xbb\xbf\n"])
def test_an_empty_first_line_is_no_password(password: Path, content: bytes) -> None:
    password.write_bytes(content)
    with pytest.raises(ConfigError, match="its first line is empty"):
        settings(password_file=str(password), username="b1")


def test_a_byte_order_mark_is_no_part_of_a_password(password: Path) -> None:
    password.write_bytes(b"\xef\xbb\xbfsecret\r\n")
    assert settings(password_file=str(password), username="b1").password() == "secret"


def test_a_password_in_another_encoding_is_refused_and_not_shown(password: Path) -> None:
    password.write_bytes("geheim\xe4".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8") as refused:
        settings(password_file=str(password), username="b1")
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize(
    ("topic", "advice"),
    [
        ("aiflow/home/yard/down/reply", ': is site = "home" right, and is username = anna the account of yard?'),
        ("$share/servers/aiflow/home/+/up/request", ': is site = "home" right, and is username = anna an account that'),
        ("aiflow/home/+/up/event", ': is site = "home" right, and is username = anna an account that may read this?'),
        ("frigate/events", ""),
    ],
)
def test_a_forbidden_subscription_asks_whether_site_and_account_belong_to_the_topic(topic: str, advice: str) -> None:
    assert settings(username="anna").topic_advice(topic).startswith(advice)
    assert bool(settings(username="anna").topic_advice(topic)) == bool(advice)
