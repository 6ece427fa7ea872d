"""The file of a taught question: what is written is read, and nothing else."""

import json
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from edge_runtime.inference.bundle import Bundle
from models.backbone import FEATURES as OF_THE_BACKBONE
from models.questions import ENTRY, FEATURES, MAX_BYTES, Evidence, Question, QuestionError, Record, read_question
from tests.bundles import CLASSES

LABELS = len(CLASSES)
SHARES = np.linspace(1, 0, LABELS, dtype=np.float32) / LABELS
RECORD = {
    "classes": ["closed", "half open", "open"],
    "bundle_name": "tiny",
    "temperature": 0.5,
    "temperature_alone": 2.0,
    "photos": 30,
    "accuracy": 0.97,
    "format": 2,
}


def layer(classes: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "weight": rng.normal(size=(classes, FEATURES)).astype(np.float32),
        "label_weight": rng.normal(size=(classes, LABELS)).astype(np.float32),
        "bias": rng.normal(size=classes).astype(np.float32),
    }


def record(of: Bundle, **changes: object) -> dict[str, object]:
    return RECORD | {"bundle": of.id.hex()} | changes


def known(largest: float, has_seen_labels: bool = True) -> Evidence:
    features = np.random.default_rng(1).uniform(0, largest, FEATURES).astype(np.float32)
    return Evidence(features, SHARES, has_seen_labels)


def test_a_question_survives_its_file_and_the_same_one_gives_the_same_bytes(tmp_path: Path, board_bundle) -> None:
    question = Question(msgspec.convert(record(board_bundle), Record), **layer())
    for name in ("a", "b"):
        question.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = read_question(tmp_path / "a", board_bundle)
    assert again.record == question.record
    assert again.answer(known(6)) == question.answer(known(6))


def test_an_answer_is_the_softmax_of_the_layer_the_likeliest_class_first(board_bundle) -> None:
    question = Question(msgspec.convert(record(board_bundle), Record), **layer())
    for seen, temperature in ((True, 0.5), (False, 2.0)):
        photo = known(0.1, seen)
        logits = (
            question.weight.astype(float) @ photo.features
            + question.label_weight @ np.sqrt(photo.labels)
            + question.bias
        )
        odds = np.exp(logits / temperature)
        answer = question.answer(photo)
        assert list(answer.values()) == sorted(answer.values(), reverse=True)
        assert [answer[name] for name in RECORD["classes"]] == pytest.approx(odds / odds.sum(), abs=1e-4)


def test_the_width_is_that_of_the_tail() -> None:
    assert FEATURES == OF_THE_BACKBONE


@pytest.mark.parametrize(
    ("changes", "tensors", "said"),
    [
        ({"bundle": "00" * 8}, {}, "teach it again with --bundle"),
        ({"format": 1}, {}, "format 1, this version reads 2: teach it again"),
        ({"classes": ["open"]}, {}, "classes"),
        ({"classes": ["a", "b", "a"]}, {}, "a class twice"),
        ({"classes": [str(i) for i in range(10_000)]}, {}, "classes"),
        ({"temperature": 0}, {}, "temperature"),
        ({}, {"weight": np.zeros((3, 1281), np.float32)}, "want"),
        ({}, {"weight": np.zeros((3, 1280), np.float64)}, "want"),
        ({}, {"label_weight": np.zeros((3, LABELS + 1), np.float32)}, "want"),
        ({}, {"bias": np.array([0, np.nan, 0], np.float32)}, "not finite"),
        ({}, {"bias": np.array([0, np.inf, 0], np.float32)}, "not finite"),
        ({}, {"bias": np.array([0, 1e30, 0], np.float32)}, "far too large"),
        ({}, {"other": np.zeros(1, np.float32)}, "tensors"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_by_name(tmp_path, board_bundle, changes, tensors, said) -> None:
    path = tmp_path / "gate.safetensors"
    path.write_bytes(save(layer() | tensors, {ENTRY: json.dumps(record(board_bundle, **changes))}))
    with pytest.raises(QuestionError, match=said) as refused:
        read_question(path, board_bundle)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({"accuracy": float("nan")}, {}),
        ({"temperature": float("inf")}, {}),
        ({}, {"bias": np.array([0, np.nan, 0], np.float32)}),
        ({}, {"label_weight": np.zeros((3, 1 << 17), np.float32)}),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, board_bundle, changes, tensors) -> None:
    fine = msgspec.convert(record(board_bundle), Record)
    question = Question(msgspec.structs.replace(fine, **changes), **(layer() | tensors))
    with pytest.raises(QuestionError, match=r"gate\.safetensors"):
        question.write(tmp_path / "gate.safetensors")
    assert not (tmp_path / "gate.safetensors").exists()


def test_a_missing_a_large_and_a_foreign_file_are_refused_by_name(tmp_path: Path, board_bundle) -> None:
    with pytest.raises(QuestionError, match="aiflow teach"):
        read_question(tmp_path / "none", board_bundle)
    (tmp_path / "large").write_bytes(bytes(MAX_BYTES + 1))
    with pytest.raises(QuestionError, match="larger than"):
        read_question(tmp_path / "large", board_bundle)
    with pytest.raises(QuestionError, match="is no question"):
        read_question(board_bundle.path / "lookahead-edge.safetensors", board_bundle)


@given(data=st.data())
def test_any_bytes_and_any_damage_are_a_question_or_a_question_error(tmp_path_factory, board_bundle, data) -> None:
    path = tmp_path_factory.mktemp("any") / "gate"
    good = save(layer(), {ENTRY: json.dumps(record(board_bundle))})
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(st.binary(max_size=64)))
    else:
        at = data.draw(st.integers(0, 700))
        path.write_bytes(good[:at] + data.draw(st.binary(max_size=8)) + good[at + data.draw(st.integers(0, 8)) :])
    with suppress(QuestionError):
        read_question(path, board_bundle)
