"""The server's configuration: one TOML file, read and checked whole at start, then handed down as values."""

from typing import Annotated

from msgspec import Meta, Struct

from edge_runtime.config import Id, MetricsConfig, MqttConfig, StationId
from edge_runtime.mqtt.client import MqttSettings
from edge_runtime.wire import MAX_ENVELOPE
from edge_runtime.wire.envelope import Share

MAX_REPLY = 64 * 1024  # bytes from the tier above: the longest text, scores and hops, which then fit an envelope again


class ServerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The server and what it answers with."""

    id: StationId
    bundle: str  # directory of the bundle
    site: Id = "home"
    pool: Id = "servers"  # servers of one pool share the site's requests between them
    tier: Annotated[str, Meta(pattern="^(edge|cloud)$")] = "edge"  # which of the bundle's targets it answers with
    device: Annotated[str, Meta(pattern="^(cpu|cuda(:[0-9]+)?)$")] = "cpu"
    threads: Annotated[int, Meta(ge=1, le=256)] = 1  # of the networks on a CPU; answers' bits depend on it
    max_batch: Annotated[int, Meta(ge=1, le=8)] = 8  # rows of a pass; used as far as the start test proves it
    batch_wait_ms: Annotated[float, Meta(ge=0, le=1000)] = 2.0  # for more rows, where the last ones came together
    queue: Annotated[int, Meta(ge=1, le=4096)] = 64  # requests waiting; then boards are told to come back
    stop_s: Annotated[float, Meta(ge=0, le=600)] = 10.0  # to finish what was accepted, when told to stop


class UpstreamConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The tier above: an edge server asks it as a board would, under its own id as the board's."""

    mqtt: MqttConfig
    site: Id = "home"
    min_confidence: Share = 0.9  # a text below it is passed up; a request may ask for more, not for less
    max_share: Share = 0.45  # of the answers, the least sure, are passed up in the long run; on request more
    explore: Share = 0.02  # of the others are passed up too, out of that share, to see what it changes
    open_requests: Annotated[int, Meta(ge=1, le=4096)] = 64  # waiting for the tier above; then the edge answers alone
    resend_ms: Annotated[int, Meta(ge=20, le=60_000)] = 1500  # without a reply for at least so long: asked again

    def settings(self, server: str) -> MqttSettings:
        """Raises ConfigError if no connection can ever work."""
        return self.mqtt.settings(
            f"{server}-up",  # not the server's own: both connections may be to one broker
            window=32,
            queue_messages=2 * self.open_requests,
            max_inbound_bytes=MAX_REPLY,
        )


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """server.toml."""

    server: ServerConfig
    mqtt: MqttConfig = MqttConfig()
    upstream: UpstreamConfig | None = None
    metrics: MetricsConfig | None = None

    def mqtt_settings(self) -> MqttSettings:
        """Raises ConfigError if no connection can ever work."""
        queue = self.server.queue
        return self.mqtt.settings(
            self.server.id,
            window=32,
            queue_messages=4 * queue,  # a reply for each request that waits, and for as many that are refused at once
            max_inbound_bytes=MAX_ENVELOPE + 1024,  # and its topic and properties
            receive_maximum=queue,  # what arrives is acknowledged as it is accepted, so the broker keeps the rest
        )
