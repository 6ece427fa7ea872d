"""What is no target: refused by name before anything of it runs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available

from edge_runtime.errors import ConfigError
from server.targets.huggingface_loading import TargetError, load
from server.targets.huggingface_model import HuggingFaceModel
from tests.server.targets.tiny_models import language_model, llava, smolvlm

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    language_model("Llama")(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_language_model_and_a_vision_model_are_ready_to_serve(folder: Path, tmp_path: Path) -> None:
    loaded = load(str(folder))
    assert loaded.architecture == "LlamaForCausalLM"
    assert loaded.processor is None
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    smolvlm(tmp_path / "vision")
    assert load(str(tmp_path / "vision")).processor is not None


class Bomb:
    """As a pickle, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "boom")


def test_pickled_weights_are_refused_unread(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"lm_head.weight": Bomb(folder / "boom")}, folder / "pytorch_model.bin")
    with pytest.raises(TargetError, match=r"pytorch_model\.bin, a pickle.*want safetensors"):
        load(str(folder))
    assert not (folder / "boom").exists()


def test_a_pickle_beside_safetensors_is_not_read(folder: Path) -> None:
    torch.save({"lm_head.weight": Bomb(folder / "boom")}, folder / "pytorch_model.bin")
    load(str(folder))
    assert not (folder / "boom").exists()


def test_code_of_the_folder_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'boom')!r}, 'w')")
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change_config(folder, model_type="evil", auto_map=names)
    with pytest.raises(TargetError, match="never run"):
        load(str(folder))
    assert not (folder / "boom").exists()


def test_code_for_a_known_architecture_is_left_aside(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'boom')!r}, 'w')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.EvilModel"})
    assert load(str(folder)).architecture == "LlamaForCausalLM"
    assert not (folder / "boom").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("no-such-model", "no-such-model"), ("vit", "'vit'.*want an image-text-to-text model")],
)
def test_an_architecture_that_writes_no_texts_or_is_unknown_is_named(folder: Path, kind: str, message: str) -> None:
    change_config(folder, model_type=kind)
    with pytest.raises(TargetError, match=message):
        load(str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dtype": "int8"}, "dtype = 'int8': want one of float32"), ({"device": "cuda:9"}, "CUDA devices")],
)
def test_a_wrong_setting_says_what_is_wanted(folder: Path, arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(str(folder), **arguments)


def test_a_model_that_is_not_here_is_not_downloaded(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=r"holds no config\.json"):
            load(str(path))
    with pytest.raises(TargetError, match="nothing is downloaded"):
        load("aiflow-edge/no-such-model")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["model.norm.weight"]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(TargetError, match=r"no weights for 1 tensors.*model\.norm\.weight"):
        load(str(folder))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_config(folder, hidden_size=64)
    with pytest.raises(TargetError, match="cannot be loaded"):
        load(str(folder))


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(TargetError, match=r"model\.norm\.weight has NaN"):
        load(str(folder))


@pytest.mark.parametrize("length", [0, 7, 1000])
def test_a_file_that_ends_early_is_refused(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    with pytest.raises(TargetError, match="cannot be loaded"):
        load(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": 7}', '{"model_type": "llama", "hidden_size": -1}'])
def test_a_configuration_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(TargetError):
        load(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token_id", 10**6),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("head_dim", 0),
        ("vocab_size", 0),
        ("rms_norm_eps", "small"),
    ],
)
def test_values_of_a_configuration_that_break_the_model_are_refused(folder: Path, key: str, value: object) -> None:
    change_config(folder, **{key: value})
    with pytest.raises(TargetError, match=str(folder)):
        HuggingFaceModel.load(str(folder))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_picture_processor_that_needs_torchvision_is_named(tmp_path: Path) -> None:
    llava(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "Sam2ImageProcessor"}))
    with pytest.raises(TargetError, match="torchvision, which is not installed"):
        load(str(tmp_path))
