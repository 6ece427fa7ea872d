"""The events of requests: what a board's users hear of one that was answered, kept or lost."""

import logging
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import msgspec

from edge_runtime.inference.bundle import Bundle
from edge_runtime.logs import printable
from edge_runtime.reporting.events import Events
from edge_runtime.requests.actions import Lose, Why
from edge_runtime.requests.answer_event import answer_event
from edge_runtime.requests.tracked import Tracked
from edge_runtime.wire import Event, Reply, WireError

logger = logging.getLogger(__name__)

MAX_AFTER_S = 1e6  # of an event
MAX_WHY = 1024  # characters, of an event


class RequestEvents:
    """Publishes them. For one thread."""

    def __init__(
        self, events: Events, bundle: Bundle, is_online: Callable[[], bool], find_silence: Callable[[], str]
    ) -> None:
        """is_online: whether the broker is connected. find_silence: see RequestTracker."""
        self._events, self._bundle = events, bundle
        self._is_online, self._find_silence, self._told_silence = is_online, find_silence, ""
        self._unanswered: set[str] = set()  # questions that were logged; the board's own, so they are few

    def announced(self, event: Event, tracked: Tracked | None) -> None:
        """A draft, of this request if it has not ended."""
        if tracked:
            event = msgspec.structs.replace(event, bytes_up=self._bytes_up(tracked))
        self._events.publish(event)

    def update(self, tracked: Tracked, reply: Reply, now: float) -> Event:
        """The event that a reply is to the board's users. Raises WireError if it claims an object that is none."""
        event = answer_event(tracked.event, reply, reply.text or self._bundle.text(reply.token_ids))
        # Unknown for a late reply to a request that an earlier run has sent.
        answer_ms = {} if tracked.sent_at is None else {"answer": round(1e3 * (now - tracked.sent_at), 1)}
        return msgspec.structs.replace(
            event,
            bytes_up=self._bytes_up(tracked),
            timings_ms=event.timings_ms | answer_ms,
            after_ms=_after_ms(now - tracked.captured),
        )

    def answered(self, tracked: Tracked, reply: Reply, now: float) -> None:
        self._warn_of_unanswered(tracked, reply)
        try:
            update = tracked.answer or self.update(tracked, reply, now)
            self._events.publish(update)
        except WireError as error:  # a late reply to a kept request; others are checked before they are counted
            self._publish(tracked, now, type="lost", final=True, why=unusable(reply, error).text)
        else:
            tracked.event = update

    def settled(self, tracked: Tracked, why: Why, now: float) -> None:
        """The latest answer is final after all."""
        self._publish(tracked, now, final=True, why=why.text)

    def postponed(self, tracked: Tracked, why: Why, now: float) -> None:
        """The outbox has it."""
        self._publish(tracked, now, type="update", final=False, why=f"{self._reason(why)}: kept, asked again later")

    def lost(self, lose: Lose[Tracked], now: float) -> None:
        why = self._reason(lose.why)
        logger.info("request lost id=%s reason=%s", lose.id.hex(), why)
        if lose.content:
            self._publish(lose.content, now, type="lost", final=True, why=why)
        else:
            captured = datetime.now(timezone.utc)  # nobody knows any more
            lost = Event(type="lost", frame=lose.id.hex(), camera="unknown", captured=captured, final=True)
            self._events.publish(msgspec.structs.replace(lost, why=why[:MAX_WHY]))

    def _publish(self, tracked: Tracked, now: float, why: str, **changes: Any) -> None:
        after_ms = _after_ms(now - tracked.captured)
        self._events.publish(
            msgspec.structs.replace(
                tracked.event, bytes_up=self._bytes_up(tracked), after_ms=after_ms, why=why[:MAX_WHY], **changes
            )
        )

    def _bytes_up(self, tracked: Tracked) -> int:
        return tracked.bytes_up(self._is_online())

    def _reason(self, why: Why) -> str:
        """Why a request has no answer. If no server could have answered, this is the reason, and is logged once."""
        if why.code not in ("no_reply", "stopping") or not (silence := self._find_silence()):
            return why.text
        if silence != self._told_silence:
            self._told_silence = silence
            logger.warning("no answer: %s", silence)
        return silence if why.code == "no_reply" else f"{why.text}: {silence}"

    def _warn_of_unanswered(self, tracked: Tracked, reply: Reply) -> None:
        """A server leaves out the questions that it does not know. Each is logged once: it may be misspelt here."""
        options = tracked.request.options
        asked = options.questions if options and reply.final else ()
        for name in set(asked) - (reply.answers or {}).keys() - self._unanswered:
            self._unanswered.add(name)
            logger.warning(
                "question not answered question=%s camera=%s server=%r: its [questions] has none of that name",
                name,
                tracked.event.camera,
                reply.server,
            )


def unusable(reply: Reply, error: WireError) -> Why:
    """Why a reply is no event, in words that a terminal can show."""
    return Why("failed", printable(f"server {reply.server}: {error}"))


def _after_ms(seconds: float) -> float:
    """As an event can hold it: what was kept for weeks, or under a clock that jumped, is as old as can be said."""
    return 1e3 * min(max(0.0, seconds), MAX_AFTER_S)
