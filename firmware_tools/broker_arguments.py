"""The options of every command that connects to a broker without a configuration file: the site, the broker, the login.

They are the keys of the table [mqtt]: `--password-file` is its password_file. `host` and `port` are `--broker` and
`--broker-port`, since a command may have a port of its own.
"""

import argparse
import re
import secrets
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.mqtt import MqttSettings

LOCAL = "127.0.0.1"


def add_broker_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("broker")
    group.add_argument("--site", type=topic_level, default="home", metavar="ID", help="default: home")
    group.add_argument("--broker", metavar="HOST", help=f"default: {LOCAL}")
    group.add_argument("--broker-port", type=int, metavar="PORT", help="default: 8883 with TLS, else 1883")
    group.add_argument("--username", metavar="NAME", help="to log in with")
    group.add_argument(
        "--password-file",
        metavar="FILE",
        help="its first line is the password; a board's default: /etc/aiflow/password",
    )
    group.add_argument(
        "--tls",
        action="store_true",
        help="use TLS with the system's authorities; the default for a broker on another machine",
    )
    group.add_argument("--ca-file", metavar="FILE", help="use this authority instead; implies TLS")
    group.add_argument("--cert-file", metavar="FILE", help="a client certificate to log in with; implies TLS")
    group.add_argument("--key-file", metavar="FILE", help="its key")
    group.add_argument("--insecure", action="store_true", help="no TLS to a broker on another machine")


def topic_level(text: str) -> str:
    """An argument's type: the id of a site or a board, or + for all."""
    if not re.fullmatch(r"[a-z0-9-]{1,32}|\+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want 1 to 32 of the characters a-z, 0-9 and -, or + for all")
    return text


def mqtt_table(args: argparse.Namespace) -> dict[str, Any]:
    """The table [mqtt] that these options are, without keys that are left out."""
    from edge_runtime.mqtt.settings import is_loopback

    host = args.broker or LOCAL
    has_files = bool(args.ca_file or args.cert_file)
    tls = not has_files and (args.tls or not (args.insecure or is_loopback(host)))
    port = args.broker_port if args.broker_port is not None else 8883 if tls or has_files else 1883
    names = ("username", "password_file", "ca_file", "cert_file", "key_file", "insecure")
    others = {"tls": tls, **{name: getattr(args, name) for name in names}}
    return {"host": host, "port": port, **{name: value for name, value in others.items() if value}}


def broker_settings(args: argparse.Namespace, command: str) -> "MqttSettings":
    """How to reach the broker, with a client id of this command's own. Raises ConfigError."""
    from edge_runtime.mqtt import MqttConfig

    return MqttConfig(**mqtt_table(args)).settings(f"{command}-{secrets.token_hex(4)}")
