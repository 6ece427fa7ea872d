"""A whole site on a broker that a test has set up: a board, a server and a user."""

import json
import threading

from edge_runtime.app import run_board
from edge_runtime.config import RuntimeConfig
from edge_runtime.mqtt.client import Message, MqttClient, MqttSettings
from edge_runtime.wire import Event, topics
from server.config import Config
from server.service import run_server
from tests.listener import PATIENCE_S


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
        with MqttClient(person, subscriptions=[(f"aiflow/{site}/#", 1)], on_message=on_message):
            assert proven.wait(PATIENCE_S)
            run_board(board, threading.Event(), events.append)
            assert [event.type for event in events] == ["new", "update"]
            assert heard.wait(PATIENCE_S)
    finally:
        stop.set()
        serving.join(PATIENCE_S)
