"""The server's configuration: one TOML file, read and checked whole at start, then handed down as values."""

from typing import Annotated

from msgspec import Meta, Struct

from edge_runtime.config import Id, MqttConfig, StationId
from edge_runtime.mqtt import MqttSettings
from edge_runtime.wire import MAX_ENVELOPE


class ServerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The server and what it answers with."""

    id: StationId
    bundle: str  # directory of the bundle
    site: Id = "home"
    pool: Id = "servers"  # servers of one pool share the site's requests between them
    tier: Annotated[str, Meta(pattern="^(edge|cloud)$")] = "edge"
    device: Annotated[str, Meta(pattern="^(cpu|cuda(:[0-9]+)?)$")] = "cpu"
    threads: Annotated[int, Meta(ge=1, le=256)] = 1  # of the networks on a CPU; answers' bits depend on it
    max_batch: Annotated[int, Meta(ge=1, le=8)] = 8  # rows of a pass; used as far as the start test proves it
    batch_wait_ms: Annotated[float, Meta(ge=0, le=1000)] = 2.0  # for more rows, once there is one
    queue: Annotated[int, Meta(ge=1, le=4096)] = 64  # requests waiting; then boards are told to come back
    stop_s: Annotated[float, Meta(ge=0, le=600)] = 10.0  # to finish what was accepted, when told to stop


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """server.toml."""

    server: ServerConfig
    mqtt: MqttConfig = MqttConfig()

    def mqtt_settings(self) -> MqttSettings:
        """Raises MqttConfigError where no connection could ever work."""
        queue = self.server.queue
        return self.mqtt.settings(
            self.server.id,
            window=32,
            queue_messages=4 * queue,  # a reply for each request that waits, and for as many that are refused at once
            max_inbound_bytes=MAX_ENVELOPE + 1024,  # and its topic and properties
            receive_maximum=queue,  # what arrives is acknowledged as it is accepted, so the broker keeps the rest
        )
