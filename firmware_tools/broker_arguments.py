"""How a command reaches a broker: the arguments, and the settings of the client."""

import argparse
from typing import TYPE_CHECKING

from testbed.terminal import number

if TYPE_CHECKING:
    from edge_runtime.mqtt import MqttConfig


def add_broker_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="of the broker (default: 127.0.0.1)")
    parser.add_argument("--port", type=number, default=1883, help="default: 1883")
    parser.add_argument("--username", metavar="NAME", help="to log in with")
    parser.add_argument("--password-file", metavar="FILE", help="its first line is the password")
    parser.add_argument("--tls", action="store_true", help="trust the system's authorities")
    parser.add_argument("--ca-file", metavar="FILE", help="trust this authority instead; implies TLS")
    parser.add_argument("--cert-file", metavar="FILE", help="a client certificate to log in with; implies TLS")
    parser.add_argument("--key-file", metavar="FILE", help="its key")
    parser.add_argument("--insecure", action="store_true", help="plain text to a broker that is not on this machine")


def broker_of(args: argparse.Namespace) -> "MqttConfig":
    from edge_runtime.mqtt import MqttConfig

    return MqttConfig(
        host=args.host,
        port=args.port,
        username=args.username,
        password_file=args.password_file,
        ca_file=args.ca_file,
        cert_file=args.cert_file,
        key_file=args.key_file,
        tls=args.tls,
        insecure=args.insecure,
    )
