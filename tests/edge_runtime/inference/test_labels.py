from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge_runtime.inference.backends import SUFFIXES, BackendError
from edge_runtime.inference.labels import MIN_SENT, Labels, worth_sending
from edge_runtime.inference.networks import load_head, load_labels
from edge_runtime.wire.labels import MAX_LABELS
from tests import exports


class Logits:
    """A network that answers the same codes to every map."""

    def __init__(self, codes: list[int], dtype: type = np.uint8, scale: float = 0.1) -> None:
        self.codes, self.scale, self.zero_point = np.array(codes, dtype).reshape(1, -1, 1, 1), scale, 7

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        return [self.codes]


MAP = np.zeros((14, 14, 80), np.uint8)


def scores_of(labels: Labels, backbone_map: np.ndarray = MAP) -> dict[str, float]:
    return labels.scores(labels.likeliest(backbone_map))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_scores_are_the_probabilities_of_the_likeliest_labels_best_first(dtype):
    codes = [10, 120, 30, 90, 100, 20, 110]
    scores = scores_of(Labels(Logits(codes, dtype), "abcdefg"))
    powers = np.exp(0.1 * np.array(codes))
    assert list(scores) == ["b", "g", "e", "d", "c"]
    assert list(scores.values()) == pytest.approx(sorted(powers / powers.sum(), reverse=True)[:MAX_LABELS], rel=1e-5)


def test_of_two_equally_likely_labels_the_first_one_comes_first():
    assert list(scores_of(Labels(Logits([5, 9, 9, 9]), "abcd"))) == ["b", "c", "d", "a"]


def test_a_higher_temperature_makes_the_probabilities_less_sure():
    sure, unsure = (scores_of(Labels(Logits([10, 30]), "ab", temperature)) for temperature in (1.0, 2.0))
    assert list(sure) == list(unsure) == ["b", "a"]
    assert unsure["b"] == pytest.approx(1 / (1 + np.exp(-1.0)))
    assert sure["b"] == pytest.approx(1 / (1 + np.exp(-2.0)))


@pytest.mark.parametrize("scale", [0.0, -0.1, np.inf, np.nan])
def test_a_scale_that_gives_no_probabilities_is_refused(scale):
    with pytest.raises(BackendError, match="want above 0"):
        Labels(Logits([1, 2], scale=scale), "ab")


def test_a_manifest_with_another_number_of_classes_is_refused():
    with pytest.raises(BackendError, match="has 2 classes, the manifest 3: install the bundle again"):
        Labels(Logits([1, 2]), "abc").likeliest(MAP)


@pytest.mark.parametrize("backend", SUFFIXES)
def test_the_bundles_labels_have_the_names_of_its_classes(board_bundle, backend):
    head = load_head(board_bundle, backend, 1)
    labels = load_labels(board_bundle, head, backend, 1)
    scores = scores_of(labels, head.latent(exports.pictures(1, seed=3)[0].numpy()).backbone_map)
    assert set(scores) == set(board_bundle.manifest.classes)
    assert sum(scores.values()) == pytest.approx(1.0)


def test_head_and_labels_need_not_run_in_the_same_backend(board_bundle):
    """Codes of the map have one meaning in all files. "auto" chooses per network."""
    picture, found = exports.pictures(1, seed=3)[0].numpy(), []
    for head_backend, backend in (("onnx", "litert"), ("litert", "onnx")):
        head = load_head(board_bundle, head_backend, 1)
        found.append(scores_of(load_labels(board_bundle, head, backend, 1), head.latent(picture).backbone_map))
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_an_older_bundle_has_no_labels_on_the_board(board_bundle):
    head = load_head(board_bundle, "onnx", 1)
    files = {name: record for name, record in board_bundle.manifest.files.items() if not name.startswith("labels")}
    manifest = msgspec.structs.replace(board_bundle.manifest, files=files)
    assert load_labels(replace(board_bundle, manifest=manifest), head, "onnx", 1) is None


def test_labels_that_do_not_fit_the_manifest_are_found_at_start(board_bundle, monkeypatch):
    head = load_head(board_bundle, "onnx", 1)
    monkeypatch.setattr("edge_runtime.inference.networks.load_model", lambda *_: Logits([1, 2]))
    with pytest.raises(BackendError, match="has 2 classes, the manifest 3"):
        load_labels(board_bundle, head, "onnx", 1)


def test_labels_that_tell_a_server_nothing_are_not_sent():
    assert worth_sending([(3, 0.7), (9, MIN_SENT), (1, MIN_SENT / 2)]) == [(3, 0.7), (9, MIN_SENT)]
