"""The statuses that servers publish: what they claim of themselves, bounded and checked.

Anybody who may publish on a status topic can claim anything for any number of servers. So a claim is used only until
this board has measured its own value, and the statuses of servers that answered this board are never evicted.
"""

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from edge_runtime.errors import AiflowError
from edge_runtime.logs import printable
from edge_runtime.wire import TopicError, topics
from edge_runtime.wire.bounded import decode_bounded
from edge_runtime.wire.envelope import Millis, Name, UInt32

logger = logging.getLogger(__name__)

MAX_STATUS = 16 * 1024  # bytes of JSON; a server writes 1 KB
SERVERS = 16  # whose statuses are remembered
CONTRADICTION_RATIO = 8.0  # a claimed price that differs by this factor from the measured one is counted
MAX_PROMPTS = 64  # that a server may have
MAX_WHY = 200  # characters of a server's reason, in events and logs
CLAIM_AGE_S = 60.0  # a server publishes its status every 10 s


class StatusError(AiflowError, ValueError):
    """A payload that is not the status of a server."""


class _Queue(Struct, frozen=True):
    waiting: UInt32 = 0


class _Price(Struct, frozen=True):
    batch: Millis = 0.0
    one_pass: Millis = msgspec.field(default=0.0, name="pass")


class _Target(Struct, frozen=True):
    latents: bool = True  # False: it takes pictures only
    drafts: bool = False  # they save it work, if they are of one of its bundles
    sample: bool = False  # False: it writes greedily only
    prompts: Annotated[tuple[Name, ...], Meta(max_length=MAX_PROMPTS)] = ()  # by name


class ServerStatus(Struct, frozen=True):
    """The fields that a board reads; it ignores all others."""

    state: Literal["online", "offline"]
    server: Annotated[Name, Meta(min_length=1)]
    queue: _Queue = _Queue()
    price_ms: _Price = _Price()
    share_proven: bool = True  # False: requests do not reach this server
    accepting: bool = True  # False: it takes no requests at present
    why: Any = ""  # it takes none, in its words; for people, so another type is no reason to refuse a status
    target: _Target = _Target()
    bundles: dict[str, str] = {}  # id, in hex digits, to name
    pictures: bool = True  # False: it takes latents only

    @property
    def takes_requests(self) -> bool:
        return self.state == "online" and self.share_proven and self.accepting

    @property
    def refuses(self) -> bool:
        """By its own decision, which it will publish when it changes."""
        return self.state == "online" and not self.accepting

    @property
    def reason(self) -> str:
        """Why it refuses, in its words; "" if it does not, or does not say."""
        return printable(self.why, MAX_WHY) if self.refuses and isinstance(self.why, str) else ""


_status = msgspec.json.Decoder(ServerStatus)


def decode_status(payload: bytes) -> ServerStatus:
    """Raises StatusError."""
    return decode_bounded(_status, payload, MAX_STATUS, "a server's status", StatusError)


class Claims(NamedTuple):
    """Medians of what the servers say of themselves. None: they say nothing."""

    queue_ms: float | None
    pass_ms: float | None


class Takes(NamedTuple):
    """The contents of this board that at least one server takes, by their statuses. Without a status: everything.

    A request that meets another server of the pool is refused and sent again, until it meets one that takes it. So one
    false claim does not keep requests from the other servers.
    """

    latents: bool = True
    pictures: bool = True
    wanted: str = ""  # only servers that can do this count, in words; empty: all
    drafts: bool = False  # with pictures; only if a server says so
    later: str = ""  # servers that can do what is wanted, but take no requests at present, each with its reason

    @property
    def lacking(self) -> str:
        """Why a request would be in vain, in words: no server can do what is wanted, or none of those that can takes
        requests. "" if one does, or if that is not known.
        """
        if self.latents or self.pictures or not self.wanted:
            return ""
        if self.later:
            return f"no server with {self.wanted} takes requests: {self.later}"
        return f"no server has {self.wanted}"


class _Received(NamedTuple):
    status: ServerStatus
    online: ServerStatus  # the latest that says what its target can do: that of a server that leaves says nothing
    at: float
    is_retained: bool  # the broker had kept it, so the server itself may be gone
    refusing_since: float | None  # when it first said that it takes no requests; None: it takes them


