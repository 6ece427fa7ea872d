"""`aiflow ui`: how the parts of the live page meet."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

from edge_runtime.errors import ConfigError
from edge_runtime.password_file import read_password
from firmware_tools.broker_arguments import add_broker_arguments, broker_settings
from firmware_tools.ui.history import KEEP_DAYS
from testbed.argument_types import number

PORT = 8700
MIN_TOKEN = 16  # characters: nothing limits how often a stranger may guess
CLOSE_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_broker_arguments(parser)
    parser.add_argument("--port", type=number, default=PORT, help=f"port of the page (default: {PORT})")
    parser.add_argument(
        "--listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address of the page (default: 127.0.0.1, this machine alone)",
    )
    parser.add_argument("--token-file", metavar="FILE", help="ask for the first line of this file as a login")
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="keep the texts for the search here (default: until the end)"
    )
    parser.add_argument(
        "--keep-days",
        type=number,
        default=KEEP_DAYS,
        metavar="N",
        help=f"days that the history keeps texts (default: {KEEP_DAYS})",
    )


def run(args: argparse.Namespace) -> int:
    """Serves the page until it is told to stop. Raises ConfigError, TopicError."""
    from edge_runtime.mqtt import MqttClient
    from edge_runtime.shutdown import stop_when_told
    from firmware_tools.ui.history import History
    from firmware_tools.ui.live import Live
    from firmware_tools.ui.meaning import Meaning
    from firmware_tools.ui.site import Site
    from firmware_tools.ui.web import WebServer

    token, settings = _token(args.listen, args.token_file), broker_settings(args, "ui")
    site = Site(args.site)
    stop = stop_when_told(CLOSE_S)
    with ExitStack() as running:  # ends in the opposite order
        history = running.enter_context(History(args.history, args.keep_days))
        meaning = running.enter_context(Meaning(history))
        live = Live(site, history, meaning, settings)
        try:
            server = running.enter_context(WebServer((args.listen, args.port), live, history, meaning, token))
        except (OSError, OverflowError) as error:  # OverflowError: no such port
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--listen {args.listen} --port {args.port}: {why}: choose another address or port"
            ) from error
        client = MqttClient(
            settings,
            subscriptions=site.subscriptions,
            optional=site.optional,
            on_message=live.message_arrived,
            on_state=live.connection_changed,
        )
        running.enter_context(client)
        serving = Thread(target=server.serve_forever, name="web")
        serving.start()
        running.callback(serving.join)
        running.callback(server.shutdown)
        running.callback(live.close)
        print(f"http://{server.host}:{args.port}/", flush=True)
        stop.wait()
    return stop.exit_code


def _token(listen: str, file: str | None) -> str | None:
    """Raises ConfigError."""
    from edge_runtime.mqtt.settings import is_loopback

    if file is None:
        if not is_loopback(listen):
            raise ConfigError(
                f"--listen {listen} lets other machines see the page: add --token-file, which asks them for a login"
            )
        return None
    token = read_password(file, "ui", "--token-file")
    if len(token) < MIN_TOKEN:
        raise ConfigError(
            f"--token-file {file}: a token of {len(token)} characters can be guessed, want {MIN_TOKEN} or more: "
            f"openssl rand -hex 16 >{file}"
        )
    return token
