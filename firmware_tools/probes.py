"""What can be found out of a broker, of a camera and of another server as target, without running a board or a server:
`aiflow validate` and `aiflow doctor`.
"""

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from edge_runtime.errors import AiflowError
from edge_runtime.logs import printable

if TYPE_CHECKING:
    from edge_runtime.capture import Cameras
    from edge_runtime.config import CameraConfig, RuntimeConfig
    from edge_runtime.mqtt import Message
    from edge_runtime.mqtt.settings import MqttSettings
    from edge_runtime.planning.server_status import ServerStatus
    from server.config import OpenAIConfig

CONNECT_S = 15.0  # for a connection with TLS and its subscriptions over a slow link
STATUS_S = 2.0  # for a message that the broker has kept, once the connection is there
MODELS_S = 15.0  # for another server's list of its models
MAX_NAMED, MAX_NAME = 8, 64  # names in a warning, and characters of each
NO_LIST = {404, 405, 501}  # statuses of servers that may answer questions, but list no models
GRANT = "give its account these rights, as a new `aiflow broker config` does"
FRAME_S = 15.0  # for a camera's frames; a slow board may take some to start OpenCV, and 5 to open a stream


class _Model(TypedDict):
    id: str


class _Models(TypedDict):
    """A response to "List models": https://platform.openai.com/docs/api-reference/models/list."""

    data: list[_Model]


@dataclass(frozen=True, slots=True)
class Subscription:
    """A topic filter of a board."""

    topic: str
    without: str = ""  # what does not work if the broker forbids it; "": it does not connect


@dataclass(frozen=True, slots=True)
class Answer:
    """What a broker said."""

    found: str
    warnings: list[str]  # what it forbids
    has_board: bool  # a board with this id is online


def board_subscriptions(config: "RuntimeConfig") -> tuple[list[Subscription], list[Subscription]]:
    """The subscriptions of a board: at the servers' broker, and at that of its users.

    A test compares them with a board's routes. The routes themselves would load OpenCV, and a broken one may end this
    process.
    """
    from edge_runtime.config.camera_source import kind_of
    from edge_runtime.wire import topics

    site, board = config.board.site, config.board.id
    unknown = "the board does not know which servers are there, and what they can do"
    for_servers = [Subscription(topics.reply(site, board)), Subscription(topics.server_statuses(site), unknown)]
    if config.updates:
        lost = "no bundle of `aiflow bundle push` arrives"
        for_servers += [Subscription(topic(site, board), lost) for topic in (topics.bundle_offer, topics.bundle_chunk)]
    for_users = [Subscription(topics.settings(site, board))]
    for_users += [Subscription(camera.topic) for camera in config.cameras if camera.topic]
    if any(camera.source == "mqtt" and not camera.topic for camera in config.cameras):
        for_users.append(Subscription(topics.frames(site, board)))
    in_frigate = [camera.name_in_frigate for camera in config.cameras if kind_of(camera.source) == "frigate"]
    if in_frigate:
        prefix = config.frigate.prefix
        for_users += [Subscription(f"{prefix}/{name}/+/snapshot") for name in in_frigate]
        for_users.append(Subscription(f"{prefix}/events"))
        for_users.append(Subscription(f"{prefix}/reviews", "events have no review and no severity of Frigate's"))
    if config.homeassistant and config.homeassistant.discovery:
        prefix = config.homeassistant.prefix
        later = "Home Assistant does not show the board after its own start until the board connects again"
        stays = "Home Assistant goes on to show what was removed from the board"
        for_users.append(Subscription(topics.discovery_status(prefix), later))
        for_users.append(Subscription(topics.discovery(prefix, site, board), stays))
    return for_servers, for_users


def ask(settings: "MqttSettings", subscriptions: Sequence[Subscription], status: str = "") -> Answer:
    """Connects as the program does, but with another client id, so that a running program keeps its connection.

    A broker that uses the account's name as the client id disconnects the running program all the same.
    status: the topic of a board's status, whose last message the broker keeps; "": it is not asked for.
    Raises AiflowError if there is no connection, or not all that a board needs.
    """
    import msgspec

    from edge_runtime.mqtt import MqttClient, State

    settings = msgspec.structs.replace(settings, client_id=f"{settings.client_id}-validate")
    states: queue.Queue[tuple[State, str]] = queue.Queue()
    arrived: queue.Queue[Message] = queue.Queue()
    client = MqttClient(
        settings,
        subscriptions=[(topic, 1) for topic in (*(each.topic for each in subscriptions), status) if topic],
        optional=[*(each.topic for each in subscriptions if each.without), status],
        on_message=lambda message: arrived.put(message) if message.topic == status else None,
        on_state=lambda state, reason: states.put((state, reason)),
    )
    with client:
        while True:
            try:
                state, reason = states.get(timeout=CONNECT_S)
            except queue.Empty:
                raise AiflowError(f"no answer within {CONNECT_S:.0f} s: is this the address of the broker?") from None
            if state is State.BACKOFF:
                raise AiflowError(reason)
            if state is State.ONLINE:
                break
        forbidden = client.forbidden
        has_board = bool(status) and status not in forbidden and _is_online(arrived)
    kind = "over TLS" if settings.uses_tls else "in plain text"
    who = f"as {settings.username}" if settings.username else "without a login"
    missing: dict[str, list[str]] = {}  # what does not work -> topics
    for each in subscriptions:
        if each.topic in forbidden:
            missing.setdefault(each.without, []).append(each.topic)
    granted = len(subscriptions) - sum(map(len, missing.values()))
    return Answer(
        f"connected {kind}, {who}; {granted} subscription(s) granted",
        [f"the broker forbids {' and '.join(topics)}, so {why}: {GRANT}" for why, topics in missing.items()],
        has_board,
    )


