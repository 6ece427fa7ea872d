"""The seam between tower and language model: image tokens in the place of a picture, for each class that has one."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from server.targets.huggingface_loading import TargetError, load
from server.targets.huggingface_model import HuggingFaceModel
from server.targets.huggingface_prompts import Job, model_inputs
from server.targets.huggingface_tower import Tower
from tests.server.targets.tiny_models import LANGUAGE_MODELS, VISION_MODELS, blip2, smolvlm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # of its own calls of numpy

PROMPT = "describe the photo"
SIDE = 64
WITH_SEAM = ("smolvlm", "idefics3", "llava", "paligemma", "internvl", "qwen2-vl")
TEXT = [35, 34, 32, 30, 2]  # any words, and the end


def square(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=WITH_SEAM)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    folder = tmp_path_factory.mktemp(request.param)
    VISION_MODELS[request.param](folder)
    target = HuggingFaceModel.load(str(folder))
    target.tower = Tower(target.loaded, SIDE, PROMPT)
    return target


def test_a_text_about_the_towers_tokens_is_the_text_about_the_picture(target: HuggingFaceModel) -> None:
    assert target.tower
    tokens = target.tower.tokens(square())
    assert tokens.shape == (target.tower.count, target.tower.width)
    seen, read, drafted = target.answer(
        [
            Job(PROMPT, square(), max_tokens=8),
            Job(PROMPT, max_tokens=8, image_tokens=tokens),
            Job(PROMPT, draft="the dog is running", max_tokens=8, image_tokens=tokens),  # in one batch with the last
        ]
    )
    assert (read.error, read.tokens, drafted.tokens) == ("", seen.tokens, seen.tokens)


def test_probabilities_of_a_given_text_are_those_of_generate_and_have_gradients(target: HuggingFaceModel) -> None:
    assert target.tower
    tokens = target.tower.tokens(square()).requires_grad_()
    found = target.tower.log_probabilities(PROMPT, tokens, TEXT)
    inputs = model_inputs(target.loaded, Job(PROMPT, square()))
    asked = inputs["input_ids"].shape[1]
    written = target.loaded.model.generate(
        **inputs,
        max_new_tokens=len(TEXT),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda _, ids: [TEXT[len(ids) - asked]],
    )
    wanted = torch.stack([logits[0] for logits in written.logits]).log_softmax(-1)
    assert torch.allclose(found, wanted, atol=1e-3)
    (slope,) = torch.autograd.grad(found[-1, 5], tokens)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("save", [VISION_MODELS["blip"], VISION_MODELS["florence2"], blip2])
def test_a_class_without_the_seam_is_refused_by_name(save, tmp_path: Path) -> None:
    save(tmp_path)
    loaded = load(str(tmp_path))
    with pytest.raises(TargetError, match=f"{loaded.architecture} cannot read image tokens.*such as SmolVLM"):
        Tower(loaded, SIDE, PROMPT)


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    LANGUAGE_MODELS["llama"](tmp_path)
    with pytest.raises(TargetError, match="takes no pictures"):
        Tower(load(str(tmp_path)), SIDE, PROMPT)


def test_a_tower_with_too_many_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smolvlm(tmp_path)
    monkeypatch.setattr("server.targets.huggingface_tower.MAX_TOKENS", 3)
    with pytest.raises(TargetError, match="makes 4 tokens of a picture of 64 x 64, want at most 3"):
        Tower(load(str(tmp_path)), SIDE, PROMPT)


def test_a_model_that_ignores_the_tokens_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smolvlm(tmp_path)
    loaded = load(str(tmp_path))
    forward = type(loaded.model).forward
    lost = {"mm_encoder_outputs": None}

    def forgetful(self, *args, mm_encoder_outputs=None, **kwargs):
        return forward(self, *args, **{**kwargs, **lost})

    monkeypatch.setattr(type(loaded.model), "forward", forgetful)
    with pytest.raises(TargetError, match="it then writes something else"):
        Tower(loaded, SIDE, PROMPT)


def test_the_hash_of_the_weights_is_that_of_the_values_whatever_the_type(tmp_path: Path) -> None:
    smolvlm(tmp_path)
    first, second = (Tower(load(str(tmp_path), dtype), SIDE, PROMPT) for dtype in ("float32", "bfloat16"))
    known = first.weights_hash()
    assert second.weights_hash() == known
    next(first.loaded.model.parameters()).data[0] += 1
    assert first.weights_hash() != known
