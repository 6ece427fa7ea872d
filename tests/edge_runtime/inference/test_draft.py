import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_runtime.inference.backends import SUFFIXES, BackendError
from edge_runtime.inference.bundle import BOS, DRAFT_LABELS, EOS, BundleError
from edge_runtime.inference.draft import STATE, Draft
from edge_runtime.inference.networks import load_draft
from edge_runtime.inference.sampling import Sampler
from edge_runtime.wire.envelope import Options
from models.export.draft_export import quantise_draft, write_draft_litert, write_draft_onnx
from models.family import DRAFT_STATE
from tests import exports
from tests.edge_runtime.firmware.helpers import rewritten

MAX_TOKENS = 12
Labels = tuple[tuple[int, float], ...]


@pytest.fixture(params=SUFFIXES.values())
def draft(request, tmp_path) -> Draft:
    networks = (exports.loaded(tmp_path, f"{name}{request.param}") for name in ("encoder", "step"))
    return Draft(*networks, MAX_TOKENS, exports.draft().labels.weight.numpy(force=True))


@pytest.fixture(scope="module")
def symbols() -> np.ndarray:
    return exports.latents(30, seed=8)


def greedy(latent: np.ndarray, labels: Labels = ()) -> tuple[list[int], float]:
    """What the float decoder writes, and the geometric mean of its probabilities."""
    draft = exports.draft()
    classes, probabilities = (torch.tensor([[label[i] for label in labels]]) for i in range(2))
    tokens, logs = [BOS], []
    with torch.inference_mode():
        memory = draft.encode_image(torch.from_numpy(latent[None].astype(np.float32)))
        state = draft.first_state(classes.long(), probabilities)
        while len(tokens) <= MAX_TOKENS and tokens[-1] != EOS:
            logits, state = draft.step(torch.tensor(tokens[-1:]), state, memory)
            best = logits.log_softmax(-1).max(-1)
            tokens.append(int(best.indices))
            logs.append(float(best.values))
    return tokens[1:], float(np.exp(np.mean(logs)))


@pytest.mark.parametrize("labels", [(), ((2, 0.75), (0, 0.25))], ids=["no labels", "two labels"])
def test_the_board_writes_what_the_float_decoder_writes(draft, symbols, labels):
    same = 0
    for latent in symbols:
        drafted, (tokens, confidence) = draft.write(latent, labels), greedy(latent, labels)
        if drafted.tokens == tuple(tokens):
            same += 1
            assert drafted.confidence == pytest.approx(confidence, rel=0.1)
    assert same >= 0.8 * len(symbols)


def test_labels_change_drafts_unless_the_decoder_knows_none(draft, symbols, board_bundle, tmp_path):
    assert draft.reads_labels
    assert any(draft.write(latent, [(1, 0.9)]) != draft.write(latent) for latent in symbols)
    names = tuple(name for name in board_bundle.manifest.files if name != DRAFT_LABELS)
    folder = Path(shutil.copytree(board_bundle.path, tmp_path / "older"))
    older = load_draft(rewritten(board_bundle, folder, names), "onnx", 1)
    assert not older.reads_labels
    assert [older.write(latent, [(1, 0.9)]) for latent in symbols] == [older.write(latent) for latent in symbols]


def test_a_draft_ends_with_the_end_token_or_at_its_longest(draft, symbols):
    texts = [draft.write(latent).tokens for latent in symbols]
    assert any(text[-1] == EOS for text in texts)
    assert any(len(text) == MAX_TOKENS for text in texts)
    for text in texts:
        assert EOS not in text[:-1]
        assert text[-1] == EOS or len(text) == MAX_TOKENS


def test_a_sampled_draft_follows_its_seed_and_the_settings(draft, symbols):
    def write(seed: int, **settings: object) -> tuple[int, ...]:
        return draft.write(symbols[0], sampler=Sampler(Options(temperature=3.0, **settings), seed)).tokens

    texts = [write(seed) for seed in range(10)]
    assert texts == [write(seed) for seed in range(10)]
    assert len({*texts, draft.write(symbols[0]).tokens}) > 8
    for seed, text in enumerate(texts):
        stop = text[len(text) // 2]
        assert write(seed, stop=(stop,)) == (*text[: text.index(stop)], EOS)  # what ends a text is no part of it
    assert all(EOS not in draft.write(s, sampler=Sampler(Options(min_tokens=9), 0)).tokens[:9] for s in symbols)


def test_a_draft_that_is_likely_token_by_token_is_confident(draft, symbols):
    cold = [draft.write(latent, sampler=Sampler(Options(temperature=0.001), 1)) for latent in symbols[:5]]
    assert cold == [draft.write(latent) for latent in symbols[:5]]
    hot = [draft.write(latent, sampler=Sampler(Options(temperature=9.0), 1)) for latent in symbols[:5]]
    assert max(one.confidence for one in hot) < min(one.confidence for one in cold)


@pytest.mark.parametrize("backend", SUFFIXES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found_when_the_draft_is_loaded(board_bundle, tmp_path, backend, value):
    folder = Path(shutil.copytree(board_bundle.path, tmp_path / "bundle"))
    decoder = exports.draft(board_bundle.manifest.vocabulary)
    with torch.no_grad():
        decoder.bias[BOS + 3] = value
    write = {"onnx": write_draft_onnx, "litert": write_draft_litert}[backend]
    (folder / f"draft_step{SUFFIXES[backend]}").write_bytes(write(quantise_draft(decoder))[1])
    damaged = rewritten(board_bundle, folder, tuple(board_bundle.manifest.files))
    with pytest.raises(BackendError, match="no finite numbers"):
        load_draft(damaged, backend, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [(bytes(100), "has 100 bytes, 3 classes want 1536"), (b"\0\x7e" * 768, "numbers that are not finite")],
    ids=["size", "NaN"],
)
def test_labels_that_do_not_fit_the_bundle_are_refused_by_name(board_bundle, tmp_path, data, message):
    folder = Path(shutil.copytree(board_bundle.path, tmp_path / "bundle"))
    (folder / DRAFT_LABELS).write_bytes(data)
    damaged = rewritten(board_bundle, folder, tuple(board_bundle.manifest.files))
    with pytest.raises(BundleError, match=f"{DRAFT_LABELS}.*{message}"):
        load_draft(damaged, "onnx", 1)


def test_the_state_is_as_wide_as_the_network_has_it():
    assert STATE == DRAFT_STATE
