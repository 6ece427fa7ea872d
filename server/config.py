"""The server's configuration: one TOML file, read and checked as a whole at start, then passed on as frozen values."""

import os.path
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_runtime.config import Id, MetricsConfig, PromptName, StationId
from edge_runtime.errors import ConfigError
from edge_runtime.http_call import check_ca_file, host_of
from edge_runtime.mqtt import MqttConfig, MqttSettings
from edge_runtime.mqtt.settings import is_loopback
from edge_runtime.password_file import read_token
from edge_runtime.wire import MAX_ENVELOPE
from edge_runtime.wire.envelope import Share
from server.escalation import Bounds
from server.prompts import DEFAULT, Prompt, PromptConfig, check_usual, read_prompts

CAPTION = "caption"  # name of the prompt on which the language model was trained
MAX_REPLY = 64 * 1024  # bytes from the tier above: the longest text, scores and hops; they fit an envelope again


class ServerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The server and what it answers with."""

    id: StationId
    bundle: str | None = None  # directory of the bundle; with another target than "bundle", for the boards' drafts
    second_bundle: str | None = None  # of boards that move from or to `bundle`; their questions are those of `bundle`
    target: Annotated[
        str,
        Meta(
            pattern=r"^(bundle|lm|(openai|vllm):https?://[!-~]{1,512}|hf:[!-~]{1,512})\Z",
            description='"bundle", "lm", "openai:http://HOST/v1", "vllm:http://HOST/v1" or "hf:FOLDER_OR_NAME"',
        ),
    ] = "bundle"  # the bundle's networks, a language model behind them, another server, or a transformers model
    site: Id = "home"
    pool: Id = "servers"  # the servers of a pool share the requests of the site
    tier: Literal["edge", "cloud"] = "edge"  # which target of the bundle it answers with
    device: Annotated[
        str, Meta(pattern=r"^(cpu|cuda(:[0-9]{1,2})?)\Z", description='"cpu", "cuda" or, of several, "cuda:1"')
    ] = "cpu"
    threads: Annotated[int, Meta(ge=1, le=256)] = 1  # of the networks on a CPU; the bits of the answers depend on it
    # Batches of the bundle's networks at the same time, each on `threads` of its own; none: 2, if there are the cores.
    calls: Annotated[int, Meta(ge=1, le=64)] | None = None
    max_batch: Annotated[int, Meta(ge=1, le=8)] = 8  # requests per pass, as far as the start test allows
    batch_wait_ms: Annotated[float, Meta(ge=0, le=1000)] = 2.0  # for others, if the last ones came together
    queue: Annotated[int, Meta(ge=1, le=4096)] = 64  # requests that wait; when full, boards are told to come back later
    pictures: bool = True  # false: requests with a picture are refused, only latents are answered
    questions_folder: Annotated[str, Meta(min_length=1)] | None = None  # whose files a message may load; none: none
    stop_s: Annotated[float, Meta(ge=0, le=600)] = 10.0  # to finish accepted requests when told to stop


USUAL_INPUT_TOKENS = 1500  # of a picture and a prompt, to estimate a cost before there was a call


class OpenAIConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Another server that answers pictures, with the chat completions of OpenAI's API: "openai:..." and "vllm:..."."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]  # as that server calls it
    prompt: PromptName = DEFAULT  # for requests that name none
    key_file: str | None = None  # its first line is the key; secrets come from files only
    ca_file: str | None = None  # the authorities that sign its certificate; none: those of the system
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] = 100  # longest text, unless the prompt says otherwise
    prediction: bool = False  # true: the board's draft is sent as OpenAI's predicted output
    calls: Annotated[int, Meta(ge=1, le=64)] = 4  # at the same time
    timeout_s: Annotated[float, Meta(ge=0.1, le=600)] = 60.0  # of one call; a request's deadline may be sooner
    input_price: Annotated[float, Meta(ge=0, le=1e6)] = 0.0  # per million tokens of prompt and picture
    output_price: Annotated[float, Meta(ge=0, le=1e6)] = 0.0  # per million tokens of the text
    currency: Annotated[str, Meta(min_length=1, max_length=8)] = "USD"  # of prices and budget
    # No calls when it is spent, until the next day in UTC.
    budget_per_day: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    spent_file: str | None = None  # keeps over a restart what was spent today
    insecure: bool = False  # true allows plain http to a server that is not on this machine

    def check(self, url: str, prompts: Mapping[str, Prompt]) -> None:
        """Raises ConfigError for what can never work, and for an address that would send pictures in the clear."""
        check_usual(self.prompt, prompts, "[openai]")
        if self.budget_per_day and not self.is_priced:
            raise ConfigError("budget_per_day without a price never ends: set input_price and output_price in [openai]")
        estimate = self.estimate(prompts.values())
        if self.budget_per_day and estimate > self.budget_per_day:
            raise ConfigError(
                f"budget_per_day = {self.budget_per_day}, but one answer may cost {estimate:.6g} {self.currency}: "
                "want more, or a lower max_tokens"
            )
        if self.spent_file and not self.budget_per_day:
            raise ConfigError("spent_file without budget_per_day is of no use: set both in [openai], or none")
        if not (host := host_of(url)):
            raise ConfigError(
                'target = "openai:..." or "vllm:..." wants an address such as http://127.0.0.1:8080/v1, with a host, '
                "without a login and without ? or #; a key belongs into key_file of [openai]"
            )
        if url.rstrip("/").endswith("/chat/completions"):
            raise ConfigError(
                "the address in target ends in /chat/completions: leave out /chat/completions, which this server adds"
            )
        if url.lower().startswith("http:") and not self.insecure and not is_loopback(host):
            raise ConfigError(
                f"target on {host} is not on this machine and its address is http: everybody on the way could read the "
                "pictures and the key; use https, or set insecure = true in [openai] on a network that you trust"
            )
        self.key()
        check_ca_file(self.ca_file, "[openai]")

    def estimate(self, prompts: Iterable[Prompt] = ()) -> float:
        """An estimate of the cost of a call before the first one, in the currency."""
        asked = list(prompts)
        frames = max((prompt.frames for prompt in asked), default=1)
        longest = max(self.max_tokens, *(prompt.max_tokens or 0 for prompt in asked), 0)
        return self.cost(frames * USUAL_INPUT_TOKENS, longest)

    @property
    def is_priced(self) -> bool:
        return bool(self.input_price or self.output_price)

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """In the currency."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6

    def key(self) -> str | None:
        """The first line of key_file. Raises ConfigError, which never shows the key."""
        return None if self.key_file is None else read_token(self.key_file, "[openai]", "key_file")


class HuggingFaceConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """A model of Hugging Face transformers in this process."""

    prompt: PromptName = DEFAULT  # for requests that name none
    max_tokens: Annotated[int, Meta(ge=1, le=1024)] = 60  # longest text, unless the prompt says otherwise
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tail: Annotated[str, Meta(min_length=1)] | None = None  # folder of `aiflow distil`: features are answered, too
    # A smaller language model of the same family, a folder or a name on the hub: proposes tokens.
    assistant: Annotated[str, Meta(min_length=1)] | None = None
    offline: bool = True  # false: a model that is not on this machine is downloaded at the first start

    def check(self, server: ServerConfig, prompts: Mapping[str, Prompt]) -> None:
        """Raises ConfigError for what can never work."""
        check_usual(self.prompt, prompts, "[hf]")
        if server.target.startswith("hf:"):
            check_model(server.target.removeprefix("hf:"))
            if self.assistant:
                check_model(self.assistant)


class LanguageConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The pretrained language model that reads features of the shipped bundle."""

    prompt: PromptName = CAPTION  # for requests that name none
    max_tokens: Annotated[int, Meta(ge=1, le=1024)] = 40  # longest text, unless the prompt says otherwise
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Annotated[str, Meta(min_length=1)] | None = None  # what was learnt; none: the shipped file
    cache: Annotated[str, Meta(min_length=1)] | None = None  # folder for the whole model; none: the user's cache


class VllmConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings for a vLLM server, besides [openai]."""

    tail: Annotated[str, Meta(min_length=1)] | None = None  # folder of `aiflow distil`: features are answered, too


def check_model(name: str) -> None:
    """Raises ConfigError for a path that is not the folder of a model. Any other name may be one on the hub."""
    is_path = os.path.isdir(name) or name.startswith(("/", ".", "~"))  # not pathlib's: that raises if it may not look
    if is_path and not os.path.isfile(os.path.join(name, "config.json")):
        raise ConfigError(f"{name} holds no config.json: want the folder of a transformers model, or a name on the hub")


class RayConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Replicas of the target's networks in a Ray cluster, in place of those of this process."""

    address: Annotated[str, Meta(min_length=1, max_length=256)] | None = None  # of a cluster; none: one for this server
    replicas: Annotated[int, Meta(ge=1, le=1000)] = 2  # at least so many
    max_replicas: Annotated[int, Meta(ge=1, le=1000)] | None = None  # with load; none: always `replicas`
    gpus: Annotated[float, Meta(ge=0, le=16)] = 0.0  # of each; 0.5: two replicas share one
    timeout_s: Annotated[float, Meta(ge=1, le=600)] = 30.0  # of a batch; then another replica is asked

    def __post_init__(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas = {self.max_replicas}, but replicas = {self.replicas}: want no fewer")


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
        """The bounds of passed-up requests. One board may hold half of the open requests: others always get some."""
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
    prompts: dict[str, PromptConfig] = {}  # which boards ask by name, besides `door`
    openai: OpenAIConfig | None = None  # with the targets "openai:..." and "vllm:..."
    vllm: VllmConfig = VllmConfig()  # with the target "vllm:..."
    hf: HuggingFaceConfig = HuggingFaceConfig()  # with the target "hf:..."
    lm: LanguageConfig = LanguageConfig()  # with the target "lm"
    ray: RayConfig | None = None  # with the targets "bundle", "hf:..." and "lm"
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

    @property
    def own_device(self) -> str:
        """The device for networks that this process computes itself: the machines of a cluster have others."""
        return "cpu" if self.ray else self.server.device

    @property
    def tail(self) -> str | None:
        """The folder of a tail that turns features into image tokens for another model."""
        return self.hf.tail or self.vllm.tail

    def read_prompts(self) -> dict[str, Prompt]:
        """By name, with those that the target brings. Raises ConfigError."""
        if self.server.target != "lm":
            return read_prompts(self.prompts)
        from models.captions import QUESTION  # a server of other targets may have no models

        return read_prompts({CAPTION: PromptConfig(QUESTION)} | self.prompts)

    def short_stop(self) -> str:
        """A warning if a call that is paid for may be cut off when the server stops; empty: none."""
        stop_s, asked = self.server.stop_s, self.openai
        if asked is None or not asked.is_priced or stop_s >= asked.timeout_s:
            return ""
        return (
            f"stop_s = {stop_s:g} in [server] is shorter than timeout_s = {asked.timeout_s:g} in [openai]: a stop or a "
            "restart cuts off calls that may be billed, and the boards' copies are paid again; want stop_s at least as "
            "long, then install the service again"
        )

    def hidden_frames(self) -> str:
        """A warning for prompts that show fewer pictures than they say to boards that send features; empty: none."""
        several = sorted(name for name, prompt in self.prompts.items() if prompt.frames > 1)
        if not (self.tail and several):
            return ""
        return (
            f"prompts with frames above 1 are asked about one picture if a board sends features: {', '.join(several)}; "
            'want paradigm = "offload" for cameras with such a prompt, or no `tail`'
        )

    def _check_without_pictures(self) -> None:
        """Raises ConfigError for another model that would get nothing, or never the pictures of a prompt."""
        if not (self.tail or self.server.target == "lm"):
            raise ConfigError("pictures = false, but this target answers pictures only: remove it")
        if hidden := self.hidden_frames():
            raise ConfigError(f"pictures = false, and {hidden}, or remove pictures = false")

    def check_target(self) -> None:
        """Raises ConfigError if the target lacks what it needs, or has what it cannot use."""
        server, (kind, _, where) = self.server, self.server.target.partition(":")
        is_other_server = kind in ("openai", "vllm")
        address = "http://HOST:PORT/v1"
        for name, is_set, kinds, example in (
            ("[openai]", self.openai is not None, ("openai", "vllm"), f"openai:{address}"),
            ("[vllm]", self.vllm != VllmConfig(), ("vllm",), f"vllm:{address}"),
            ("[hf]", self.hf != HuggingFaceConfig(), ("hf",), "hf:FOLDER"),
            ("[lm]", self.lm != LanguageConfig(), ("lm",), "lm"),
            ("[prompts]", bool(self.prompts), ("openai", "vllm", "hf", "lm"), f'openai:{address}" or "hf:FOLDER'),
            ("[ray]", self.ray is not None, ("bundle", "hf", "lm"), 'bundle" or "hf:FOLDER'),
            ("second_bundle", server.second_bundle is not None, ("bundle",), "bundle"),
            ("calls in [server]", server.calls is not None, ("bundle",), "bundle"),
        ):
            if is_set and kind not in kinds:
                raise ConfigError(f'{name} is of no use with target = "{kind}": set target = "{example}", or remove it')
        if kind in ("bundle", "lm") and server.bundle is None:
            raise ConfigError(f'required key `bundle` is missing (in server), which has target = "{kind}"')
        if kind == "bundle":
            if self.ray and server.calls:
                raise ConfigError("calls in [server] is of no use with [ray], which calls its replicas: remove it")
            return
        if self.tail and server.bundle is None:
            raise ConfigError(
                f"`tail` in [{kind}] reads features of the boards' bundle: name it as `bundle` in [server]"
            )
        prompts = self.read_prompts()
        if kind == "lm":
            check_usual(self.lm.prompt, prompts, "[lm]")
        self.hf.check(server, prompts)
        if is_other_server:
            if self.openai is None:
                raise ConfigError(f'target = "{server.target}" needs the table [openai] with the model\'s name')
            self.openai.check(where, prompts)
            if self.openai.prediction and (kind == "vllm" or server.bundle is None):
                raise ConfigError(
                    'prediction = true in [openai] wants target = "openai:..." and the boards\' bundle as `bundle` in '
                    "[server], whose words their drafts have"
                )
        if not server.pictures:
            self._check_without_pictures()
        if self.upstream or self.questions or server.questions_folder:
            raise ConfigError(
                'questions and [upstream] need features and tokens of the bundle: remove them, or set target = "bundle"'
            )
