"""Whether another server takes something, such as drafts or features, and when it is asked again.

Nothing is refused for good: a key, an option or a model may be corrected while this server runs. So it is asked again
after a time that doubles with each answer that changes nothing. Knows nothing of calls; times are seconds of one clock.

Any thread may call; a doubt that comes while the other server is being asked may be forgotten: the next one counts.
"""

from math import inf

FIRST_WAIT_S, LAST_WAIT_S = 30.0, 3600.0
LAST_DOUBT_WAIT_S = 300.0  # while it is taken: for so long, what is sent may be refused
# After a question that may have ended the other server's engine: asked too often, it would serve nobody.
FIRST_CRASH_WAIT_S, LAST_CRASH_WAIT_S = 3600.0, 86_400.0


class Acceptance:
    """What is known of one ability of the other server."""

    def __init__(self, is_taken: bool = False) -> None:
        self.is_taken = is_taken
        self.why = ""  # it is not taken; empty: it is, or nothing is known
        self.due = -inf  # when it is asked; inf: not before there is a doubt
        self._asked_after_s = FIRST_WAIT_S  # the wait that ends then; if it is due at once: the next check is not later
        self._may_crash = False
        self._asked_at, self._same = -inf, 0  # answers in a row that said the same

    def taken(self, now: float) -> None:
        """The other server has shown that it takes it."""
        self._same = self._same + 1 if self.is_taken else 1
        self.is_taken, self.why, self._may_crash = True, "", False
        self._asked_at, self.due = now, inf

    def refused(self, why: str, now: float, may_crash: bool = False) -> bool:
        """The other server does not take it; may_crash: its engine may have ended. Returns whether that is news."""
        is_news = why != self.why
        if self.is_taken or not self._same or may_crash != self._may_crash:
            self._same = 1
        elif now >= self.due:  # else several calls at once asked the same
            self._same += 1
        self.is_taken, self.why, self._may_crash = False, why, may_crash
        self._ask_after(self._wait_s(), now)
        return is_news

    def in_words(self) -> str:
        """Why it is not taken, and when it is asked again; empty: it is, or nothing is known."""
        return f"{self.why}: asked again after {self._asked_after_s:.0f} s" if self.why else ""

    def unknown(self, now: float) -> None:
        """The other server has not answered the question: what is known holds."""
        self._ask_after(FIRST_WAIT_S, now)

    def doubted(self, now: float) -> None:
        """Something speaks against what is known: ask soon, but not again and again."""
        self.due = min(self.due, max(now, self._asked_at + self._wait_s()))

    def was_away(self) -> None:
        """The other server may have been restarted: ask at once; until then, what is known holds.

        A question that may crash it keeps its long wait.
        """
        if not self._may_crash:
            self.due = -inf

    def forget(self, why: str, other_model: bool = False) -> None:
        """The other server is away, or has another model: ask at once, unless that may crash it."""
        if other_model or not self._may_crash:
            self.is_taken, self.why, self._may_crash, self._same = False, why, False, 0
            self.due, self._asked_after_s = -inf, FIRST_WAIT_S

    def _ask_after(self, wait_s: float, now: float) -> None:
        self._asked_at, self._asked_after_s, self.due = now, wait_s, now + wait_s

    def _wait_s(self) -> float:
        first, last = FIRST_WAIT_S, LAST_DOUBT_WAIT_S if self.is_taken else LAST_WAIT_S
        if self._may_crash:
            first, last = FIRST_CRASH_WAIT_S, LAST_CRASH_WAIT_S
        return float(min(last, first * 2.0 ** min(max(0, self._same - 1), 16)))
