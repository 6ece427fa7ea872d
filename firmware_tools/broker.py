"""`aiflow broker config`: accounts, rights, bounds and certificates for a site's Mosquitto."""

import argparse
from pathlib import Path

from edge_runtime.errors import AiflowError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config = parser.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "config",
        help="write the files that a site's Mosquitto and its clients need",
        description="Writes the configuration of a site's Mosquitto, a password for each account, and certificates. "
        "Run it again with all names after a change: what fits is kept.",
    )
    config.add_argument("--site", default="home", metavar="ID", help="default: home")
    config.add_argument(
        "--boards",
        required=True,
        type=_names,
        metavar="NAME[:CAMERA...],...",
        help="boards; with the cameras whose switches people use over this broker, as in porch:front:yard,gate",
    )
    config.add_argument("--servers", required=True, type=_names, metavar="NAME,...", help="servers")
    config.add_argument(
        "--people", default=[], type=_names, metavar="NAME,...", help="who watches; one name for each program"
    )
    config.add_argument(
        "--homeassistant", default=[], type=_names, metavar="NAME,...", help="accounts of Home Assistant, one for each"
    )
    config.add_argument("--discovery-prefix", default="homeassistant", metavar="PREFIX", help="default: homeassistant")
    config.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the files go")
    config.add_argument("--remove", default=[], type=_names, metavar="NAME,...", help="accounts that lose access")
    tls = config.add_mutually_exclusive_group()
    tls.add_argument("--tls-cert", type=Path, metavar="FILE", help="the broker's certificate chain, PEM")
    tls.add_argument(
        "--make-tls", default=[], nargs="+", metavar="HOST", help="make it: the broker's names and addresses"
    )
    tls.add_argument("--no-tls", action="store_true", help="plain text on loopback alone, also if it had TLS before")
    config.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's key, PEM")
    config.add_argument("--pool", default="servers", metavar="ID", help="the servers' pool (default: servers)")
    config.add_argument(
        "--port", type=int, metavar="N", help="default: as before, else 8883 with TLS, and 1883 without"
    )
    config.add_argument("--pictures", action="store_true", help="people may send boards pictures of up to 8 MB")
    config.add_argument("--broker-dir", metavar="DIR", help="the files' place there (default: /etc/mosquitto/aiflow)")
    config.add_argument(
        "--plugin", metavar="FILE", help="mosquitto_dynamic_security.so, if the broker does not find it"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> None:
    """Writes the files and prints where each of them goes."""
    from firmware_tools import site_broker

    site = site_broker.Site(
        args.site,
        [site_broker.Board(board, cameras) for board, *cameras in (name.split(":") for name in args.boards)],
        args.servers,
        args.people,
        pool=args.pool,
        takes_pictures=args.pictures,
        home_assistants=args.homeassistant,
        discovery_prefix=args.discovery_prefix,
    )
    if bool(args.tls_cert) != bool(args.tls_key):
        raise AiflowError("--tls-cert and --tls-key: want both or neither")
    folder = args.broker_dir or site_broker.BROKER_FOLDER
    try:
        result = site_broker.write_site(
            args.out,
            site,
            make_tls=args.make_tls,
            tls_files=(args.tls_cert, args.tls_key) if args.tls_cert else None,
            no_tls=args.no_tls,
            remove=args.remove,
            port=args.port,
            broker_folder=folder,
            plugin=args.plugin or site_broker.PLUGIN,
        )
    except OSError as error:
        raise AiflowError(f"{args.out} cannot be written: {error}: name another folder") from error
    print(site_broker.instructions(args.out, site, result, folder))
