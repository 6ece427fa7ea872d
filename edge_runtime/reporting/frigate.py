"""Writes answers back into Frigate, by its HTTP interface: the description and the sub label of its event.

The fields and their lengths are those of Frigate's OpenAPI description (EventsDescriptionBody, EventsSubLabelBody). A
Frigate that is away, slow or answers nonsense delays nothing but these answers: they wait in a bounded queue, on a
thread of their own, and each ends in one counter.
"""

import heapq
import itertools
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from math import inf
from typing import Any, NamedTuple

from edge_runtime.config.frigate import FrigateConfig
from edge_runtime.errors import ConfigError
from edge_runtime.http_call import CallError, Endpoint
from edge_runtime.logs import is_told, printable
from edge_runtime.wire.event import Event

logger = logging.getLogger(__name__)

MAX_WAITING = 128  # answers; then the oldest is dropped
MAX_AGE_S = 600.0  # then an answer is given up: by then Frigate has an event for good, or never
CALL_S = 10.0  # for one call
STOP_S = 3.0  # for the answers that wait when the board stops
MAX_SUB_LABEL = 100  # characters; EventsSubLabelBody
INVALID = (400, 405, 413, 415, 422)  # statuses of a request that gets no better by another try
UNKNOWN_EVENT = 404
REMEDIES = {
    301: "write the final address into url",
    302: "write the final address into url, and is the token in token_file valid?",
    401: "is the token in token_file valid, or has it expired?",
    403: "does the token belong to a user with the role admin?",
    UNKNOWN_EVENT: "Frigate does not have the event yet, keeps it no longer, or url is not that of Frigate",
}


class _Answer(NamedTuple):
    due: float  # of its next try, time.monotonic()
    number: int  # in the order of arrival; no two are compared beyond it
    path: str
    body: bytes
    expires: float  # time.monotonic()
    pause_s: float  # before the next try, if Frigate does not know the event


