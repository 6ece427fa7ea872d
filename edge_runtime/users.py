"""A board's side towards its users: what they may change, and the programs that they have, on the users' broker.

People and programs change settings, camera software and Frigate publish pictures, Home Assistant reads what the board
has, Frigate gets the answers. The events, which every user gets, are in reporting/events.py.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from edge_runtime.capture import Cameras, Frame
from edge_runtime.capture.frigate import FrigateTopics
from edge_runtime.config import RuntimeConfig
from edge_runtime.mqtt import Message, MqttClient, Publish
from edge_runtime.mqtt.routes import Rejection, Route
from edge_runtime.reporting import RemoteSettings, Setting, Values, board_settings
from edge_runtime.reporting.discovery import Discovery
from edge_runtime.reporting.frigate import FrigateAnswers
from edge_runtime.reporting.home_assistant import device_message
from edge_runtime.reporting.images import Images
from edge_runtime.reporting.kept_frames import KeptFrames
from edge_runtime.wire import Event, topics


class Users:
    """The parts of a board that are for users."""

    def __init__(
        self,
        config: RuntimeConfig,
        cameras: Cameras,
        client: Callable[[], MqttClient],
        report_problem: Callable[[str, str], None],
        *,
        on_paradigm: Callable[[], None],
        on_install: Callable[[Message], Rejection | None] | None,
        has_labels: bool,
    ) -> None:
        """client: to the users' broker; it is made of `routes`, so this is called later. report_problem: of a part; ""
        when it works again. on_paradigm: a user has changed the paradigm. on_install: a user installs the bundle
        that waits; None: this board has no [updates]. has_labels: the bundle classifies.

        Raises the named error of a part that can never start.
        """
        self._cameras, self._client, self._on_paradigm, self._on_install = cameras, client, on_paradigm, on_install
        self._site, self._board = site, board = config.board.site, config.board.id
        settings, home_assistant = board_settings(config), config.homeassistant
        self.settings = RemoteSettings(site, board, settings, self._apply)
        self.discovery = self.images = self.kept_frames = self.frigate_answers = None
        if home_assistant:
            message = device_message(config, settings, has_labels=has_labels, has_link=config.near_broker is not None)
            self.discovery = Discovery(home_assistant, site, board, message, self._publish)
        if home_assistant and home_assistant.images:
            self.images = Images(self._publish, site, board)
        if config.kept_frames:
            self.kept_frames = KeptFrames(config.kept_frames, partial(report_problem, "kept_frames"))
        self.frigate = FrigateTopics(config.frigate.prefix, cameras)
        if config.frigate.url:
            self.frigate_answers = FrigateAnswers(config.frigate, partial(report_problem, "frigate"))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Starts and ends what has a thread. The client must be running before and after."""
        with ExitStack() as stack:
            if self.discovery:
                stack.callback(self.discovery.close)
            if self.frigate_answers:
                stack.enter_context(self.frigate_answers)
            yield

    def routes(self) -> list[Route]:
        """The subscriptions at the users' broker."""
        return [
            Route(self.settings.filter, self._setting_arrived),
            *self._cameras.routes(self._site, self._board),
            *self.frigate.routes(),
            *(self.discovery.routes() if self.discovery else ()),
        ]

    def birth(self) -> list[Publish]:
        """To publish at each connection."""
        return [*self.settings.states(), *(self.discovery.birth() if self.discovery else ())]

    def event_published(self, event: Event) -> None:
        """Any thread; never blocks."""
        if self.frigate_answers:
            self.frigate_answers.put(event)

    def frame_handled(self, frame: Frame) -> None:
        """Never waits for the network."""
        if self.images:
            self.images.show(frame.camera, frame.pixels)
        if self.kept_frames:
            self.kept_frames.keep(frame.camera, frame.pixels, frame.captured_unix)

    def counts(self) -> Values:
        """Numbers with the names of reporting/counters.py; any thread."""
        answers = self.frigate_answers.counts() if self.frigate_answers else {}
        kept = self.kept_frames.counts() if self.kept_frames else {}
        return {"setting": self.settings.counts(), **self.frigate.counts(), **answers, **kept}

    def _setting_arrived(self, message: Message) -> Rejection | None:
        if self._on_install and message.topic == topics.bundle_install(self._site, self._board):
            return self._on_install(message)
        self.settings.message_arrived(message, self._client())
        return None

    def _publish(self, message: Publish) -> None:
        self._client().send(message)

    def _apply(self, setting: Setting) -> None:
        """A user has changed a run-time setting. Those that are not here are read for each frame."""
        is_on = setting.value == "ON"
        if setting.kind == "paused":
            self._cameras.pause(is_on)
        elif setting.kind == "enabled":
            self._cameras[setting.camera].switch(enabled=is_on)
        elif setting.kind == "motion":
            self._cameras[setting.camera].gate.enabled = is_on
        elif setting.kind == "paradigm":
            self._on_paradigm()