class ServerStatuses:
    """Written by the MQTT client's thread and read by the frame path: they share values that are replaced whole.

    The statuses do not use the queue of the measurements: a server that floods its topic would displace measurements.
    """

    def __init__(self, counts: Counter[str], bundle: str = "") -> None:
        """counts: of values that were ignored; adds to status_refused, status_contradicted and servers_forgotten.

        bundle: id of the board's, in hex digits.
        """
        self._bundle = bundle
        self.measured_pass_ms: float | None = None  # set by the frame path
        self._counts = counts
        self._received: dict[str, _Received] = {}  # by server, the stalest first; replaced by the MQTT client's thread
        self._answered: dict[str, None] = {}  # servers, the latest to answer last; replaced by the frame path

    def arrived(self, topic: str, payload: bytes, now: float, is_retained: bool = False) -> None:
        """A message on the topic of a server's status. is_retained: the broker had kept it."""
        try:
            server = topics.server_of(topic)
            if not payload:  # somebody has deleted the retained status of a server that is gone
                self._received = {name: each for name, each in self._received.items() if name != server}
                return
            status = decode_status(payload)
            if status.server != server:
                raise StatusError(f"it says that it is of {status.server!r}")
        except (TopicError, StatusError) as error:
            self._report("status_refused", topic, str(error))
            return
        measured, claimed = self.measured_pass_ms, status.price_ms.one_pass
        if measured and claimed and not measured / CONTRADICTION_RATIO < claimed < CONTRADICTION_RATIO * measured:
            why = f"it claims {claimed} ms per pass, the board measured {measured:.2f} ms and uses that"
            self._report("status_contradicted", server, why)
        received = dict(self._received)
        before = received.pop(server, None)
        if len(received) >= SERVERS:
            answered = self._answered
            evicted = next((name for name in received if name not in answered), server)
            self._report("servers_forgotten", evicted, f"more than {SERVERS} servers publish a status")
            if evicted == server:  # all others have answered
                return
            del received[evicted]
        since = None if status.takes_requests else now
        # A server that is online repeats its status all the time. "offline" is only published when it leaves.
        if since is not None and status.state == "online" and before and before.refusing_since is not None:
            since = before.refusing_since
        # At each connection the broker repeats what it keeps, which is then as old as it was before.
        at = before.at if is_retained and before and before.is_retained else now
        online = before.online if before and status.state != "online" else status
        self._received = {**received, server: _Received(status, online, at, is_retained, since)}

    def answered(self, server: str) -> None:
        """A server has answered this board."""
        others = [name for name in self._answered if name != server]
        self._answered = dict.fromkeys([*others[1 - SERVERS :], server])

    def find_silence(self) -> str:
        """Why no server can be expected to answer, in words; "" if one can. Any thread."""
        statuses = [each.status for each in self._received.values()]
        if any(status.takes_requests for status in statuses) or self._without_status():
            return ""
        if not statuses:
            return "no server has been heard: does `aiflow serve` run, with the same site and broker?"
        is_explained = all(status.reason for status in statuses)
        return self.why_refused() + ("" if is_explained else ": look at the server's log")

    def why_refused(self) -> str:
        """In words, if no server takes requests. Any thread."""
        names = self._named([each.status for each in self._received.values()])
        return f"no server takes requests: {names}" if names else "no server takes requests"

    @staticmethod
    def _named(statuses: Sequence[ServerStatus]) -> str:
        """With what each says of itself."""
        return ", ".join(f"{status.server} ({status.reason or status.state})" for status in statuses)

    def claims(self, now: float) -> Claims:
        """Of the servers that are online."""
        online = [each.status for each in self._received.values() if self._is_online(each, now)]
        queue_ms = [status.price_ms.batch if status.queue.waiting else 0.0 for status in online]
        pass_ms = [status.price_ms.one_pass for status in online if status.price_ms.one_pass]
        return Claims(*(statistics.median(values) if values else None for values in (queue_ms, pass_ms)))

    def takes(self, now: float, prompt: str = "", samples: bool = False) -> Takes:
        """By the servers that take requests; with the name of a prompt, by those that have it; by those that sample.

        If none takes requests at present, by those that are online: one of them may be the first to take them again.
        """
        received = list(self._received.values())
        online = [each.status for each in received if self._is_online(each, now)]
        if not (taking := [status for status in online if status.takes_requests] or online):
            return Takes()

        def is_able(status: ServerStatus) -> bool:
            return (not prompt or prompt in status.target.prompts) and (not samples or status.target.sample)

        wanted = [f"the prompt {prompt}"] * bool(prompt) + ["a target that samples"] * samples
        taking = [status for status in taking if is_able(status)]
        others = [each.status for each in received if each.status not in taking and is_able(each.online)]
        with_pictures = [status for status in taking if status.pictures]
        # A server that names no bundle says nothing of it.
        with_bundle = [status for status in taking if not status.bundles or self._bundle in status.bundles]
        return Takes(
            any(status.target.latents for status in with_bundle),
            bool(with_pictures),
            " and ".join(wanted),
            # The draft is a caption, so it is no guess at the answer to a prompt that asks something else.
            not prompt and any(status.target.drafts and self._bundle in status.bundles for status in with_pictures),
            self._named(others) if wanted else "",
        )

    def all_refuse(self, now: float, proven_at: float) -> bool:
        """All servers say that they take no requests, and no server has answered one that came after they said so.

        proven_at: when the latest request that has an answer was sent, -inf if there was none. A server that leaves
        still answers what it has.
        """
        since = [each.refusing_since for each in self._received.values()]
        return bool(since) and all(at is not None and min(at, now) >= proven_at for at in since)

    def will_say(self, now: float) -> bool:
        """All servers that are online say that they do not accept requests, so they will say when they do again.

        Only as long as each repeats its status: nobody takes back the status of a server that died without its will.
        """
        received = [each for each in self._received.values() if each.status.state == "online"]
        is_said = all(each.status.refuses and self._is_online(each, now) for each in received)
        return bool(received) and is_said and not self._without_status()

    def has_other(self, refused: AbstractSet[str], now: float) -> bool:
        """Whether a server besides these takes requests, as far as is known. Any thread."""
        taking = {
            name for name, each in self._received.items() if self._is_online(each, now) and each.status.takes_requests
        }
        return not refused >= taking | self._without_status()

    def _without_status(self) -> AbstractSet[str]:
        """Servers that have answered without ever publishing a status: they may answer again."""
        return self._answered.keys() - self._received.keys()

    @staticmethod
    def _is_online(each: _Received, now: float) -> bool:
        """It says so, and has said it lately."""
        return each.status.state == "online" and abs(now - each.at) <= CLAIM_AGE_S

    def _report(self, kind: str, whose: str, why: str) -> None:
        self._counts[kind] += 1
        if self._counts[kind] == 1:
            logger.warning("%s server=%.128r why=%s", kind.replace("_", " "), whose, why)
