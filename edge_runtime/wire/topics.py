"""The topics, as functions of ids; docs/protocol.md, section 2.

The direction is part of the topic, so that a broker's access list needs two patterns per board: a board may write
`aiflow/<site>/<board>/up/#` and read `aiflow/<site>/<board>/down/#`.
"""

import re

from edge_runtime.wire.errors import TopicError

ROOT = "aiflow"
SERVERS = "server"  # in the place of a board's id, so no board may have this name
_ID = re.compile(r"[a-z0-9-]{1,32}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")  # of settings and cameras; Frigate's camera names fit
_SERVER_STATUS = re.compile(rf"{ROOT}/{_ID.pattern}/{SERVERS}/({_ID.pattern})/status")
_REQUEST = re.compile(rf"({ROOT}/{_ID.pattern}/({_ID.pattern}))/up/request")


def request(site: str, board: str) -> str:
    """Board to servers, QoS 1."""
    return f"{_board(site, board)}/up/request"


def request_share(pool: str, site: str) -> str:
    """The servers of a pool subscribe to this: each request of the site goes to one of them (MQTT 5, section 4.8.2)."""
    return f"$share/{_id('pool', pool)}/{ROOT}/{_id('site', site)}/+/up/request"


def reply(site: str, board: str) -> str:
    """Server to board, QoS 1."""
    return f"{_board(site, board)}/down/reply"


def board_of(request_topic: str) -> str:
    """The board that sent a request. Raises TopicError for any topic that is not a request's."""
    return _parse(request_topic)[1]


def reply_topic_for(request_topic: str) -> str:
    """The topic of the reply. It is derived: a response-topic property would let a board publish in another's name."""
    return f"{_parse(request_topic)[0]}/down/reply"


def event(site: str, board: str) -> str:
    """Board to users, JSON, QoS 1."""
    return f"{_board(site, board)}/up/event"


def last(site: str, board: str) -> str:
    """The last event, retained."""
    return f"{_board(site, board)}/up/last"


def status(site: str, board: str) -> str:
    """Board to all, JSON, retained; the last will says offline."""
    return f"{_board(site, board)}/up/status"


def server_status(site: str, server: str) -> str:
    """Server to all, JSON, retained; the last will says offline."""
    return f"{ROOT}/{_id('site', site)}/{SERVERS}/{_id('server', server)}/status"


def server_statuses(site: str) -> str:
    """A filter over all of them."""
    return f"{ROOT}/{_id('site', site)}/{SERVERS}/+/status"


def server_setting(site: str, server: str, name: str) -> str:
    """Users to a server: a new value for a run-time setting."""
    return f"{ROOT}/{_id('site', site)}/{SERVERS}/{_id('server', server)}/set/{_id('name', name, _NAME)}"


def server_of(status_topic: str) -> str:
    """The server that a status is of. Raises TopicError for any topic that is not a server's status."""
    found = _SERVER_STATUS.fullmatch(status_topic)
    if not found:
        raise TopicError(f"topic {status_topic[:128]!r} is no server's: want {ROOT}/<site>/{SERVERS}/<server>/status")
    return found[1]


def frame(site: str, board: str, camera: str | None = None) -> str:
    """Camera software to board: a picture file as it is, QoS 0. None: to the board's only MQTT camera."""
    bare = f"{_board(site, board)}/down/frame"
    return bare if camera is None else f"{bare}/{_id('camera', camera, _NAME)}"


def frames(site: str, board: str) -> str:
    """A filter over all of them."""
    return f"{frame(site, board)}/#"


def camera_of(frame_topic: str) -> str | None:
    """The camera that a picture is for, as the sender wrote it; None: the topic names none."""
    _, _, camera = frame_topic.partition("/down/frame/")
    return camera or None


def settings(site: str, board: str) -> str:
    """A filter over all run-time settings of a board."""
    return f"{_board(site, board)}/down/set/+"


def setting(site: str, board: str, name: str) -> str:
    """Users to a board: a new value for a run-time setting."""
    return f"{_board(site, board)}/down/set/{_id('name', name, _NAME)}"


def state(site: str, board: str, name: str) -> str:
    """Board to users: the value of a run-time setting, retained."""
    return f"{_board(site, board)}/up/state/{_id('name', name, _NAME)}"


def bundle_offer(site: str, board: str) -> str:
    """A sender to a board: the signature of a new bundle."""
    return f"{_board(site, board)}/down/bundle/offer"


def bundle_chunk(site: str, board: str) -> str:
    """A sender to a board: a piece of a file that the board has asked for."""
    return f"{_board(site, board)}/down/bundle/chunk"


def bundle_state(site: str, board: str) -> str:
    """Board to the sender: what it needs of the offered bundle, or what became of it."""
    return f"{_board(site, board)}/up/bundle"


def bundle_install(site: str, board: str) -> str:
    """Users to a board: install the bundle that waits. Beside the settings, so that the same rights are enough."""
    return setting(site, board, "update")


def image(site: str, board: str, camera: str) -> str:
    """Board to users: a small JPEG of a camera's last frame, QoS 0, not retained."""
    return f"{_board(site, board)}/up/image/{_id('camera', camera, _NAME)}"


def device_id(site: str, board: str) -> str:
    """What Home Assistant knows a board by. Ids have no underscore, so two boards never have the same."""
    return _board(site, board).replace("/", "_")


def discovery(prefix: str, site: str, board: str) -> str:
    """Board to Home Assistant: what the board has, JSON, retained. prefix: Home Assistant's, a checked setting."""
    return f"{prefix}/device/{device_id(site, board)}/config"


def discovery_status(prefix: str) -> str:
    """Home Assistant to all: online, when it has started."""
    return f"{prefix}/status"


def _id(what: str, value: str, pattern: re.Pattern[str] = _ID) -> str:
    if not pattern.fullmatch(value):
        raise TopicError(f"{what} {value[:64]!r} must match {pattern.pattern}: it becomes a level of MQTT topics")
    return value


def _board(site: str, board: str) -> str:
    if board == SERVERS:
        raise TopicError(f"a board cannot be called {SERVERS!r}, the servers' topics are there: rename it")
    return f"{ROOT}/{_id('site', site)}/{_id('board', board)}"


def _parse(request_topic: str) -> tuple[str, str]:
    found = _REQUEST.fullmatch(request_topic)
    if not found or found[2] == SERVERS:
        raise TopicError(f"topic {request_topic[:128]!r} is no request's: want {ROOT}/<site>/<board>/up/request")
    return found[1], found[2]
