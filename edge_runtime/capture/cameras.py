"""All cameras of a board: their frames in one stream, their states, and where a picture over MQTT goes."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from edge_runtime.capture.camera import Camera, CameraState
from edge_runtime.capture.frame import POLL_S, Counters, Frame
from edge_runtime.capture.mqtt_pictures import MAX_PICTURE
from edge_runtime.capture.readers import check_source
from edge_runtime.config import CameraConfig
from edge_runtime.errors import ConfigError
from edge_runtime.logs import printable
from edge_runtime.mqtt import Message
from edge_runtime.mqtt.routes import Rejection, Route
from edge_runtime.shutdown import DriverThread, threads_in_driver
from edge_runtime.wire import topics

CLOSE_S = 2.0  # for the cameras' threads to end; a thread that hangs in a driver is left to shutdown.leave


class Cameras:
    """All cameras of a board."""

    def __init__(
        self,
        configs: Sequence[CameraConfig],
        on_change: Callable[[], None] = lambda: None,
        state_folder: Path | None = None,
    ) -> None:
        """Opens nothing yet. on_change: called on any thread after each change of a camera's state.

        state_folder: for what a camera remembers over a restart, of this board alone; None: nothing is remembered.

        Raises ConfigError for a motion mask or a password file that can never work.
        """
        self._cameras = {config.name: Camera(config, on_change, state_folder) for config in configs}

    def __getitem__(self, name: str) -> Camera:
        return self._cameras[name]

    def __iter__(self) -> Iterator[Camera]:
        return iter(self._cameras.values())

    def mqtt_cameras(self) -> list[str]:
        """Names of the cameras whose pictures come over MQTT, on the board's own topics."""
        return [camera.config.name for camera in self if camera.mqtt_pictures and not camera.config.topic]

    def routes(self, site: str, board: str) -> list[Route]:
        """Where these pictures arrive, at the users' broker: on the board's own topics, or on a camera's."""

        def arrived(message: Message) -> Rejection | None:
            if self.arrived(topics.camera_of(message.topic), message.payload):
                return None
            wanted = " or ".join(topics.frame(site, board, name) for name in self.mqtt_cameras())
            return "no_camera", f"publish pictures on {wanted}"

        def arrived_on_own_topic(message: Message) -> None:
            self._cameras[names[message.topic]].picture_arrived(message.payload)

        names = {camera.config.topic: camera.config.name for camera in self if camera.config.topic}
        routes = [Route(topic, arrived_on_own_topic, qos=0, max_packet=MAX_PICTURE) for topic in names]
        if self.mqtt_cameras():
            routes.append(Route(topics.frames(site, board), arrived, qos=0, max_packet=MAX_PICTURE))
        return routes

    def arrived(self, name: str | None, data: bytes) -> bool:
        """A picture over MQTT for the camera of this name. Never blocks. False if no such camera waits for pictures.

        None is the topic without a camera's name: it is for the only camera with pictures over MQTT.
        """
        waiting = self.mqtt_cameras()
        if name is None and len(waiting) == 1:
            name = waiting[0]
        if name is None or name not in waiting:
            return False
        self._cameras[name].picture_arrived(data)
        return True

    def pause(self, paused: bool) -> None:
        """Closes all cameras until it is called with False."""
        for camera in self:
            camera.switch(paused=paused)

    def states(self) -> dict[str, CameraState]:
        """The state of each camera, by name."""
        return {camera.config.name: camera.state() for camera in self}

    def totals(self) -> Counters:
        """The counters of all cameras together."""
        total: Counter[str] = Counter()
        for camera in self:
            total.update(asdict(camera.counters))
        return Counters(**total)

    def check(self) -> list[str]:
        """Looks at every source before the start; does not contact streams.

        Raises ConfigError, naming each camera, for sources that can never work: an unknown kind of stream, a missing
        program, a file that is no picture, video or tar. Returns warnings about what may pass by itself, since `frames`
        tries it again: a path that does not exist yet or cannot be read, a directory without a picture.
        """
        found = {name: check_source(camera.config) for name, camera in self._cameras.items()}
        if errors := [f"camera {name}: {printable(error)}" for name, (error, _) in found.items() if error]:
            raise ConfigError("; ".join(errors))
        return [f"camera {name}: {printable(warning)}" for name, (_, warning) in found.items() if warning]

    def frames(self, stop: threading.Event, on_turn: Callable[[], None] = lambda: None) -> Iterator[Frame]:
        """Frames of all cameras as they come, until every source has ended or `stop` is set. To be called once.

        on_turn: called after each frame that was handled, and every POLL_S while there is none.

        Each camera has one thread, which reads its next frame after its last one has been handled: nothing queues, and
        a slow board gets the newest frame. At the end every thread has ended, or still hangs in a driver after CLOSE_S:
        see shutdown.threads_in_driver.
        """
        handover: queue.Queue[tuple[Camera, Frame | None]] = queue.Queue()
        threads = [
            DriverThread(target=camera.hand_over, args=(handover,), name=f"source-{name}")
            for name, camera in self._cameras.items()
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running and not stop.is_set():
                on_turn()
                for each in self:
                    each.tell_if_nothing_comes(time.monotonic())
                try:
                    camera, frame = handover.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if frame is None:
                    running -= 1
                    continue
                if camera.is_on:
                    yield frame
                else:  # switched off since
                    camera.counters.skipped += 1
                del frame  # see Frame
                camera.handled()
        finally:
            for camera in self:
                camera.switch(closed=True)
            until = time.monotonic() + CLOSE_S
            for thread in threads_in_driver():
                thread.join(max(0.0, until - time.monotonic()))
