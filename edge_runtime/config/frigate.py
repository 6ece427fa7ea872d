"""The table [frigate] of board.toml: where Frigate publishes, and whether it gets the answers; docs/frigate.md."""

import re
import ssl
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from edge_runtime.errors import ConfigError
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
        try:
            parts = urlsplit(self.url)
            host = parts.hostname
            _ = parts.port  # raises ValueError if it is no number
        except ValueError:
            parts, host = urlsplit(""), None
        is_address = host and parts.scheme in ("http", "https") and re.fullmatch("[!-~]+", self.url)
        if not is_address or "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError(
                "url of [frigate] wants an address such as https://frigate.lan:8971, without a login and without ? or "
                "#; a token belongs into token_file"
            )
        if parts.scheme == "http" and not self.insecure and not is_loopback(host or ""):
            raise ConfigError(
                f"url of [frigate] names {host}, which is not this machine, and is http: everybody on the way could "
                "read the answers and the token; use https, or set insecure = true on a network that you trust"
            )

    def check_files(self) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self.token()
        try:
            ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # ssl.SSLError is an OSError
            why = error.strerror or error
            raise ConfigError(f"[frigate] ca_file = {self.ca_file}: cannot be read as PEM: {why}") from error

    def token(self) -> str | None:
        """The token, read anew. Raises ConfigError, which never shows it."""
        return None if self.token_file is None else read_token(self.token_file, "[frigate]", "token_file")