def calls_for(event: Event, config: FrigateConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """Path and JSON body of each call that a final answer becomes. Empty for any other event."""
    if not (event.frigate and event.final):
        return []
    calls: list[tuple[str, Mapping[str, Any]]] = []
    if config.description and event.text:
        calls.append(("description", {"description": _one_line(event.text)}))
    if label := _sub_label(event, config.sub_label):
        name, score = label
        body: dict[str, Any] = {"subLabel": _one_line(name)[:MAX_SUB_LABEL]}
        calls.append(("sub_label", body | {"subLabelScore": score} if score > 0 else body))  # 0 is not allowed
    return [(f"/api/events/{event.frigate.event}/{last}", body) for last, body in calls]


def _sub_label(event: Event, what: str | None) -> tuple[str, float] | None:
    """The likeliest class of what is asked for, and its probability, if the event has one."""
    if what == "label":
        return (event.label, event.scores.get(event.label, 0.0)) if event.label else None
    shares = event.answers.get(what or "")
    return max(shares.items(), key=lambda share: share[1]) if shares else None


def _one_line(text: str) -> str:
    """Without line breaks and characters that change how others are shown: the text may come from a model."""
    return printable(" ".join(text.split()))


class FrigateAnswers:
    """Open while `with` lasts. At the end, what waits is tried once more, for at most STOP_S."""

    def __init__(
        self, config: FrigateConfig, on_trouble: Callable[[str], None] = lambda _: None, min_pause_s: float = 1.0
    ) -> None:
        """on_trouble: called with what is wrong with Frigate, and "" when it works again; on a thread of its own.
        min_pause_s: after a failed try, doubled each time up to a minute.

        Raises ConfigError for a file that cannot be used.
        """
        assert config.url  # else there is nothing to do
        config.check_files()
        self._config, self._on_trouble = config, on_trouble
        self._min_pause_s, self._max_pause_s = min_pause_s, 60.0 * min_pause_s
        self._endpoint = Endpoint(config.url, config.ca_file, REMEDIES, checks_certificate=not config.insecure)
        self._numbers = itertools.count()
        self._waiting: list[_Answer] = []  # a heap
        self._in_call = 0
        self._counts = Counter(dict.fromkeys(("accepted", "written", "refused", "expired", "dropped", "failed"), 0))
        self._trouble, self._pause_s, self._paused_until = "", min_pause_s, -inf
        self._stop_at = inf  # time.monotonic()
        self._changed = threading.Condition()  # over all above
        self._thread = threading.Thread(target=self._run, name="frigate", daemon=True)

    # ---- any thread; nothing here blocks ----

    def put(self, event: Event) -> None:
        """An event of the board's. Only final ones with an event of Frigate's are of use."""
        now = time.monotonic()
        for path, body in calls_for(event, self._config):
            data = json.dumps(body).encode()
            with self._changed:
                self._counts["accepted"] += 1
                answer = _Answer(now, next(self._numbers), path, data, now + MAX_AGE_S, self._min_pause_s)
                heapq.heappush(self._waiting, answer)
                if len(self._waiting) > MAX_WAITING:
                    oldest = min(self._waiting, key=lambda each: each.number)
                    self._waiting.remove(oldest)
                    heapq.heapify(self._waiting)
                    self._ended("dropped", oldest, f"more than {MAX_WAITING} answers wait for Frigate")
                self._changed.notify()

    def counts(self) -> dict[str, Any]:
        """Numbers with the names of reporting/counters.py."""
        with self._changed:
            return {
                "frigate_answers": dict(self._counts),
                "frigate_waiting": len(self._waiting) + self._in_call,
            }

    def __enter__(self) -> "FrigateAnswers":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stop_at = time.monotonic() + STOP_S
            self._waiting = [answer._replace(due=-inf) for answer in self._waiting]  # one more try for each
            heapq.heapify(self._waiting)
            self._changed.notify()
        self._thread.join(STOP_S)
        self._endpoint.close()  # ends a call that still lasts; only the system's resolver cannot be ended
        self._thread.join(STOP_S)

    # ---- the thread ----

    def _run(self) -> None:
        while answer := self._next():
            self._try(answer)
        with self._changed:
            for left in self._waiting:
                self._ended("dropped", left, "the board stops")
            self._waiting.clear()

    def _next(self) -> _Answer | None:
        """The next answer, when it is due. None: it is time to stop."""
        with self._changed:
            while True:
                now = time.monotonic()
                is_stopping = self._stop_at < inf
                if is_stopping and (not self._waiting or now >= self._stop_at or self._waiting[0].due > -inf):
                    return None
                due = max(self._waiting[0].due, -inf if is_stopping else self._paused_until) if self._waiting else inf
                if due <= now:
                    answer = heapq.heappop(self._waiting)
                    if answer.expires > now:
                        self._in_call = 1
                        return answer
                    self._ended("expired", answer, self._trouble or REMEDIES[UNKNOWN_EVENT])
                    continue
                self._changed.wait(None if due == inf else due - now)

    def _try(self, answer: _Answer) -> None:
        try:
            self._write(answer)
        except CallError as error:
            self._failed(answer, error)
            return
        with self._changed:
            self._in_call = 0
            self._counts["written"] += 1
            self._pause_s = self._min_pause_s
        self._tell("")

    def _write(self, answer: _Answer) -> None:
        """Raises CallError."""
        try:
            token = self._config.token()
        except ConfigError as error:  # somebody is replacing the file
            raise CallError("refused", str(error)) from error
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        received = self._endpoint.post(answer.path, answer.body, headers, CALL_S)
        try:
            said = json.loads(received)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict) or "success" not in said:
            raise CallError("no_answer", "the response is not Frigate's: does url lead to Frigate, or to a login page?")
        if said["success"] is not True:
            raise CallError("refused", "Frigate says that it did not succeed", status=INVALID[0])

    def _failed(self, answer: _Answer, error: CallError) -> None:
        """Refused for good, or another try later. If only this event is unknown, the others need not wait."""
        now, is_refused, is_unknown = time.monotonic(), error.status in INVALID, error.status == UNKNOWN_EVENT
        with self._changed:
            self._in_call = 0
            self._counts["failed"] += 1
            # At random, so that boards do not all come back in one moment; at least half, so that Frigate can start.
            if is_refused:
                self._ended("refused", answer, str(error))
            elif is_unknown:
                pause_s = random.uniform(answer.pause_s / 2, answer.pause_s)
                again = answer._replace(due=now + pause_s, pause_s=min(2 * answer.pause_s, self._max_pause_s))
                heapq.heappush(self._waiting, again)
            else:
                pause_s = random.uniform(self._pause_s / 2, self._pause_s)
                self._paused_until, self._pause_s = now + pause_s, min(2 * self._pause_s, self._max_pause_s)
                heapq.heappush(self._waiting, answer._replace(due=now))
        if error.kind != "stopped":
            self._tell("" if is_refused or is_unknown else str(error))  # Frigate works, whatever this answer is

    def _ended(self, what: str, answer: _Answer, why: str) -> None:
        """Under the lock: an answer that Frigate will not get."""
        self._counts[what] += 1
        if is_told(count := self._counts[what]):
            logger.warning("frigate answer %s path=%s count=%d: %s", what, answer.path, count, why)

    def _tell(self, trouble: str) -> None:
        """Each change once: Frigate may be away all night."""
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble:
                logger.warning("frigate takes no answers reason=%s", trouble)
            else:
                logger.info("frigate takes answers")
            self._on_trouble(trouble)
