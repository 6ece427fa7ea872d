"""Image tokens between the vision tower of a transformers model and its language model: read, and replaced.

transformers encodes pictures before it decodes: `generate` and `forward` take what `get_image_features` returned as
`mm_encoder_outputs`. Each architecture places the tokens by itself. Whether a model reads them just as it reads the
picture is tried at the start, not taken from a list of names.
"""

import hashlib
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from edge_runtime.errors import ConfigError
from models.tower_tail import MAX_TOKENS, Record
from server.targets.huggingface_loading import LOADING_ERRORS, Loaded, TargetError
from server.targets.huggingface_prompts import Job, PromptError, model_inputs

SEAM = "mm_encoder_outputs"
TOKENS = "image_tokens"  # among inputs, until they are placed
TOLERANCE = 1e-3  # of the largest score: as far as scores may differ that should be the same


class Tower:
    """The vision tower of one model, for pictures of one size. For one thread."""

    def __init__(self, loaded: Loaded, pixels: int, prompt: str) -> None:
        """pixels: side of the square that each picture is squashed to. prompt: any that the model can read.

        Raises TargetError and PromptError.
        """
        self.loaded, self.pixels, self._prompt = loaded, pixels, prompt
        if loaded.processor is None:
            raise TargetError(f"{loaded.name} takes no pictures: want an image-text-to-text model")
        if SEAM not in inspect.signature(loaded.model.forward).parameters:
            raise self._refusal("it has no place for them")
        picture = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
        self._blank = np.full_like(picture, 128)
        try:
            inputs = model_inputs(loaded, Job(prompt, picture))
            # A tensor [..., N, D], or one per picture: the architecture wants them back as they are.
            self._form = self._encoded(inputs)
            tokens = self._flat(self._form)
            self.count, self.width = tokens.shape
            if self.count > MAX_TOKENS:
                raise TargetError(
                    f"{loaded.name} makes {self.count} tokens of a picture of {pixels} x {pixels}, want at most "
                    f"{MAX_TOKENS}: want fewer pixels, or a copy of the model whose preprocessor_config.json does not "
                    "split pictures"
                )
            with torch.no_grad():
                seen = loaded.model(**inputs).logits
                read = loaded.model(**self.placed(self.inputs(Job(prompt, image_tokens=tokens)))).logits
        except PromptError:
            raise
        except LOADING_ERRORS as error:
            if isinstance(error, TargetError):
                raise
            raise self._refusal(" ".join(str(error).split())[:200]) from error
        if not (read - seen).abs().max() <= TOLERANCE * seen.abs().max():
            raise self._refusal("it then writes something else")

    @classmethod
    def of_tail(cls, loaded: Loaded, record: Record, prompt: str) -> "Tower":
        """The tower that a tail imitates. Raises ConfigError if this is another one, TargetError and PromptError."""
        tower, remedy = cls(loaded, record.pixels, prompt), f"run `aiflow distil --target hf:{loaded.name}`"
        if (tower.count, tower.width) != (record.tokens, record.width):
            raise ConfigError(
                f"`tail` in [hf] is a tail for {record.tokens} tokens of {record.width} numbers, the tower of "
                f"{loaded.name} makes {tower.count} of {tower.width}: want the model that it was made for, "
                f"{record.target}, with the same preprocessor_config.json, or {remedy}"
            )
        if tower.weights_hash() != record.target_weights:
            raise ConfigError(
                f"`tail` in [hf] was made for {record.architecture} {record.target}, and {loaded.name} has other "
                f"weights: {remedy}"
            )
        return tower

    @torch.no_grad()
    def tokens(self, picture: NDArray[np.uint8]) -> Tensor:
        """A picture, uint8 RGB [H, W, 3], to the tokens that the language model reads, [N, D]. Raises TargetError."""
        square = Image.fromarray(picture).resize((self.pixels, self.pixels), Image.Resampling.BICUBIC)
        found = self._flat(self._encoded(model_inputs(self.loaded, Job(self._prompt, np.asarray(square)))))
        if found.shape != (self.count, self.width):
            raise TargetError(
                f"{self.loaded.name} makes {len(found)} tokens of one picture and {self.count} of another of the same "
                "size: want a model that makes as many of each"
            )
        if not found.isfinite().all():
            raise TargetError(f"the tower of {self.loaded.name} computed no finite numbers: want dtype float32")
        return found

    def inputs(self, job: Job) -> dict[str, Tensor]:
        """The inputs of a job with image tokens [N, D], which `placed` puts in their place. Raises PromptError."""
        assert job.image_tokens is not None
        model = self.loaded.model
        inputs = model_inputs(self.loaded, replace(job, pixels=self._blank))
        kept = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
        return {**kept, TOKENS: job.image_tokens.to(model.device, model.dtype)}

    def placed(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of `generate` and `forward` for the inputs of one job, or of several with their rows joined."""
        if TOKENS not in inputs:
            return inputs
        tokens = inputs[TOKENS]
        form = tokens.view(-1, *self._form.shape[1:]) if isinstance(self._form, Tensor) else [tokens]
        others = {name: value for name, value in inputs.items() if name != TOKENS}
        return {**others, SEAM: {"image": BaseModelOutputWithPooling(pooler_output=form)}}

    def log_probabilities(self, prompt: str, tokens: Tensor, text: list[int]) -> Tensor:
        """Of each next token, where the text is read after the prompt: float32 [len(text), vocabulary].

        Gradients reach the tokens.
        """
        model = self.loaded.model
        first = model(**self.placed(self.inputs(Job(prompt, image_tokens=tokens))), use_cache=True)
        scores = first.logits[0, -1:]
        if len(text) > 1:
            # A pass of its own, as in decoding: some models read a prompt in both directions, and a text never.
            rest = model(input_ids=torch.tensor([text[:-1]], device=model.device), cache=first.cache)
            scores = torch.cat([scores, rest.logits[0]])
        found: Tensor = scores.float().log_softmax(-1)
        return found

    def weights_hash(self) -> str:
        """Identity of the model's weights, SHA-256 in hex: the same in float32 and in bfloat16."""
        digest = hashlib.sha256()
        for name, weight in self.loaded.model.named_parameters():
            digest.update(f"{name} {list(weight.shape)}\n".encode())
            digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _encoded(self, inputs: dict[str, Any]) -> Any:
        encode = self.loaded.model.base_model.get_image_features
        known = {name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs}
        return encode(**known, return_dict=True).pooler_output

    def _flat(self, encoded: Any) -> Tensor:
        tokens: Tensor = encoded if isinstance(encoded, Tensor) else torch.cat(list(encoded))
        return tokens.flatten(0, -2)

    def _refusal(self, why: str) -> TargetError:
        return TargetError(
            f"{self.loaded.name}: {self.loaded.architecture} cannot read image tokens in the place of a picture "
            f"({why}): want a model whose language model reads its tower's tokens among its words, such as SmolVLM, "
            "LLaVA, PaliGemma, InternVL or Qwen2-VL"
        )
