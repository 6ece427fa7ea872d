"""The numbers that a board counts, and what each of them means.

Components count; each offers its numbers as name -> number, or name -> {label: number} if they come in kinds, which may
have kinds of their own. Nothing is counted a second time here. A name without a meaning is an error of the test suite.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

Value = float | Mapping[str, float | Mapping[str, float]]  # a mapping is label -> number
Values = Mapping[str, Value]


class Meaning(NamedTuple):
    """The meaning of a number, for people."""

    text: str
    label: str = ""  # what distinguishes the kinds, if the number comes in kinds; "broker, what": kinds of kinds
    is_gauge: bool = False  # may fall; everything else is a counter
    is_summary: bool = False  # {"count": of events, "sum": of their values}; the mean is sum / count

    @property
    def labels(self) -> list[str]:
        return self.label.split(", ") if self.label else []

    @property
    def suffix(self) -> str:
        """Of its name for Prometheus: prometheus.io/docs/practices/naming."""
        return "" if self.is_gauge or self.is_summary else "_total"


BOARD = {
    "accepted": Meaning("Requests that the board took on: accepted + found = answered + lost + open + kept"),
    "found": Meaning("Requests that an earlier run left in the outbox"),
    "answered": Meaning("Requests that a server answered"),
    "lost": Meaning("Requests that ended without an answer, each reported in an event"),
    "open": Meaning("Requests that wait for an answer", is_gauge=True),
    "kept": Meaning("Requests in the outbox, to be asked again", is_gauge=True),
    "replayed": Meaning("Requests asked again out of the outbox"),
    "resent": Meaning("Requests sent once more, with the same id, since no reply came"),
    "busy": Meaning("Replies that asked to come back later"),
    "duplicate": Meaning("Replies to requests that had been answered"),
    "late": Meaning("Replies to requests that had been lost or kept"),
    "unknown": Meaning("Replies to nothing that the board remembers"),
    "reply": Meaning(
        "Replies, by what they said; overflow: no room to read them, overtaken: ended before the draft was told, "
        "not_final_again: nothing new, over_budget: requests not sent again for want of bytes",
        "status",
    ),
    "answer_seconds": Meaning(
        "Seconds from the capture to the first answer of a server, without requests that the outbox had kept",
        is_summary=True,
    ),
    "request_bytes": Meaning("Bytes of all requests that the broker has, resends and replays included"),
    "jpeg_bytes": Meaning("Bytes that the handled frames would have as JPEGs, to compare"),
    "handled": Meaning("Frames that were handled, by the paradigm that was chosen", "paradigm"),
    "paradigm": Meaning("1 for the paradigm that is set: auto, or one for all frames", "paradigm", is_gauge=True),
    "frames_failed": Meaning("Frames that head or coder could not handle"),
    "triggered": Meaning("Events of triggers"),
    "reused": Meaning("Frames for which an earlier answer was used again, so that nothing was sent"),
    "with_reference": Meaning("Frames that were coded against an earlier one, to send fewer bytes"),
    "frames": Meaning("Frames read from cameras, files and MQTT"),
    "still": Meaning("Frames held back by the motion gate"),
    "lightning": Meaning("Frames held back because the whole picture changed at once"),
    "skipped": Meaning(
        "Frames that a newer one replaced before they were handled, that came too early, or that had not changed, and "
        "pictures that were in a watched folder at the first start"
    ),
    "unreadable": Meaning("Pictures that could not be decoded, and files of a watched folder that were refused"),
    "frames_kept": Meaning("Frames that [kept_frames] keeps as files: kept, failed (not written)", "what"),
    "reopened": Meaning("Cameras opened again after a stall, an end or an error"),
    "cameras": Meaning("Cameras, by their state now", "state", is_gauge=True),
    "temperature_celsius": Meaning("Temperature of the hottest thermal zone, if the board has one", is_gauge=True),
    "throttled": Meaning("1 while the processor is slowed down for its heat, if the board says so", is_gauge=True),
    "info": Meaning("1 for the version of the program", "version", is_gauge=True),
    "frigate_events": Meaning(
        "Frigate's events: begun = taken (a snapshot was chosen) + no_snapshot (none came) + dropped (too many waited, "
        "or the camera was switched off) + frigate_open; missed: ended without the board having seen their beginning",
        "what",
    ),
    "frigate_open": Meaning("Frigate's events that wait to be taken", is_gauge=True),
    "frigate_answers": Meaning(
        "Answers for Frigate's HTTP interface, descriptions and sub labels one by one: accepted = written + "
        "refused (invalid for Frigate) + expired (Frigate was away, or did not know the event, for too long) + dropped "
        "(too many waited, or the board stopped) + frigate_waiting; failed: tries that failed",
        "what",
    ),
    "frigate_waiting": Meaning("Answers that wait for Frigate", is_gauge=True),
    "setting": Meaning("Messages to run-time settings: set, refused (not a value), unknown (no such setting)", "what"),
    "rejected": Meaning(
        "Messages from a broker that were not used: retained (published before this connection), no_camera (a picture "
        "for no MQTT camera of this board), no_update (a part of an update that is too large or faster than the "
        "disk), no_route (a topic that the board did not subscribe to), unreadable (not a message of Frigate's)",
        "why",
    ),
    "ignored": Meaning(
        "Statements of servers that were not used: status_refused (not a server's status), status_contradicted (far "
        "from what was measured), hops_refused (a server that worked longer than the board waited), passes_refused "
        "(more passes than its text has tokens), servers_forgotten, bad_value, overflow",
        "what",
    ),
    "mqtt": Meaning(
        "Messages to and from a broker (servers; local: the near one, if there is one), by what became of them; its "
        "connections",
        "broker, what",
    ),
    "mqtt_pending": Meaning("Messages to a broker that wait or are in flight", "broker", is_gauge=True),
    "mqtt_connected": Meaning("1 while the broker answers", "broker", is_gauge=True),
}


def kinds(value: Value, *labels: str) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers of a value with their labels; none for a number that does not come in kinds."""
    if isinstance(value, Mapping):
        for label, inner in value.items():
            yield from kinds(inner, *labels, label)
    else:
        yield labels, value


def not_zero(values: Values) -> str:
    """The numbers that are not zero, for a log line: `lost=2 reply{ok}=40 mqtt{local,sent}=9`."""
    flat = ((name, labels, number) for name, value in values.items() for labels, number in kinds(value) if number)
    return " ".join(f"{name}{{{','.join(labels)}}}={n:g}" if labels else f"{name}={n:g}" for name, labels, n in flat)
