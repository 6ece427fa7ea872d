"""The board's configuration as one frozen tree of values, `RuntimeConfig`, and what no single key can say.

docs/CONFIGURATION.md lists every key with its default and its range; a test compares it with this file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from edge_runtime.config.camera_source import KEYS, check_source_keys, kind_of, path_of
from edge_runtime.config.conditions import LABEL, MAX_CONDITION, parse_condition
from edge_runtime.config.frigate import FrigateConfig
from edge_runtime.config.toml_file import MAX_SHOWN
from edge_runtime.errors import ConfigError
from edge_runtime.mqtt.settings import MqttConfig, TopicPrefix, can_be_name, is_loopback
from edge_runtime.wire.envelope import GREEDY, MAX_QUESTIONS, MAX_SEED, MAX_STOP, MAX_TOKEN, MAX_TOKENS, Options, Share

MIN_FEATURE_BYTES = 32  # a limit below this is below what a header and a few symbols take
# The description is what a person reads when a value does not match the pattern.
Id = Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,32}\Z", description="an id: 1 to 32 of the characters a-z, 0-9 and -")]
StationId = Annotated[  # a level of a topic at which "server" has a meaning
    str,
    Meta(
        pattern=r"^(?!server\Z)[a-z0-9-]{1,32}\Z",
        description='an id: 1 to 32 of the characters a-z, 0-9 and -, but not "server"',
    ),
]
# With the longest suffix of its run-time settings, "_enabled", a name fits the 32 characters of a level of a topic.
CameraName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_-]{1,24}\Z", description="a name: 1 to 24 of the characters A-Z, a-z, 0-9, _ and -")
]
FrigateCameraName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z", description="the name of a camera in Frigate's configuration")
]
QUESTION = r"^(?!label\Z)[A-Za-z0-9_-]{1,32}\Z"
QuestionName = Annotated[
    str,
    Meta(pattern=QUESTION, description='a name: 1 to 32 of the characters A-Z, a-z, 0-9, _ and -, but not "label"'),
]
PROMPT_NAME = r"^(?!none\Z)[A-Za-z0-9_-]{1,32}\Z"  # "none" is a value of the run-time setting
PromptName = Annotated[
    str,
    Meta(pattern=PROMPT_NAME, description='a name: 1 to 32 of the characters A-Z, a-z, 0-9, _ and -, but not "none"'),
]


class MotionConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """When a frame counts as motion. Names, meaning and defaults are those of Frigate's motion detection.

    Only `enabled` differs: it is off by default. Pixels are those of the picture shrunk to `frame_height`.
    """

    enabled: bool = False
    threshold: Annotated[int, Meta(ge=1, le=255)] = 30  # grey levels that a pixel must differ from the background
    contour_area: Annotated[int, Meta(ge=0, le=100_000)] = 10  # pixels; smaller changed areas are noise
    frame_height: Annotated[int, Meta(ge=16, le=480)] = 100  # pixels; frames are compared at this size
    frame_alpha: Annotated[float, Meta(gt=0, le=1)] = 0.01  # weight of a new frame in the background
    improve_contrast: bool = True  # stretches pictures of low contrast, for example at night
    lightning_threshold: Annotated[float, Meta(ge=0.3, le=1)] = 0.8  # fraction that changes at once: a light
    # Areas to ignore, such as a clock: polygons "x1,y1,x2,y2,...", 0..1 of width and height from the top left.
    mask: Annotated[tuple[Annotated[str, Meta(max_length=2048)], ...], Meta(max_length=16)] = ()

    def __post_init__(self) -> None:
        self.polygons()

    def polygons(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """The corners of each polygon as (x, y). Raises ConfigError, which shows the polygon that cannot be read."""
        return tuple(_corners(polygon) for polygon in self.mask)


def _corners(polygon: str) -> tuple[tuple[float, float], ...]:
    try:
        numbers = [float(number) for number in polygon.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) < 6 or len(numbers) % 2 or not all(0 <= number <= 1 for number in numbers):
        raise ConfigError(
            f'mask "{polygon[:MAX_SHOWN]}" is not a polygon: want "x1,y1,x2,y2,x3,y3,...", three corners or more, '
            "each number from 0 to 1 of the picture's width or height"
        )
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


class TriggerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """An event of its own when a condition on a camera's verified answers becomes true, see conditions.py."""

    when: Annotated[str, Meta(min_length=1, max_length=MAX_CONDITION)]

    def __post_init__(self) -> None:
        parse_condition(self.when)


class SamplingConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """How the texts of a camera are chosen, see Options in wire.envelope; the defaults: greedily."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None  # divides the logits; 0 or None: greedily
    top_k: Annotated[int, Meta(ge=1, le=MAX_TOKEN)] | None = None  # sample from so many likeliest words; None: all
    top_p: Share | None = None  # sample from the fewest likeliest words with this probability together; None: all
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None  # of the noise of every frame; None: of each its own
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0  # words of a text at least
    repetition_penalty: Annotated[float, Meta(ge=1, le=10)] = 1.0  # above 1: fewer words come twice
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...], Meta(max_length=MAX_STOP)] = ()

    def __post_init__(self) -> None:
        if not self.temperature and (self.top_k is not None or self.top_p is not None or self.seed is not None):
            raise ConfigError("top_k, top_p and seed change nothing without a temperature: set one, such as 0.7")

    @property
    def is_greedy(self) -> bool:
        """Whether it changes nothing: any server may answer."""
        return not (self.temperature or self.min_tokens or self.stop) and self.repetition_penalty == 1.0

    def with_tokens(self, words: Sequence[str]) -> Options:
        """With the tokens of the stop words. words: the bundle's vocabulary. Raises ConfigError for another word."""
        if unknown := [word for word in self.stop if word not in words]:
            raise ConfigError(f"stop word {unknown[0]!r} is not in the bundle's vocabulary: want one of its words")
        tokens = {"temperature": self.temperature or 0.0, "stop": tuple(words.index(word) for word in self.stop)}
        settings = msgspec.structs.asdict(self) | tokens
        # msgspec leaves out a field only if its value is the default's own object.
        return Options(**{name: value for name, value in settings.items() if value != getattr(GREEDY, name)})


class CameraConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One source of frames."""

    name: CameraName
    source: Annotated[str, Meta(min_length=1, max_length=2048)]  # docs/cameras.md has each kind
    interval_s: Annotated[float, Meta(ge=0, le=86400)] | None = None  # between frames; 0: as fast as the board can
    stall_s: Annotated[float, Meta(ge=1, le=600)] = 5.0  # a camera is opened again after this time without a new frame
    motion: MotionConfig = MotionConfig()  # which frames are processed; off: all
    max_interval_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0  # process a frame at least so often; 0: not
    frozen_s: Annotated[float, Meta(ge=0, le=86400)] = 30.0  # an unchanged picture is reported; 0: never
    # These go only with some kinds of source, see camera_source.KEYS.
    repeat: bool = False  # files start again when they end
    snapshot: bool = False  # an HTTP address whose answer is one picture, even if its content type does not say so
    username: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    password_file: str | None = None  # its first line
    key_frames: bool = False  # decode only a video's key frames, for less CPU time
    topic: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None  # of "mqtt"; none: down/frame/<name>
    frigate_camera: FrigateCameraName | None = None  # of "frigate": its name there; None: the same name
    # Of "frigate": for a better picture of an event, from its first message; None: capture.frigate.WAIT_S.
    wait_s: Annotated[float, Meta(ge=0, le=600)] | None = None
    existing: bool = False  # of "watch:": also the pictures that are in the folder at the first start
    width: Annotated[int, Meta(ge=16, le=8192)] | None = None  # pixels
    height: Annotated[int, Meta(ge=16, le=8192)] | None = None  # pixels
    fps: Annotated[int, Meta(ge=1, le=120)] | None = None  # frames per second that the camera takes
    # Use the latest answer again and send nothing if the frame differs by at most this (inference/reuse.py); 0: never.
    reuse_distance: Annotated[float, Meta(ge=0, le=10)] = 0.0
    reuse_s: Annotated[float, Meta(gt=0, le=86400)] = 60.0  # an answer is used for at most this time
    # These replace the board's settings.
    deadline_ms: Annotated[int, Meta(ge=50, le=600_000)] | None = None
    paradigm: Literal["auto", "device", "split", "speculative", "offload"] | None = None
    tier: Literal["edge", "cloud"] | None = None
    questions: Annotated[tuple[QuestionName, ...], Meta(max_length=MAX_QUESTIONS)] = ()  # taught ones, for each frame
    prompt: PromptName | None = None  # what servers ask of its pictures, by their name for it; None: their usual one
    triggers: Annotated[tuple[TriggerConfig, ...], Meta(max_length=16)] = ()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self) -> None:
        self._check_triggers()
        if re.fullmatch("[0-9]{1,3}", self.source):  # the number of a device, as OpenCV and FFmpeg users write it
            msgspec.structs.force_setattr(self, "source", f"/dev/video{int(self.source)}")
        try:
            check_source_keys(self.source, {key: getattr(self, key) for key in KEYS})
        except ConfigError as error:
            raise ConfigError(f"camera {self.name}: {error}") from error

    def _check_triggers(self) -> None:
        """Raises ConfigError: a question that is not asked never has an answer."""
        for trigger in self.triggers:
            for name in parse_condition(trigger.when).questions - {LABEL, *self.questions}:
                asked = ", ".join(f'"{question}"' for question in (*self.questions, name))
                raise ConfigError(
                    f"camera {self.name} has a trigger on {name!r}, which is none of its questions: "
                    f"want questions = [{asked}]"
                )

    @property
    def min_interval_s(self) -> float:
        """Seconds between frames. The default is 1, and 0 if the sender of the pictures chooses the rate."""
        if self.interval_s is not None:
            return self.interval_s
        return 0.0 if kind_of(self.source) in ("mqtt", "frigate", "watch") else 1.0

    @property
    def unlike_prompts(self) -> str:
        """The setting that only targets without prompts answer (server/targets: `bundle`); empty: there is none."""
        return "questions" if self.questions else "" if self.sampling.is_greedy else "[cameras.sampling]"

    @property
    def name_in_frigate(self) -> str:
        return self.frigate_camera or self.name


class PolicyConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The budgets of a board, and the quality that `paradigm = "auto"` must reach."""

    # Accept a draft without verification if its predicted quality is at least this fraction of the server's; 1: never.
    quality_floor: Annotated[float, Meta(ge=0, le=1)] = 0.95
    # For all requests, including resends and replays; 0: no limit.
    bytes_per_minute: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0
    cpu_share: Annotated[float, Meta(gt=0, le=1)] = 1.0  # of one core, averaged over the frames
    may_offload: bool = True  # pictures may leave the board


class OutboxConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Where requests without an answer at their deadline are kept, to be sent again."""

    file: str
    max_bytes: Annotated[int, Meta(ge=65536, le=1 << 34)] = 16 << 20  # then the oldest is dropped, reported lost
    max_age_s: Annotated[float, Meta(ge=1, le=31 * 86400)] = 86400.0  # in the outbox; older requests are reported lost
    replay_per_s: Annotated[float, Meta(gt=0, le=1000)] = 2.0  # besides the requests of live frames
    every_request: bool = False  # write each request before sending it: a killed board loses none, but flash wears


class UpdatesConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Where newer bundles than [board] bundle are installed; docs/bundles.md."""

    folder: str
    trust_file: str | None = None  # public keys, one per line; none: files are installed unsigned, over MQTT nothing is
    ask: bool = False  # true: a bundle that came over MQTT waits until a user installs it


class KeptFramesConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Frames that the board keeps as files, so that people can teach a question with them."""

    folder: str  # with a folder for each camera
    every_s: Annotated[float, Meta(ge=0, le=86400)] = 60.0  # between two frames of a camera
    max_files: Annotated[int, Meta(ge=1, le=50_000)] = 500  # of a camera; then the oldest is removed


class MetricsConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Where Prometheus reads the counters."""

    port: Annotated[int, Meta(ge=0, le=65535)]  # 0: any free port, which the log shows
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not can_be_name(self.host):
            raise ConfigError(f"host in [metrics] = {self.host[:128]!r}: want an address of this machine")


class HomeAssistantConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """How the board announces itself to Home Assistant; docs/homeassistant.md."""

    discovery: bool = True  # false: the board removes itself from Home Assistant
    prefix: TopicPrefix = "homeassistant"  # as in the settings of Home Assistant's MQTT integration
    images: bool = False  # the users' broker gets small pictures of the frames


class BoardConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The board and how it answers."""

    id: StationId
    bundle: str  # directory of the bundle
    site: Id = "home"
    backend: Literal["auto", "onnx", "litert"] = "auto"
    threads: Annotated[int, Meta(ge=1, le=16)] | None = None  # of the networks; None: measured at the first start
    # Of onnxruntime, tried in this order before the CPU, for head and labels; those that do not work are left out.
    providers: Annotated[tuple[Literal["tensorrt", "cuda"], ...], Meta(max_length=2)] = ()
    # send: for drafts, and with the features, for ten bytes and better answers. alone: only for frames that no server
    # verifies.
    labels: Literal["send", "alone", "never"] = "send"
    paradigm: Literal["auto", "device", "split", "speculative", "offload"] = "auto"  # auto: chosen per frame
    tier: Literal["edge", "cloud"] | None = None  # the lowest tier that may answer; none: any server
    deadline_ms: Annotated[int, Meta(ge=50, le=600_000)] = 5000  # from capture; after it the draft is the final answer
    resend_ms: Annotated[int, Meta(ge=20, le=60_000)] = 1500  # without a reply; then sent again with its id
    open_requests: Annotated[int, Meta(ge=1, le=4096)] = 64  # when full, the device answers alone
    level: Annotated[int, Meta(ge=0, le=7)] | None = None  # finest level of features; none: the bundle's default
    groups: Annotated[int, Meta(ge=1, le=4)] | None = None  # of the features' channels; none: all
    # Longest features of a frame, without the other parts of a request; longer ones are sent coarser. None: no limit.
    max_bytes: Annotated[int, Meta(ge=MIN_FEATURE_BYTES, le=1_000_000)] | None = None
    # A frame may be coded against an earlier one, and is coded alone after at most this time. 0: always alone.
    refresh_s: Annotated[float, Meta(ge=0, le=86400)] = 60.0
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] = 75  # of offload, and of the JPEG size that events compare with
    # Longest side of an offloaded picture, for servers with a model of another size. None: the head's input, 224 x 224.
    picture_pixels: Annotated[int, Meta(ge=64, le=2048)] | None = None
    slowdown: Annotated[float, Meta(ge=1, le=100)] = 1.0  # simulates a slower board, by sleeping

    def __post_init__(self) -> None:
        if self.providers and self.backend == "litert":
            raise ConfigError('[board] providers are of onnxruntime: remove them, or set backend = "onnx" or "auto"')


class RuntimeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """board.toml."""

    board: BoardConfig
    cameras: Annotated[tuple[CameraConfig, ...], Meta(min_length=1, max_length=16)]
    mqtt: MqttConfig = MqttConfig()  # the servers' broker
    local: MqttConfig | None = None  # a broker nearby for events, frames and run-time settings; none: all use [mqtt]
    policy: PolicyConfig = PolicyConfig()
    outbox: OutboxConfig | None = None
    updates: UpdatesConfig | None = None
    kept_frames: KeptFramesConfig | None = None
    metrics: MetricsConfig | None = None
    homeassistant: HomeAssistantConfig | None = None
    frigate: FrigateConfig = FrigateConfig()

    @property
    def near_broker(self) -> MqttConfig | None:
        """`local`, unless it is the same broker and user as `mqtt`: one connection is enough then.

        A broker may derive the client id from the user name, so a second connection might evict the first.
        """
        local, mqtt = self.local, self.mqtt
        if local is None or (local.port, local.username) != (mqtt.port, mqtt.username):
            return local
        is_same = local.host == mqtt.host or (is_loopback(local.host) and is_loopback(mqtt.host))
        return None if is_same else local

    @property
    def threads(self) -> int | None:
        """Threads of the networks; None: measured. 1 if cpu_share limits them, since it is a share of one core."""
        return self.board.threads or (1 if self.policy.cpu_share < 1 else None)

    def sampling(self, words: Sequence[str]) -> dict[str, Options]:
        """By camera. words: the bundle's vocabulary. Raises ConfigError for a stop word that it does not have."""
        return {camera.name: camera.sampling.with_tokens(words) for camera in self.cameras}

    def bundle_warnings(
        self, names: Mapping[str, str], classes: Sequence[str], level_bytes: Sequence[float]
    ) -> list[str]:
        """A warning for each setting that does not go with the bundle. See the two methods below."""
        return self._unknown_labels(names, classes) + self.tight_limits(level_bytes)

    def tight_limits(self, level_bytes: Sequence[float]) -> list[str]:
        """A warning if most features cannot be as short as max_bytes. level_bytes: the bundle's, the coarsest first.

        No error: the features of still, dark pictures are shorter, and a newer bundle may have coarser levels.
        """
        limit = self.board.max_bytes
        if limit is None or self.board.paradigm == "offload" or not level_bytes or limit >= level_bytes[0]:
            return []
        return [
            f"max_bytes = {limit} in [board] is less than the features of a usual frame have at the bundle's coarsest "
            f"level, {level_bytes[0]:.0f} bytes: frames are sent with a part of their channels, or the device answers "
            f"alone; want {ceil(level_bytes[0])} or more"
        ]

    def _unknown_labels(self, names: Mapping[str, str], classes: Sequence[str]) -> list[str]:
        """A warning for each label in a trigger that is no class of the bundle. names: of the classes, by id.

        No error: a server with another bundle may answer pictures, and a newer bundle may have other classes.
        """
        warnings = []
        for camera in self.cameras:
            for trigger in camera.triggers:
                for comparison in parse_condition(trigger.when, names).comparisons:
                    if comparison.question == LABEL and (label := comparison.name) not in classes:
                        word = re.compile(rf"\b{re.escape(label)}\b", re.IGNORECASE)
                        like = [name for name in classes if word.search(name)] or list(classes)
                        advice = (
                            f"want one of them, such as {', '.join(map(repr, like[:3]))}" if classes else "it has none"
                        )
                        warnings.append(
                            f"camera {camera.name} has a trigger on the label {label!r}, which is no class of the "
                            f"bundle: {advice}"
                        )
        return warnings

    def __post_init__(self) -> None:
        """Checks what no single key can say. Raises ConfigError."""
        names = [camera.name for camera in self.cameras]
        topics = [camera.topic for camera in self.cameras if camera.topic]
        for what, values in (("name", names), ("topic", topics)):
            if len(set(values)) < len(values):
                raise ConfigError(f"two cameras have the same {what} among {', '.join(values)}: give each its own")
        self._check_frigate()
        self._check_pictures_stay()
        self._check_kept_frames()
        for camera in self.cameras:
            if camera.prompt and camera.unlike_prompts:
                raise ConfigError(
                    f"camera {camera.name} has a prompt and {camera.unlike_prompts}, but no server answers both: the "
                    'target "bundle" has no prompts, and the targets with prompts have neither taught questions nor '
                    "sampling: remove one of them, or give it a camera of its own with the same source"
                )
            needs_server = camera.questions or camera.triggers or camera.prompt
            if needs_server and (camera.paradigm or self.board.paradigm) == "device":
                raise ConfigError(
                    f"camera {camera.name} has questions, triggers or a prompt, which need answers of a server, and "
                    'paradigm = "device", which asks none: choose another paradigm, or remove them'
                )
        if self.board.paradigm == "offload":
            self._check_no_head_is_needed()

    def _check_pictures_stay(self) -> None:
        """Nothing sends pictures if may_offload forbids it. Raises ConfigError."""
        if self.policy.may_offload:
            return
        where = [("[board]", self.board.paradigm)]
        where += [(f"camera {camera.name}", camera.paradigm or "auto") for camera in self.cameras]
        for place, paradigm in where:
            if paradigm == "offload":
                raise ConfigError(
                    f'{place} has paradigm = "offload", but [policy] has may_offload = false: pictures may not leave '
                    "this board; choose another paradigm, or set may_offload = true"
                )
        if self.homeassistant and self.homeassistant.images:
            raise ConfigError(
                "[homeassistant] has images = true, but [policy] has may_offload = false: pictures may not leave this "
                "board; set one of them differently"
            )

    def _check_kept_frames(self) -> None:
        """No camera reads what is kept: each frame would become another one. Raises ConfigError."""
        if self.kept_frames is None:
            return
        for reader in self.cameras:
            if kind_of(reader.source) not in ("watch", "pictures"):
                continue
            read = os.path.realpath(path_of(reader.source))
            for camera in self.cameras:
                kept = os.path.realpath(os.path.join(self.kept_frames.folder, camera.name))
                if os.path.commonpath([kept, read]) == read:
                    raise ConfigError(
                        f"[kept_frames] keeps frames in {kept}, which camera {reader.name} reads, so each would become "
                        "another one: want another folder in [kept_frames]"
                    )

    def _check_no_head_is_needed(self) -> None:
        """A board that offloads loads none. Raises ConfigError."""
        for camera in self.cameras:
            if camera.paradigm not in (None, "offload"):
                raise ConfigError(
                    f"camera {camera.name} wants {camera.paradigm}, but a board that offloads loads no head: "
                    'give the board paradigm = "auto" and its other cameras "offload"'
                )
            if camera.reuse_distance:
                raise ConfigError(
                    f"camera {camera.name} has reuse_distance, which compares features, but a board that offloads "
                    'loads no head: remove it, or give the board paradigm = "auto" and its cameras "offload"'
                )
        if self.outbox:
            raise ConfigError(
                '[board] has paradigm = "offload", so it loads no head, and [outbox] keeps features: '
                'remove [outbox], or give the board paradigm = "auto" and its cameras "offload"'
            )

    def _check_frigate(self) -> None:
        """Raises ConfigError."""
        names = [camera.name_in_frigate for camera in self.cameras if kind_of(camera.source) == "frigate"]
        if len(set(names)) < len(names):
            raise ConfigError(f"two cameras are the same one of Frigate among {', '.join(names)}: remove one of them")
        if not names and self.frigate != FrigateConfig():
            raise ConfigError('[frigate] is of no use without a camera with source = "frigate": add one, or remove it')
        what, asked = self.frigate.sub_label, {question for camera in self.cameras for question in camera.questions}
        if what not in (None, LABEL, *asked):
            raise ConfigError(
                f'[frigate] has sub_label = "{what}", which no camera asks: want "{LABEL}" or one of their questions'
            )
