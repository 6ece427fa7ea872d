"""The model of a site: messages go in, the rows of the page change. Pure: no socket, no file, and time is an argument.

Every part has a bound, since anybody who may publish can publish anything. A new board never displaces one that is
heard from: beyond MAX_BOARDS, its messages are counted and left out until another board has been quiet for QUIET_S.
"""

import re
from collections import Counter, OrderedDict
from dataclasses import dataclass

from edge_runtime.errors import AiflowError
from edge_runtime.picture_checks import check_picture
from edge_runtime.wire import Event, decode_event, topics
from firmware_tools.ui.answer_view import count_minute, show_answer
from firmware_tools.ui.rows import BoardRow, CameraRow, ServerRow, shown
from firmware_tools.ui.statuses import BoardFields, MessageError, ServerFields, decode_fields

MAX_BOARDS, MAX_CAMERAS, MAX_SERVERS = 1000, 16, 64
QUIET_S = 3600.0
MAX_DRAFTS = 16  # of a camera, for frames that no server has answered yet
MAX_PICTURES = 16 << 20  # bytes of all pictures together
MAX_PICTURE_PIXELS = 640 * 640  # boards send no larger ones, and a browser decodes them


@dataclass(frozen=True, slots=True)
class Answer:
    """The final text of a frame, for the history. Texts are as in the event, within its bounds."""

    at: float  # Unix seconds of its arrival
    board: str
    camera: str
    frame: str
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Change:
    """What a message changed."""

    keys: tuple[tuple[str, str], ...] = ()  # ("board" or "server", id)
    answer: Answer | None = None


NOTHING = Change()


