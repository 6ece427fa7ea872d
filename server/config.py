"""The server's configuration: one TOML file, read and checked as a whole at start, then passed on as frozen values."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_runtime.config import Id, MetricsConfig, StationId
from edge_runtime.mqtt import MqttConfig, MqttSettings
from edge_runtime.wire import MAX_ENVELOPE
from edge_runtime.wire.envelope import Share
from server.escalation import Bounds

MAX_REPLY = 64 * 1024  # bytes from the tier above: the longest text, scores and hops; they fit an envelope again


class ServerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The server and what it answers with."""

    id: StationId
    bundle: str  # directory of the bundle
    site: Id = "home"
    pool: Id = "servers"  # the servers of a pool share the requests of the site
    tier: Literal["edge", "cloud"] = "edge"  # which target of the bundle it answers with
    device: Annotated[
        str, Meta(pattern=r"^(cpu|cuda(:[0-9]{1,2})?)\Z", description='"cpu", "cuda" or, of several, "cuda:1"')
    ] = "cpu"
    threads: Annotated[int, Meta(ge=1, le=256)] = 1  # of the networks on a CPU; the bits of the answers depend on it
    max_batch: Annotated[int, Meta(ge=1, le=8)] = 8  # requests per pass, as far as the start test allows
    batch_wait_ms: Annotated[float, Meta(ge=0, le=1000)] = 2.0  # for others, if the last ones came together
    queue: Annotated[int, Meta(ge=1, le=4096)] = 64  # requests that wait; when full, boards are told to come back later
    pictures: bool = True  # false: requests with a picture are refused, only latents are answered
    questions_folder: Annotated[str, Meta(min_length=1)] | None = None  # whose files a message may load; none: none
    stop_s: Annotated[float, Meta(ge=0, le=600)] = 10.0  # to finish accepted requests when told to stop


class UpstreamConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The tier above. An edge server asks it as a board would, with its own id as the id of the board."""

    mqtt: MqttConfig
    site: Id = "home"
    min_confidence: Share = 0.9  # pass texts below it up; a request may ask for more, not for less
    max_share: Share = 0.45  # pass up at most this fraction, the least sure; requests that ask for it come on top
    max_requested_share: Share = 1.0  # pass up at most this fraction of each board's answers because the board asks
    explore: Share = 0.02  # of this fraction, pass up others too, to measure what it changes
    open_requests: Annotated[int, Meta(ge=1, le=4096)] = 64  # when full, the edge answers alone
    resend_ms: Annotated[int, Meta(ge=20, le=60_000)] = 1500  # without a reply; then asked again

    def bounds(self) -> Bounds:
        """What may be passed up. One board may hold half of the open requests, so that the others always get some."""
        half = (self.open_requests + 1) // 2
        return Bounds(self.min_confidence, self.max_share, self.explore, self.max_requested_share, half)

    def settings(self, server: str) -> MqttSettings:
        """Raises ConfigError if no connection can ever work."""
        return self.mqtt.settings(
            f"{server}-up",  # a second client id: both connections may be to one broker
            window=32,
            queue_messages=2 * self.open_requests,
            max_inbound_bytes=MAX_REPLY,
        )


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """server.toml."""

    server: ServerConfig
    mqtt: MqttConfig = MqttConfig()
    questions: dict[str, str] = {}  # taught ones, which boards ask by name: name to file
    upstream: UpstreamConfig | None = None
    metrics: MetricsConfig | None = None

    def mqtt_settings(self) -> MqttSettings:
        """Raises ConfigError if no connection can ever work."""
        queue = self.server.queue
        return self.mqtt.settings(
            self.server.id,
            window=32,
            queue_messages=4 * queue,  # a reply for each request that waits, and as many refusals
            max_inbound_bytes=MAX_ENVELOPE + 1024,  # and its topic and properties
            receive_maximum=queue,  # requests are acknowledged when accepted, so the broker keeps the rest
        )
