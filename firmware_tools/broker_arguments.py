"""The arguments of commands that show what a site's broker has: the site, the broker, the login."""

import argparse
import re
import secrets
from typing import TYPE_CHECKING

from testbed.terminal import number

if TYPE_CHECKING:
    from edge_runtime.mqtt import MqttSettings


def add_broker_arguments(parser: argparse.ArgumentParser, host: str = "--host", port: str = "--port") -> None:
    """host, port: how this command calls the options that name the broker."""
    parser.add_argument("--site", type=topic_level, default="home", metavar="ID", help="default: home")
    parser.add_argument(
        host,
        dest="broker_host",
        default="127.0.0.1",
        metavar="HOST",
        help="of the broker with the events (default: 127.0.0.1)",
    )
    parser.add_argument(port, dest="broker_port", type=number, default=1883, metavar="PORT", help="default: 1883")
    parser.add_argument("--username", metavar="NAME", help="to log in with")
    parser.add_argument("--password-file", metavar="FILE", help="its first line is the password")
    parser.add_argument("--tls", action="store_true", help="trust the system's authorities")
    parser.add_argument("--ca-file", metavar="FILE", help="trust this authority instead; implies TLS")
    parser.add_argument("--cert-file", metavar="FILE", help="a client certificate to log in with; implies TLS")
    parser.add_argument("--key-file", metavar="FILE", help="its key")
    parser.add_argument("--insecure", action="store_true", help="plain text to a broker that is not on this machine")


def topic_level(text: str) -> str:
    """An argument's type: the id of a site or a board, or + for all."""
    if not re.fullmatch(r"[a-z0-9-]{1,32}|\+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want 1 to 32 of the characters a-z, 0-9 and -, or + for all")
    return text


def broker_settings(args: argparse.Namespace, command: str) -> "MqttSettings":
    """How to reach the broker, with a client id of this command's own. Raises ConfigError."""
    from edge_runtime.mqtt import MqttConfig

    config = MqttConfig(
        host=args.broker_host,
        port=args.broker_port,
        username=args.username,
        password_file=args.password_file,
        ca_file=args.ca_file,
        cert_file=args.cert_file,
        key_file=args.key_file,
        tls=args.tls,
        insecure=args.insecure,
    )
    return config.settings(f"{command}-{secrets.token_hex(4)}")
