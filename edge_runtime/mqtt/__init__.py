"""The one MQTT 5 client of board and server: `MqttClient`, its settings, and the values that go in and come out.

It promises bounded queues, one outcome per message, and a connection that comes back whatever the broker does; see
client.py. It knows nothing of topics and payloads.
"""

from edge_runtime.mqtt.client import MqttClient, State, connection_text
from edge_runtime.mqtt.connection import Message, Publish
from edge_runtime.mqtt.send_queue import Outcome
from edge_runtime.mqtt.settings import MqttConfig, MqttSettings, Timing

__all__ = [
    "Message",
    "MqttClient",
    "MqttConfig",
    "MqttSettings",
    "Outcome",
    "Publish",
    "State",
    "Timing",
    "connection_text",
]