class Site:
    """Not safe for several threads: `Live` has the lock."""

    def __init__(self, name: str) -> None:
        """Raises TopicError for a name that is no site's."""
        self.name = name
        self.boards: dict[str, BoardRow] = {}  # the one that was quiet for the longest time first
        self.servers: dict[str, ServerRow] = {}
        self.counts = Counter({"not_shown": 0, "ignored": 0})
        self.pictures: OrderedDict[tuple[str, str], bytes] = OrderedDict()  # by board and camera, the oldest first
        self._picture_bytes = self._picture_number = 0
        self._drafts: dict[tuple[str, str], OrderedDict[str, str]] = {}  # by board and camera: frame to draft
        up = rf"{topics.ROOT}/{name}/([a-z0-9-]{{1,32}})/up"
        self._up = re.compile(rf"{up}/(event|last|status|image)(?:/([A-Za-z0-9_-]{{1,32}}))?")
        self._of_server = topics.server_statuses(name).removesuffix("+/status")

    @property
    def subscriptions(self) -> list[tuple[str, int]]:
        """Topic filters and QoS.

        What is retained has QoS 0: Mosquitto sends such messages as fast as they are read. Of those with QoS 1 it
        queues a thousand (max_queued_messages) and drops the others, so a large site would be half empty at first.
        """
        board = f"{topics.ROOT}/{self.name}/+/up"
        retained = [f"{board}/last", f"{board}/status", topics.server_statuses(self.name)]
        return [(f"{board}/event", 1), *((each, 0) for each in (*retained, *self.optional))]

    @property
    def optional(self) -> list[str]:
        """Filters that the broker may refuse: most accounts may not see pictures."""
        return [f"{topics.ROOT}/{self.name}/+/up/image/+"]

    def take(self, topic: str, payload: bytes, retained: bool, now: float) -> Change:
        """now: Unix seconds. A message that is not one of this site's, or breaks its bounds, is counted."""
        try:
            if topic.startswith(self._of_server):
                return self._server_status(topics.server_of(topic), payload, now)
            if (found := self._up.fullmatch(topic)) is None or found[1] == topics.SERVERS:
                raise MessageError("a topic that nobody uses")
            board, kind, camera = found.groups()
            if kind == "image":
                return self._picture(board, camera or "", payload, now)
            if kind == "status":
                return self._board_status(board, payload, now)
            if kind == "last" and not retained:  # the same message came as an event
                return NOTHING
            return self._event(board, decode_event(payload), now)
        except AiflowError:
            self.counts["ignored"] += 1
            return NOTHING

    def _board(self, name: str, now: float) -> tuple[BoardRow | None, tuple[tuple[str, str], ...]]:
        """The board's row, and the keys that change: of the board, and of one that is forgotten for it."""
        keys: tuple[tuple[str, str], ...] = (("board", name),)
        row = self.boards.pop(name, None)
        if row is None and len(self.boards) >= MAX_BOARDS:
            quiet = next(iter(self.boards.values()))
            if now - quiet.at < QUIET_S:
                self.counts["not_shown"] += 1
                return None, (("link", ""),)
            self._forget(quiet)
            keys = (*keys, ("board", quiet.board))
        row = self.boards[name] = row or BoardRow(name)
        row.at = now
        return row, keys

    def _forget(self, row: BoardRow) -> None:
        for camera in row.cameras.copy():
            self._forget_camera(row, camera.name)
        del self.boards[row.board]

    def _forget_camera(self, row: BoardRow, name: str) -> None:
        self._drafts.pop((row.board, name), None)
        self._drop_picture((row.board, name))
        row.cameras = [camera for camera in row.cameras if camera.name != name]

    def _camera(self, row: BoardRow, name: str) -> CameraRow:
        """Raises MessageError if the board has too many."""
        if camera := row.camera(name):
            return camera
        if len(row.cameras) >= MAX_CAMERAS:
            raise MessageError(f"more than {MAX_CAMERAS} cameras of a board")
        camera = CameraRow(name)
        row.cameras.append(camera)
        return camera

    def _board_status(self, board: str, payload: bytes, now: float) -> Change:
        if not payload:  # its retained status is deleted
            if board not in self.boards:
                return NOTHING
            self._forget(self.boards[board])
            return Change((("board", board),))
        status = decode_fields(payload, BoardFields)
        row, keys = self._board(board, now)
        if row is None:
            return Change(keys)
        row.state = status.state
        if status.state == "online":  # a last will has no more fields
            row.version, row.bundle, row.paradigm = map(shown, (status.version, status.bundle, status.paradigm))
            row.problems = {shown(part): shown(problem) for part, problem in status.problems.items()}
        # All of its cameras; none in a last will.
        if cameras := {shown(camera): shown(state) for camera, state in status.cameras.items()}:
            for gone in [camera.name for camera in row.cameras if camera.name not in cameras]:
                self._forget_camera(row, gone)
        for camera, state in cameras.items():
            self._camera(row, camera).state = state
        return Change(keys)

    def _server_status(self, server: str, payload: bytes, now: float) -> Change:
        if not payload:  # its retained status is deleted
            return Change((("server", server),)) if self.servers.pop(server, None) else NOTHING
        status = decode_fields(payload, ServerFields)
        if status.server != server or (server not in self.servers and len(self.servers) >= MAX_SERVERS):
            raise MessageError("another server's status, or too many servers")
        before = self.servers.get(server) or ServerRow(server)
        row = self.servers[server] = ServerRow(
            server, now, status.state, accepted=before.accepted, proposed=before.proposed
        )
        row.tier, row.version, row.target, row.why = map(
            shown, (status.tier or before.tier, status.version, status.target.name, status.why)
        )
        row.is_taking = status.state == "online" and status.share_proven and status.accepting
        row.waiting, row.capacity, row.busy_s = status.queue.waiting, status.queue.capacity, status.engine.busy_s
        row.batches = status.engine.batches
        row.batch_ms, row.pass_ms = status.price_ms.batch, status.price_ms.one_pass
        row.received, row.answered = status.counts.received, status.counts.replies.get("ok", 0)
        if used := status.usage:
            row.cost, row.cost_today, row.budget_per_day = used.cost, used.cost_today, used.budget_per_day
            row.currency = shown(used.currency)
        return Change((("server", server),))

    def _event(self, board: str, event: Event, now: float) -> Change:
        row, keys = self._board(board, now)
        if row is None:
            return Change(keys)
        camera = self._camera(row, shown(event.camera))
        if event.type == "trigger":
            camera.trigger, camera.trigger_at = shown(event.trigger), now
        elif shown(event.frame) == camera.frame and camera.is_final:  # sent twice, or retained from before
            return NOTHING
        elif event.type == "new" and not event.final:
            self._keep_draft(board, camera, event)
        else:
            show_answer(camera, event, self._draft(board, camera, event), now)
            if event.final:
                count_minute(camera.hour, event, int(now // 60))
                return Change((*keys, *self._count_accepted(event)), _answer(board, camera.name, event, now))
        return Change(keys)

    def _keep_draft(self, board: str, camera: CameraRow, event: Event) -> None:
        drafts = self._drafts.setdefault((board, camera.name), OrderedDict())
        drafts[event.frame] = camera.waiting = shown(event.text)
        if len(drafts) > MAX_DRAFTS:
            drafts.popitem(last=False)

    def _draft(self, board: str, camera: CameraRow, event: Event) -> str:
        """The draft for the frame of a server's answer. After a final one, those for older frames wait no longer."""
        drafts = self._drafts.get((board, camera.name), OrderedDict[str, str]())
        draft = drafts.get(event.frame, "") if event.type == "update" else ""
        while event.final and event.frame in drafts:
            drafts.popitem(last=False)
        if next(reversed(drafts), event.frame) == event.frame:
            camera.waiting = ""
        return draft

    def _count_accepted(self, event: Event) -> tuple[tuple[str, str], ...]:
        server = self.servers.get(event.answered_by.server) if event.answered_by else None
        if server is None or not event.proposed:
            return ()
        server.accepted += event.accepted
        server.proposed += event.proposed
        return (("server", server.server),)

    def _picture(self, board: str, camera: str, data: bytes, now: float) -> Change:
        if not data.startswith(b"\xff\xd8"):  # boards send JPEGs only
            raise MessageError("no picture that is shown")
        check_picture(data, MAX_PICTURE_PIXELS)
        row, keys = self._board(board, now)
        if row is None:
            return Change(keys)
        view = self._camera(row, camera)
        self._drop_picture((board, camera))
        self.pictures[board, camera] = data
        self._picture_bytes += len(data)
        self._picture_number += 1
        view.picture, view.picture_at = self._picture_number, now
        while self._picture_bytes > MAX_PICTURES:
            keys = (*keys, ("board", self._drop_picture(next(iter(self.pictures)))))
        return Change(keys)

    def _drop_picture(self, key: tuple[str, str]) -> str:
        """Returns the board."""
        self._picture_bytes -= len(self.pictures.pop(key, b""))
        row = self.boards.get(key[0])
        if row and (camera := row.camera(key[1])):
            camera.picture = 0
        return key[0]


def _answer(board: str, camera: str, event: Event, now: float) -> Answer | None:
    if not event.text or event.type == "lost":
        return None
    return Answer(now, board, camera, event.frame, event.text, event.label or "")
