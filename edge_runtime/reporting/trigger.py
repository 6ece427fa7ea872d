"""A trigger: tells once when a condition on a camera's verified answers becomes true. A state machine without I/O."""

from collections.abc import Mapping

from edge_runtime.config.conditions import LABEL, Comparison, parse_condition
from edge_runtime.wire import Event


class Trigger:
    """One condition of one camera.

    Only a frame's final answer of a server counts, or one that is used again for a later frame. A frame that was lost,
    or whose answer lacks a question, changes nothing, nor does one that was captured before the last one that counted:
    answers may overtake each other, and an outbox sends what is hours old.
    """

    def __init__(self, when: str, label_names: Mapping[str, str] | None = None) -> None:
        """label_names: by id. Raises ConfigError."""
        self.when, self.condition = when, parse_condition(when, label_names)
        self._frame = ""  # the last one that counted
        self._true_in_row = 0

    def step(self, event: Event) -> bool:
        """Whether the condition has just become true, which it has when it was true for its frames in a row."""
        answers = answers_of(event)
        is_verified = event.type == "update" or event.reuse is not None
        is_answer = is_verified and event.final and self.condition.questions <= answers.keys()
        # Frames are ids in hex that rise with time, whatever the clock does.
        if not is_answer or event.frame <= self._frame:
            return False
        self._frame = event.frame
        self._true_in_row = self._true_in_row + 1 if self.condition.holds(answers) else 0
        return self._true_in_row == self.condition.frames

    def unknown_class(self, event: Event) -> Comparison | None:
        """A comparison with a class that its question does not have, so it says nothing; None: there is none."""
        # The labels of an event are only the likeliest.
        for comparison in self.condition.comparisons:
            if comparison.name not in event.answers.get(comparison.question, (comparison.name,)):
                return comparison
        return None


def answers_of(event: Event) -> dict[str, dict[str, float]]:
    """What a condition can ask of an event: the answers that are not empty, and the likeliest labels."""
    answers = {name: shares for name, shares in event.answers.items() if shares}
    if event.label is not None:
        answers[LABEL] = event.scores | {event.label: event.scores.get(event.label, 1.0)}
    return answers
