"""The conditions of a camera's triggers: a small language over the answers to a frame. Values only, no I/O.

    condition = or ["for" N "frames"]
    or        = and {"or" and}
    and       = not {"and" not}
    not       = "not" not | "(" or ")" | subject ("==" | "!=") class | "confidence" (">" | ">=" | "<" | "<=") number
    subject   = a question's name | "label"

A comparison is about the likeliest class: `gate == open` is true if `open` is the likeliest answer to `gate`. Names and
classes are words, or text in double quotes. `confidence` is the lowest probability of the comparisons that are true at
the moment, 0 if none is: the probability of the class for `==`, the rest for `!=`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.errors import ConfigError

MAX_CONDITION = 256  # characters, as in an event
MAX_DEPTH = 16  # parentheses and "not" inside each other
MAX_FRAMES = 1000
LABEL, CONFIDENCE = "label", "confidence"
RESERVED = ("and", "or", "not", "for", "frames", "frame", CONFIDENCE)
TOKEN = re.compile(r'\s*(?:(?P<text>"[^"]*")|(?P<word>[\w.-]+)|(?P<sign>==|!=|>=|<=|>|<|\(|\)))')

Answers = Mapping[str, Mapping[str, float]]  # question, or LABEL, to class to probability; never empty inside


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether the likeliest class of a question is this one."""

    question: str  # or LABEL
    operator: str  # == or !=
    name: str  # the class

    def probability(self, answers: Answers) -> float:
        """That it is true."""
        share = answers[self.question].get(self.name, 0.0)
        return share if self.operator == "==" else 1.0 - share

    def holds(self, answers: Answers) -> bool:
        shares = answers[self.question]
        return (max(shares, key=shares.__getitem__) == self.name) == (self.operator == "==")


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound on the confidence."""

    operator: str  # >, >=, < or <=
    limit: float  # 0 to 1

    def holds(self, confidence: float) -> bool:
        return {
            ">": confidence > self.limit,
            ">=": confidence >= self.limit,
            "<": confidence < self.limit,
            "<=": confidence <= self.limit,
        }[self.operator]


@dataclass(frozen=True, slots=True)
class Combined:
    """Conditions under one word."""

    word: str  # and, or; not, with one part
    parts: "tuple[Part, ...]"


Part = Comparison | Bound | Combined


@dataclass(frozen=True, slots=True)
class Condition:
    part: Part
    comparisons: tuple[Comparison, ...]
    frames: int = 1  # in a row for which it must be true

    @property
    def questions(self) -> frozenset[str]:
        """That must have been answered; LABEL may be among them."""
        return frozenset(comparison.question for comparison in self.comparisons)

    def holds(self, answers: Answers) -> bool:
        """For answers to all of its questions."""
        shares = [c.probability(answers) for c in self.comparisons if c.holds(answers)]
        confidence = min(shares, default=0.0)

        def holds(part: Part) -> bool:
            if isinstance(part, Comparison):
                return part.holds(answers)
            if isinstance(part, Bound):
                return part.holds(confidence)
            values = map(holds, part.parts)
            return all(values) if part.word == "and" else any(values) if part.word == "or" else not any(values)

        return holds(self.part)


def parse_condition(text: str, label_names: Mapping[str, str] | None = None) -> Condition:
    """label_names: of labels that may also be given by an id. Raises ConfigError, which says where it ends to be one
    and what was wanted there.
    """
    if len(text) > MAX_CONDITION:
        raise ConfigError(f"a condition of {len(text)} characters, want at most {MAX_CONDITION}")
    return _Parser(text, label_names or {}).condition()


class _Parser:
    """By recursive descent, one method per rule."""

    def __init__(self, text: str, label_names: Mapping[str, str]) -> None:
        self._text, self._at, self._depth, self._label_names = text, 0, 0, label_names
        self._comparisons: list[Comparison] = []

    def condition(self) -> Condition:
        part = self._any_of()
        frames = 1
        if self._take("for"):
            frames = int(self._number("a whole number of frames", 1, MAX_FRAMES, r"[0-9]{1,4}"))
            if not (self._take("frames") or self._take("frame")):
                raise self._error('"frames"')
        if self._text[self._at :].strip():
            raise self._error('"and", "or", "for" or the end')
        if not self._comparisons:
            raise ConfigError(
                f"{self._text!r} compares no question: want at least one comparison, such as gate == open"
            )
        return Condition(part, tuple(dict.fromkeys(self._comparisons)), frames)

    def _any_of(self) -> Part:
        parts = [self._every_of()]
        while self._take("or"):
            parts.append(self._every_of())
        return Combined("or", tuple(parts))

    def _every_of(self) -> Part:
        parts = [self._single()]
        while self._take("and"):
            parts.append(self._single())
        return Combined("and", tuple(parts))

    def _single(self) -> Part:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"{self._text!r} has more than {MAX_DEPTH} parentheses and nots inside each other")
        part: Part
        if self._take("not"):
            part = Combined("not", (self._single(),))
        elif self._take("("):
            part = self._any_of()
            if not self._take(")"):
                raise self._error('")"')
        elif self._take(CONFIDENCE):
            operator = self._operator(">", ">=", "<", "<=")
            part = Bound(operator, self._number("a number", 0, 1, r"[0-9]{1,3}(\.[0-9]{1,9})?"))
        else:
            question = self._name("a question, label, confidence, not or (")
            operator, name = self._operator("==", "!="), self._name("a class")
            part = Comparison(question, operator, self._label_names.get(name, name) if question == LABEL else name)
            self._comparisons.append(part)
        self._depth -= 1
        return part

    def _peek(self) -> tuple[str, int]:
        """The next token, a quoted text with its first quote, and where it ends; "" for none."""
        found = TOKEN.match(self._text, self._at)
        return (found[0].strip(), found.end()) if found else ("", self._at)

    def _take(self, *wanted: str) -> str:
        token, end = self._peek()
        if token not in wanted:
            return ""
        self._at = end
        return token

    def _operator(self, *wanted: str) -> str:
        if not (found := self._take(*wanted)):
            raise self._error(" or ".join(wanted))
        return found

    def _name(self, wanted: str) -> str:
        token, end = self._peek()
        is_word = re.fullmatch(r"[\w.-]+", token) and token not in RESERVED
        if not is_word and not (token.startswith('"') and len(token) > 2):
            raise self._error(wanted)
        self._at = end
        return token.strip('"')

    def _number(self, wanted: str, low: int, high: int, pattern: str) -> float:
        token, end = self._peek()
        if not re.fullmatch(pattern, token) or not low <= float(token) <= high:
            raise self._error(f"{wanted} from {low} to {high}")
        self._at = end
        return float(token)

    def _error(self, wanted: str) -> ConfigError:
        rest = self._text[self._at :].strip()
        where = f"at {rest[:32]!r}" if rest else "at its end"
        return ConfigError(f"{self._text!r} is no condition: {where} want {wanted}")
