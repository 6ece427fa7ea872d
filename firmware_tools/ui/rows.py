"""The content of the page, as values that the browser gets as JSON. `openapi.py` describes them from these types.

All text in them has passed `shown`: it came from the network, and the browser shows it as text, never as HTML.
"""

from typing import TypeAlias

from msgspec import Struct

from edge_runtime.logs import printable

MAX_TEXT = 1000  # characters of a text that are shown; a caption has about 60
Runs: TypeAlias = list[tuple[str, bool]]  # the words of a text; true: they differ from the other text


def shown(text: str) -> str:
    """A text from the network, cut, with a visible sign for each control and bidirectional character."""
    return printable(text, MAX_TEXT) + ("…" if len(text) > MAX_TEXT else "")


class Minute(Struct, array_like=True):
    """Final events: Unix time in minutes, how many were answered, how many lost, mean ms from capture to answer."""

    minute: int
    answered: int = 0
    lost: int = 0
    mean_ms: float = 0.0

    def count(self, is_lost: bool, after_ms: float) -> None:
        if is_lost:
            self.lost += 1
        else:
            self.answered += 1
            self.mean_ms += (after_ms - self.mean_ms) / self.answered


class CameraRow(Struct):
    """A camera and its newest answer. Times `..._at` are Unix seconds of the page's machine; 0: never."""

    name: str
    state: str = ""  # as the board's status says
    at: float = 0.0  # of the answer
    frame: str = ""
    captured: str = ""  # ISO 8601, UTC
    type: str = ""  # of the last event of this frame: new, update, lost
    is_final: bool = False
    draft: Runs = []  # the board's draft for the same frame, if a server answered
    text: Runs = []
    waiting: str = ""  # the draft for a newer frame, which no server has answered yet
    by: str = ""
    confidence: float | None = None
    is_unsure: bool = False
    is_cut: bool = False
    label: str = ""  # the likeliest
    scores: list[tuple[str, float]] = []  # the likeliest labels and their probabilities
    answers: list[tuple[str, str, float]] = []  # taught question, its likeliest class, probability
    trigger: str = ""  # the last condition that became true
    trigger_at: float = 0.0
    paradigm: str = ""
    reason: str = ""  # of the paradigm, or of a loss
    expected_ms: dict[str, float] = {}  # paradigm to what the board expected
    bytes_up: int = 0
    jpeg_bytes: int = 0
    after_ms: float = 0.0  # from capture to the answer
    latency: list[tuple[str, float]] = []  # station to ms, in the order of the way
    picture: int = 0  # the number of its last picture, which may be of another frame than the answer; 0: none
    picture_at: float = 0.0
    hour: list[Minute] = []  # of the last hour, the oldest first; minutes without an answer are left out


class BoardRow(Struct):
    """A board. Its fields but `at`, the time of its last message, and `cameras` are those of its status."""

    board: str
    at: float = 0.0
    state: str = ""
    version: str = ""
    bundle: str = ""
    paradigm: str = ""
    problems: dict[str, str] = {}
    cameras: list[CameraRow] = []

    def camera(self, name: str) -> CameraRow | None:
        return next((camera for camera in self.cameras if camera.name == name), None)


class ServerRow(Struct):
    """A server, as its status says; `accepted` and `proposed`: tokens of the answers that the page has seen."""

    server: str
    at: float = 0.0
    state: str = ""
    tier: str = ""
    version: str = ""
    target: str = ""
    is_taking: bool = False  # online, in the share, and requests reach it
    why: str = ""  # why it takes no requests
    waiting: int = 0
    capacity: int = 0
    busy_s: float = 0.0  # in the present batch
    batches: int = 0  # answered since the server's start
    batch_ms: float = 0.0  # medians
    pass_ms: float = 0.0
    received: int = 0
    answered: int = 0
    accepted: int = 0
    proposed: int = 0
    cost: float | None = None
    cost_today: float | None = None
    budget_per_day: float | None = None
    currency: str = ""


class Link(Struct):
    """The connection to the broker, and what the page leaves out."""

    site: str
    broker: str = ""
    is_online: bool = False
    not_shown: int = 0  # messages of boards beyond the bound
    ignored: int = 0  # messages that are none of this project's
    history: str = ""  # why texts are not kept at present; empty: they are
    meaning: str = ""  # why there is no search by meaning at present; empty: there is


class Update(Struct):
    """The changes since the last update. The first one of a connection has everything, and `is_first`."""

    now: float
    link: Link
    is_first: bool = False
    boards: list[BoardRow] = []
    servers: list[ServerRow] = []
    gone: list[str] = []  # boards that are forgotten
    gone_servers: list[str] = []


class Found(Struct):
    """An answer that was found. `at`: Unix seconds. `similarity`: of its meaning, up to 1; null: a search by words."""

    id: int
    at: float
    board: str
    camera: str
    text: str
    label: str
    similarity: float | None = None


class Answers(Struct):
    """Texts that were found, the newest or the most similar first. `has_more`: ask again, the last id in `before`."""

    answers: list[Found]
    has_more: bool


class Error(Struct):
    """Why there is no answer, and what to do."""

    error: str
