"""The table [frigate] of board.toml: where Frigate publishes, and whether it gets the answers; docs/frigate.md."""

from typing import Annotated

from msgspec import Meta, Struct

from edge_runtime.errors import ConfigError
from edge_runtime.http_call import check_ca_file, host_of
from edge_runtime.mqtt.settings import TopicPrefix, is_loopback
from edge_runtime.password_file import read_token


class FrigateConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """How a board works with Frigate. The defaults do for cameras that are only read."""

    prefix: TopicPrefix = "frigate"  # `topic_prefix` of Frigate's MQTT settings
    # The rest is for answers that go back into Frigate.
    url: Annotated[str, Meta(min_length=1, max_length=512)] | None = None  # without /api; None: none go back
    token_file: str | None = None  # its first line is a token of a Frigate user with the role admin
    ca_file: str | None = None  # the authorities that sign Frigate's certificate; None: those of the system
    insecure: bool = False  # true allows plain HTTP to another machine, and HTTPS without a check of the certificate
    description: bool = True  # the text becomes the event's description
    # What becomes its sub label: "label", or the likeliest class of this question; None: nothing.
    sub_label: Annotated[str, Meta(min_length=1, max_length=32)] | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.url is None:
            for key in ("token_file", "ca_file", "insecure", "sub_label"):
                if getattr(self, key):
                    raise ConfigError(f"[frigate] has {key}, which is of no use without url: set url, or remove {key}")
            return
        if not self.description and not self.sub_label:
            raise ConfigError(
                "[frigate] has url, but description = false and no sub_label: set one of them, or remove url"
            )
        if not (host := host_of(self.url)):
            raise ConfigError(
                "url of [frigate] wants an address such as https://frigate.lan:8971, without a login and without ? or "
                "#; a token belongs into token_file"
            )
        if self.url.lower().startswith("http:") and not self.insecure and not is_loopback(host):
            raise ConfigError(
                f"url of [frigate] names {host}, which is not this machine, and is http: everybody on the way could "
                "read the answers and the token; use https, or set insecure = true on a network that you trust"
            )

    def check_files(self) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self.token()
        check_ca_file(self.ca_file, "[frigate]")

    def token(self) -> str | None:
        """The token, read anew. Raises ConfigError, which never shows it."""
        return None if self.token_file is None else read_token(self.token_file, "[frigate]", "token_file")
