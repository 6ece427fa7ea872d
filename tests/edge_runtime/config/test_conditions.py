"""The language of triggers: what it means, and what it says of texts that are none of it."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.config.conditions import MAX_DEPTH, parse_condition
from edge_runtime.errors import ConfigError

ANSWERS = {
    "gate": {"open": 0.95, "closed": 0.05},
    "door": {"open": 0.3, "half open": 0.6, "closed": 0.1},
    "label": {"dog": 0.8, "cat": 0.1},
}


@pytest.mark.parametrize(
    ("text", "is_true"),
    [
        ("gate == open", True),
        ("gate == closed", False),
        ("gate != closed", True),
        ('door == "half open"', True),
        ('"door" == "half open"', True),
        ('label == "dog"', True),
        ("label != dog", False),
        ("gate == open and confidence > 0.9", True),
        ("gate == open and confidence >= 0.95", True),
        ("gate == open and confidence > 0.95", False),
        ('gate == open and door == "half open" and confidence > 0.9', False),  # the lowest of both: 0.6
        ('gate == open and door == "half open" and confidence > 0.5', True),
        ("(gate == open or door == open) and confidence > 0.9", True),  # of those that are true: 0.95
        ("(gate == closed or door == open) and confidence < 0.1", False),
        ("gate == closed or confidence <= 0", True),  # none is true
        ("gate != closed and confidence >= 0.95", True),  # 1 - 0.05
        ("not gate == closed and confidence <= 0", True),  # only what is said, not what follows from it
        ("not (gate == closed and confidence > 0.9)", True),
        ("gate == closed and label == cat or label == dog", True),  # and before or
        ("gate == closed and (label == cat or label == dog)", False),
        ("not (gate == closed or label == cat)", True),
        ("not (gate == open and confidence > 0.9)", False),
        ("not not gate == open", True),
        ("(((gate == open)))", True),
        ("gate==open and(label==dog)", True),
        ("gate == and1 or gate == open", True),  # a word that only begins like another one
    ],
)
def test_a_condition_means_what_it_says(text: str, is_true: bool) -> None:
    assert parse_condition(text).holds(ANSWERS) is is_true


def test_a_condition_names_its_questions_and_frames() -> None:
    condition = parse_condition('gate == open and not "front door" != closed or label == dog for 12 frames')
    assert condition.questions == {"gate", "front door", "label"}
    assert condition.frames == 12
    assert parse_condition("gate == open").frames == parse_condition("gate == open for 1 frame").frames == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at its end want a question"),
        ("gate", "at its end want == or !="),
        ("gate = open", "at '= open' want == or !="),
        ("gate == ", "at its end want a class"),
        ("gate == open and", "at its end want a question"),
        ("gate == open or or gate == closed", "at 'or gate"),
        ("gate == open gate == closed", "at 'gate == closed' want \"and\""),
        ("(gate == open", 'at its end want "\\)"'),
        ("gate == open)", "at '\\)' want"),
        ("gate > 0.5", "want == or !="),
        ("gate == open and confidence == 0.5", "want > or >= or < or <="),
        ("gate == open and confidence > 90", "want a number from 0 to 1"),
        ("gate == open and confidence > high", "want a number from 0 to 1"),
        ("confidence > 0.5", "compares no question"),
        ("gate == open for 0 frames", "whole number of frames from 1 to 1000"),
        ("gate == open for 1.5 frames", "whole number"),
        ("gate == open for 2 minutes", 'want "frames"'),
        ("gate == open for 2 frames and label == dog", "the end"),
        ('gate == "open', "want a class"),
        ('gate == ""', "want a class"),
        ("not", "at its end"),
        ("gate == not", "want a class"),
        ("x" * 300, "300 characters"),
        ("(" * 20 + "gate == open", f"more than {MAX_DEPTH}"),
        ("not " * 20 + "gate == open", f"more than {MAX_DEPTH}"),
    ],
)
def test_a_text_that_is_no_condition_is_refused_where_it_ends_to_be_one(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_condition(text)


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                "gate",
                "==",
                "!=",
                "open",
                "and",
                "or",
                "not",
                "(",
                ")",
                "confidence",
                ">",
                "0.5",
                "for",
                "2",
                "frames",
                '"',
                "label",
            ]
        )
    ).map(" ".join)
)
def test_any_text_is_a_condition_or_a_condition_error(text: str) -> None:
    with suppress(ConfigError):
        parse_condition(text)


# Conditions as a tree, written out and evaluated by Python: a second opinion.
COMPARISONS = st.tuples(st.sampled_from(["gate", "door"]), st.sampled_from(["==", "!="]), st.sampled_from(["a", "b"]))
BOUNDS = st.tuples(
    st.just("confidence"), st.sampled_from([">", ">=", "<", "<="]), st.sampled_from(["0.25", "0.5", "0.75"])
)
TREES = st.recursive(
    COMPARISONS | BOUNDS,
    lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner) | st.tuples(st.just("not"), inner),
    max_leaves=6,
)
SHARES = st.sampled_from([0.0, 0.2, 0.25, 0.4, 0.6, 0.75, 0.9, 1.0])


def written(tree: tuple) -> str:
    if tree[0] == "not":
        return f"not ({written(tree[1])})"
    if tree[0] in ("and", "or"):
        return f"({written(tree[1])} {tree[0]} {written(tree[2])})"
    return " ".join(tree)


def leaves(tree: tuple) -> list[tuple]:
    return [leaf for part in tree[1:] for leaf in leaves(part)] if tree[0] in ("and", "or", "not") else [tree]


def evaluated(tree: tuple, answers: dict[str, dict[str, float]]) -> bool:
    """By Python's own `and`, `or` and `not`."""
    compared = {leaf for leaf in leaves(tree) if leaf[0] != "confidence"}
    true = {
        leaf for leaf in compared if (max(answers[leaf[0]], key=answers[leaf[0]].get) == leaf[2]) == (leaf[1] == "==")
    }
    shares = [answers[q][c] if sign == "==" else 1.0 - answers[q][c] for q, sign, c in true]
    text = written(tree).replace("confidence", str(min(shares, default=0.0)))
    for leaf in compared:
        text = text.replace(" ".join(leaf), str(leaf in true))
    return eval(text)


@given(TREES, SHARES, SHARES)
def test_every_condition_means_the_same_as_its_tree(tree: tuple, gate: float, door: float) -> None:
    answers = {"gate": {"a": gate, "b": 1 - gate}, "door": {"a": door, "b": 1 - door}}
    if all(leaf[0] == "confidence" for leaf in leaves(tree)):
        return
    text = written(tree)
    with suppress(ConfigError):  # too long or too deep, which the other tests cover
        assert parse_condition(text).holds(answers) == evaluated(tree, answers)