def _is_online(arrived: "queue.Queue[Message]") -> bool:
    from testbed.statuses import read_status

    with suppress(queue.Empty):
        return read_status(arrived.get(timeout=STATUS_S).payload).state == "online"
    return False


def missing_prompts(settings: "MqttSettings", site: str, prompts: Mapping[str, str]) -> list[str]:
    """A warning for each prompt that no server has, by the statuses that the broker has kept; without any, none.

    prompts: camera to prompt. Raises AiflowError if there is no connection.
    """
    online = [status for status in _server_statuses(settings, site) if status.state == "online"]
    if not online:  # the board may be the first to start
        return []
    known = sorted({name for status in online for name in status.target.prompts})
    wanted = f"want one of {_named(known)}, or" if known else "they have no prompts:"
    return [
        f"camera {camera} has prompt = {prompt!r}, but no server that is online has it: {wanted} "
        f"add [prompts.{prompt}] to a server.toml"
        for camera, prompt in prompts.items()
        if prompt not in known
    ]


def _server_statuses(settings: "MqttSettings", site: str) -> list["ServerStatus"]:
    """Raises AiflowError if there is no connection."""
    import msgspec

    from edge_runtime.mqtt import Message, MqttClient
    from edge_runtime.planning.server_status import SERVERS, StatusError, decode_status
    from edge_runtime.wire import topics

    settings = msgspec.structs.replace(settings, client_id=f"{settings.client_id}-validate")
    arrived: queue.Queue[Message] = queue.Queue(SERVERS)

    def keep(message: Message) -> None:
        with suppress(queue.Full):
            arrived.put_nowait(message)

    topic = topics.server_statuses(site)
    with MqttClient(settings, subscriptions=[(topic, 1)], optional=[topic], on_message=keep) as client:
        if not client.wait_online(CONNECT_S):
            raise AiflowError(f"no second connection within {CONNECT_S:.0f} s, to read the statuses of the servers")
        time.sleep(STATUS_S)  # nothing says that the last one has come
    found = []
    while not arrived.empty():
        with suppress(StatusError):
            found.append(decode_status(arrived.get().payload))
    return found


def listed_model(url: str, config: "OpenAIConfig") -> tuple[str, list[str]]:
    """What another server says of its models, which costs nothing, and warnings: some servers list none, or not all.

    Raises AiflowError if nobody is there, or if it refuses.
    """
    import msgspec

    from edge_runtime.http_call import CallError
    from server.targets.paid_calls import PaidCalls

    # Without the file of the budget, in which the server that runs writes.
    calls = PaidCalls(url, msgspec.structs.replace(config, budget_per_day=None, spent_file=None), 0.0)
    try:
        data = msgspec.json.decode(calls.models(time.monotonic() + MODELS_S), type=_Models)["data"]
    except CallError as error:
        if error.status not in NO_LIST:
            raise
        return "there is a server", [f"it lists no models: {error}"]
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return "there is a server", ["its list of models cannot be read: is the address right? It usually ends in /v1"]
    names = [model["id"] for model in data]
    if config.model in names:
        return f"it has the model {config.model}", []
    listed = f"it lists {_named(names)}" if names else "its list is empty"
    return "it answers", [f"model = {config.model!r} in [openai] is not in its list of models: {listed}"]


def _named(names: Sequence[str]) -> str:
    """For a message. The names may come from a stranger."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return printable(", ".join(name[:MAX_NAME] for name in names[:MAX_NAMED])) + more


def seen(camera: "CameraConfig", count: int = 1) -> str:
    """What a camera gives: the size of its frames, and their rate if several of the `count` frames come in time.

    Raises AiflowError if none comes within FRAME_S.
    """
    import msgspec

    from edge_runtime.capture import Cameras
    from edge_runtime.config import MotionConfig
    from edge_runtime.config.camera_source import kind_of

    kind = kind_of(camera.source)
    is_live = kind not in ("video", "pictures")  # files come as fast as they are read
    interval_s = 0.0 if is_live else camera.interval_s
    cameras = Cameras([msgspec.structs.replace(camera, motion=MotionConfig(), interval_s=interval_s)])
    if kind in ("mqtt", "frigate"):
        return f"waits for {'events of Frigate' if kind == 'frigate' else 'pictures'} over MQTT, which are not checked"
    if kind == "watch":
        return _watches(cameras)
    stop, times, size = threading.Event(), list[float](), ""
    timer = threading.Timer(FRAME_S, stop.set)
    timer.start()
    try:
        with closing(cameras.frames(stop)) as frames:  # type: ignore[type-var]
            for frame in frames:
                times.append(time.monotonic())
                height, width = frame.pixels.shape[:2]
                size = f"{width} x {height} pixels"
                if len(times) >= count or not is_live:
                    break
    finally:
        timer.cancel()
    if not times:
        state = cameras.states()[camera.name]
        raise AiflowError(f"no frame within {FRAME_S:.0f} s: {state.why or state.state}")
    if len(times) == 1:
        return f"a frame of {size}"
    return f"frames of {size}, {(len(times) - 1) / max(1e-3, times[-1] - times[0]):.1f} per second"


def _watches(cameras: "Cameras") -> str:
    if warnings := cameras.check():
        raise AiflowError(warnings[0])
    return "waits for new pictures in its folder"
