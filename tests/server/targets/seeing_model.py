"""A small language model that reads pictures, with random weights, in place of the pretrained one."""

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from edge_runtime.inference.bundle import Bundle
from models.language_model import Pretrained, SeeingModel, assemble, read_learnt, whole_folder, write_learnt
from server.config import Config, LanguageConfig, ServerConfig
from server.prompts import PromptConfig
from tests.server.targets.tiny_models import TEXT, words

MARKS = ("<|im_start|>", "<|im_end|>")


def pretrained() -> Pretrained:
    """A model and a tokenizer that knows SmolLM2's marks of a conversation."""
    tokenizer = words(MARKS)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)}, tie_word_embeddings=True)
        )
        for weight in model.parameters():
            if weight.ndim > 1:  # else the same word is written again and again
                torch.nn.init.normal_(weight, std=0.3)
    return Pretrained(model.eval().requires_grad_(False), tokenizer)


def random_learnt(seed: int = 2) -> SeeingModel:
    """A model with random changes of its layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SeeingModel(pretrained().model)
        for name, weight in net.learnt.named_parameters():
            if name.endswith("/up"):
                torch.nn.init.normal_(weight, std=0.1)
    return net


def write_cached(folder: Path, bundle: Bundle) -> Path:
    """Writes what was learnt, and the whole model into the cache `folder`. Returns the file of the former."""
    learnt = folder / "learnt.safetensors"
    write_learnt(learnt, random_learnt().learnt.state_dict(), bundle)
    assemble(pretrained(), read_learnt(learnt, bundle).changes, whole_folder(learnt, folder))
    return learnt


def language_config(cache: Path, bundle: Bundle, prompts: Mapping[str, PromptConfig]) -> Config:
    """A server with this model, in the cache, and the prompt "photo" as its usual one."""
    language = LanguageConfig("photo", weights=str(write_cached(cache, bundle)), cache=str(cache))
    return Config(ServerConfig("s1", str(bundle.path), target="lm"), prompts=dict(prompts), lm=language)
