"""A whole site on a broker that a test has set up: a board, a server and a user."""

import json
import threading
from pathlib import Path

from edge_runtime.app import run_board
from edge_runtime.config import RuntimeConfig
from edge_runtime.mqtt import Message, MqttClient, MqttConfig, MqttSettings
from edge_runtime.wire import Event, topics
from firmware_tools.site_broker import Site, write_site
from server.app import run_server
from server.config import Config
from tests.brokers import Mosquitto
from tests.listener import PATIENCE_S


def site_broker(folder: Path, site: Site) -> Mosquitto:
    """A Mosquitto as `aiflow broker config` sets it up, in plain text on loopback; start it with `with`."""
    write_site(folder, site, port=1, broker_folder=str(folder / "broker"))
    config = (folder / "broker" / "aiflow.conf").read_text()
    return Mosquitto(folder, config.replace("listener 1 ", "listener {port} ") + "persistence false\n")


def login(folder: Path, name: str, port: int) -> MqttConfig:
    """How this account reaches that broker."""
    return MqttConfig(port=port, username=name, password_file=str(folder / "passwords" / name))


def assert_answered(board: RuntimeConfig, server: Config, person: MqttSettings) -> None:
    """The broker delivers to the server, the server answers the board's one photo, and the user receives the events."""
    proven, heard, stop, events = threading.Event(), threading.Event(), threading.Event(), list[Event]()
    site, status = board.board.site, topics.server_status(server.server.site, server.server.id)

    def on_message(message: Message) -> None:
        if message.topic == status and json.loads(message.payload).get("share_proven"):
            proven.set()
        if message.topic == topics.event(site, board.board.id):
            heard.set()

    serving = threading.Thread(target=run_server, args=(server, stop))
    serving.start()
    try:
        filters = [(topics.server_statuses(site), 1), (f"aiflow/{site}/+/up/event", 1)]
        with MqttClient(person, subscriptions=filters, on_message=on_message):
            assert proven.wait(PATIENCE_S)
            run_board(board, threading.Event(), events.append)
            assert [event.type for event in events] == ["new", "update"]
            assert heard.wait(PATIENCE_S)
    finally:
        stop.set()
        serving.join(PATIENCE_S)
