"""What can be found out of a broker and of a camera without running a board: `aiflow validate` and `aiflow doctor`."""

import queue
import threading
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from edge_runtime.errors import AiflowError

if TYPE_CHECKING:
    from edge_runtime.capture import Cameras
    from edge_runtime.config import CameraConfig, RuntimeConfig
    from edge_runtime.mqtt.settings import MqttSettings

CONNECT_S = 15.0  # for a connection with TLS and its subscriptions over a slow link
STATUS_S = 2.0  # for a message that the broker has kept, once the connection is there
FRAME_S = 15.0  # for a camera's frames; a slow board may take some to start OpenCV, and 5 to open a stream


def board_subscriptions(config: "RuntimeConfig") -> tuple[list[str], list[str]]:
    """The topics to which a board subscribes: at the servers' broker, and at that of its users."""
    from edge_runtime.config.camera_source import kind_of
    from edge_runtime.wire import topics

    board = config.board
    for_servers = [topics.reply(board.site, board.id), topics.server_statuses(board.site)]
    for_users = [topics.settings(board.site, board.id)]
    if any(camera.source == "mqtt" and not camera.topic for camera in config.cameras):
        for_users.append(topics.frames(board.site, board.id))
    in_frigate = [camera.name_in_frigate for camera in config.cameras if kind_of(camera.source) == "frigate"]
    if in_frigate:
        prefix = config.frigate.prefix
        for_users += [f"{prefix}/events", *(f"{prefix}/{name}/+/snapshot" for name in in_frigate)]
    return for_servers, for_users + [camera.topic for camera in config.cameras if camera.topic]


def subscribed(settings: "MqttSettings", subscriptions: list[str]) -> str:
    """Connects as the program does, but with another client id, so that a running program keeps its connection.

    A broker that uses the account's name as the client id disconnects the running program all the same.
    """
    import msgspec

    from edge_runtime.mqtt import MqttClient, State

    settings = msgspec.structs.replace(settings, client_id=f"{settings.client_id}-validate")
    states: queue.SimpleQueue[tuple[State, str]] = queue.SimpleQueue()
    client = MqttClient(
        settings,
        subscriptions=[(topic, 1) for topic in subscriptions],
        on_state=lambda state, reason: states.put((state, reason)),
    )
    with client:
        while True:
            try:
                state, reason = states.get(timeout=CONNECT_S)
            except queue.Empty:
                raise AiflowError(f"no answer within {CONNECT_S:.0f} s: is this the address of the broker?") from None
            if state is State.ONLINE:
                kind = "over TLS" if settings.uses_tls else "in plain text"
                who = f"as {settings.username}" if settings.username else "without a login"
                return f"connected {kind}, {who}; {len(subscriptions)} subscription(s) granted"
            if state is State.BACKOFF:
                raise AiflowError(reason)


def is_online(settings: "MqttSettings", topic: str) -> bool:
    """Whether a board's status, which its broker keeps, says that it runs; False as well if it may not be read."""
    import msgspec

    from edge_runtime.mqtt import Message, MqttClient
    from testbed.statuses import read_status

    settings = msgspec.structs.replace(settings, client_id=f"{settings.client_id}-validate")
    arrived: queue.SimpleQueue[Message] = queue.SimpleQueue()
    client = MqttClient(settings, subscriptions=[(topic, 1)], optional=[topic], on_message=arrived.put)
    with client, suppress(queue.Empty):
        client.wait_online(CONNECT_S)
        return read_status(arrived.get(timeout=STATUS_S).payload).state == "online"
    return False


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
