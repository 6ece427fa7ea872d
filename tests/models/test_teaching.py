"""What a question learns from a few photos, and what it says of itself."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.questions import Evidence
from models.teaching import FOLDS, Taught, folds_of, inputs, label_directions, teach


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the command teaches: the same bits, and no threads that wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photos(per_class: int, classes: int = 3, apart: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features like the tail's: not negative, many, with a few directions that say which class it is."""
    centres = np.random.default_rng(99).normal(size=(classes, 1280)) * apart
    labels = np.repeat(np.arange(classes), per_class)
    noise = np.random.default_rng(seed).normal(size=(len(labels), 1280))
    return np.maximum(0.4 * centres[labels] + noise, 0).astype(np.float32), labels


def probabilities(taught: Taught, features: np.ndarray) -> np.ndarray:
    logits = (features @ taught.weight.T + taught.bias) / taught.temperature
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def test_what_differs_is_learnt_from_ten_photos_a_class_and_the_accuracy_is_as_expected() -> None:
    features, labels = photos(10, apart=0.6)
    unseen, truth = photos(300, apart=0.6, seed=1)
    taught = teach(features, labels, 3)
    right = (probabilities(taught, unseen).argmax(1) == truth).mean()
    assert right > 0.95
    assert taught.accuracy(labels) == pytest.approx(right, abs=0.12)  # of 30 photos


def test_nothing_is_learnt_from_labels_that_mean_nothing_and_it_says_so() -> None:
    features, labels = photos(20, apart=0.0)
    taught = teach(features, labels, 3)
    assert taught.accuracy(labels) < 0.6
    assert probabilities(taught, photos(100, apart=0.0, seed=1)[0]).max(1).mean() < 0.6  # and not sure of anything


def test_probabilities_are_as_often_right_as_they_say() -> None:
    features, labels = photos(40, apart=0.3)
    taught = teach(features, labels, 3)
    unseen, truth = photos(1000, apart=0.3, seed=1)
    shares = probabilities(taught, unseen)
    right = (shares.argmax(1) == truth).mean()
    assert 0.5 < right < 0.97  # otherwise it would say nothing
    assert shares.max(1).mean() == pytest.approx(right, abs=0.06)


def test_the_same_photos_give_the_same_layer() -> None:
    first, second = (teach(*photos(6), 3) for _ in range(2))
    assert first.weight.tobytes() == second.weight.tobytes()
    assert (first.temperature, first.penalty) == (second.temperature, second.penalty)


def test_a_photo_is_judged_by_layers_that_were_not_taught_it() -> None:
    """With wrong labels, a layer that had seen the photo would agree with them."""
    features, labels = photos(12, apart=0.8)
    wrong = labels.copy()
    wrong[[0, 12, 24]] = 1, 2, 0
    held_out = teach(features, wrong, 3).held_out
    assert held_out[[0, 12, 24]].argmax(1).tolist() == [0, 1, 2]
    least_sure = held_out[range(36), wrong].argsort()[:3]
    assert sorted(least_sure) == [0, 12, 24]  # which the command shows


def test_a_class_with_one_photo_is_learnt_and_not_judged() -> None:
    features, labels = photos(6)
    features, labels = features[:13], labels[:13]  # one of the last class
    taught = teach(features, labels, 3)
    assert np.isnan(taught.held_out[12]).all()
    assert np.isfinite(taught.held_out[:12]).all()
    assert 0 <= taught.accuracy(labels) <= 1
    assert probabilities(taught, features)[12].argmax() == 2


def test_three_photos_of_two_classes_are_enough() -> None:
    features, labels = photos(2, classes=2)
    taught = teach(features[:3], labels[:3], 2)
    assert np.isfinite(taught.weight).all()
    assert probabilities(taught, features[:3]).argmax(1).tolist() == [0, 0, 1]


def test_classes_of_one_photo_each_teach_nothing_that_could_be_measured() -> None:
    with pytest.raises(ValueError, match="no class has two photos"):
        teach(*photos(1), 3)


def test_photos_that_are_all_alike_teach_nothing_and_break_nothing() -> None:
    taught = teach(np.ones((4, 1280), np.float32), np.array([0, 0, 1, 1]), 2)
    assert probabilities(taught, np.ones((1, 1280), np.float32)) == pytest.approx(0.5, abs=0.01)


def test_each_photo_is_left_out_once_in_runs_and_never_the_last_of_its_class() -> None:
    labels = np.array([0] * 11 + [1] * 3 + [2])
    folds = folds_of(labels)
    assert folds[:11].tolist() == sorted(folds[:11])
    assert set(folds[:11]) == set(range(FOLDS))
    assert folds[11:].tolist() == [0, 1, 2, -1]
    for fold in range(FOLDS):
        assert set(labels[folds != fold]) == {0, 1, 2}


def test_what_is_learnt_of_a_label_holds_for_similar_ones() -> None:
    """Labels 0 and 1 have similar rows in the classifier, and so have 2 and 3. The features say nothing."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(2, 1280)).repeat(2, 0) + 0.3 * rng.normal(size=(4, 1280))
    directions = label_directions(rows.astype(np.float32))

    def seen(label: int) -> Evidence:
        return Evidence(rng.uniform(0, 1, 1280).astype(np.float32), np.eye(4, dtype=np.float32)[label], True)

    taught = teach(inputs([seen(0) for _ in range(6)] + [seen(2) for _ in range(6)], directions), np.arange(12) // 6, 2)
    found = probabilities(taught, inputs([seen(label) for label in (1, 3)], directions))
    assert found.argmax(1).tolist() == [0, 1]


def test_without_labels_it_is_as_often_right_as_it_says() -> None:
    """The labels of the taught photos tell the class better than their features."""

    def with_labels(features: np.ndarray, shares: np.ndarray) -> np.ndarray:
        return np.concatenate([features, 8 * shares], 1, dtype=np.float32)

    features, labels = photos(40, apart=0.3)
    none = np.zeros((len(labels), 3))
    taught = teach(with_labels(features, np.eye(3)[labels]), labels, 3, with_labels(features, none))
    unseen, truth = photos(1000, apart=0.3, seed=1)
    alone = replace(taught, temperature=taught.temperature_alone)
    shares = probabilities(alone, with_labels(unseen, np.zeros((len(truth), 3))))
    right = (shares.argmax(1) == truth).mean()
    assert 0.5 < right < 0.97
    assert shares.max(1).mean() == pytest.approx(right, abs=0.1)
    assert taught.accuracy(labels) > right + 0.05


def test_a_bundle_without_labels_teaches_from_its_features() -> None:
    nothing = np.zeros((0, 1280), np.float32)
    known = [Evidence(row, np.zeros(0, np.float32), False) for row in photos(1)[0]]
    assert inputs(known, label_directions(nothing)).tolist() == [
        [*row, *np.zeros(1280)] for row in photos(1)[0].tolist()
    ]
