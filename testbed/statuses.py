"""What a status tells of a board or a server: whether it is there, and ready."""

import msgspec


class StatusFields(msgspec.Struct, frozen=True):
    """The fields of a board's or a server's status that say so; docs/protocol.md, section 9."""

    state: str = ""
    server: str = ""
    share_proven: bool = False  # requests reach this server
    boot: str = ""  # of a board: tells one start from the next


def read_status(payload: bytes) -> StatusFields:
    """The defaults if this is not a status: anybody may publish anything on its topic."""
    try:
        return msgspec.json.decode(payload, type=StatusFields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return StatusFields()
