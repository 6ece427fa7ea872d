"""The input of a model: a prompt and pictures, in the form that its makers trained it with."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edge_runtime.errors import AiflowError
from edge_runtime.picture_checks import MAX_PICTURE_PIXELS
from server.targets.huggingface_loading import Loaded

MAX_PROMPT = 16_384  # characters; a page of instructions has about 3,000
INPUTS_TO_DROP = ("labels",)  # for training only
# Errors of processors and chat templates for inputs that they do not support.
READING_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError),
    TemplateError,
)


class PromptError(AiflowError, ValueError):
    """This model cannot answer this prompt, or not about this picture."""


@dataclass(frozen=True)
class Job:
    """The input of the target for one text."""

    prompt: str
    pixels: NDArray[np.uint8] | None = None  # RGB, [H, W, 3]; None for a language model and with image tokens
    draft: str | None = None  # any text. None: the target writes alone, without proposals of its own either
    max_tokens: int = 64  # longest text, end token included; 1 to MAX_TOKENS
    system: str = ""  # the system message; empty: none
    earlier: tuple[NDArray[np.uint8], ...] = ()  # pictures before this one, the oldest first; as pixels
    repair: tuple[str, str] | None = None  # a text of the model's about the same, and what is wrong with it
    is_prose: bool = True  # its text shows in which way the model writes, so that a draft can be written so
    image_tokens: Tensor | None = None  # what the language model reads in the place of a picture, [N, D]


def model_inputs(loaded: Loaded, job: Job) -> dict[str, Any]:
    """The arguments of `generate`, on the model's device: `input_ids` int64 [1, T], and more for pictures.

    The model's processor scales and crops them. Raises PromptError.
    """
    texts = [job.system, job.prompt, *(job.repair or ())]
    if (length := sum(map(len, texts))) > MAX_PROMPT:
        raise PromptError(f"the prompt has {length} characters: want at most {MAX_PROMPT}")
    if loaded.processor is None and job.pixels is not None:
        raise PromptError(f"{loaded.architecture} is a language model and takes no picture: want a prompt alone")
    if loaded.processor is not None and job.pixels is None:
        raise PromptError(f"{loaded.architecture} describes pictures: want one")
    pictures = [_picture(pixels) for pixels in (*job.earlier, job.pixels) if pixels is not None]
    reader = loaded.processor or loaded.tokenizer
    try:
        if reader.chat_template:
            options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            inputs = reader.apply_chat_template(_conversation(job, pictures), **options)
        elif pictures:
            inputs = _with_pictures(loaded, "\n\n".join(filter(None, texts)), pictures)
        else:
            inputs = reader("\n\n".join(filter(None, texts)), return_tensors="pt")
    except READING_ERRORS as error:
        raise PromptError(f"{loaded.architecture} cannot read this prompt or picture: {error}") from error
    model = loaded.model
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
        if name not in INPUTS_TO_DROP
    }


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise PromptError(f"the picture is {pixels.dtype} {list(pixels.shape)}: want uint8 [H, W, 3]")
    if pixels.shape[0] * pixels.shape[1] > MAX_PICTURE_PIXELS:
        raise PromptError(f"the picture is {list(pixels.shape)}: want at most {MAX_PICTURE_PIXELS} pixels")
    return Image.fromarray(pixels)


def _conversation(job: Job, pictures: list[Image.Image]) -> list[dict[str, Any]]:
    """As chat templates read it: those of models with pictures want lists of parts, the others want texts."""

    def said(role: str, text: str, shown: list[Image.Image] | None = None) -> dict[str, Any]:
        parts = [*({"type": "image", "image": picture} for picture in shown or ()), {"type": "text", "text": text}]
        return {"role": role, "content": parts if pictures else text}

    turns = [said("user", job.prompt, pictures)]
    if job.repair:
        turns += [said("assistant", job.repair[0]), said("user", job.repair[1])]
    return [said("system", job.system), *turns] if job.system else turns


def _with_pictures(loaded: Loaded, prompt: str, pictures: list[Image.Image]) -> Any:
    """Without a template. Some processors put the pictures' tokens before the prompt, some want to be told where."""
    processor = loaded.processor
    token = str(getattr(processor, "image_token", ""))
    if len(pictures) > 1 and not token:
        raise ValueError(f"{len(pictures)} pictures, it reads one: want frames = 1")
    # A list in a list: all of one text.
    images: list[Any] = [pictures] if len(pictures) > 1 else pictures
    if not token or token in prompt:
        return processor(text=prompt, images=images, return_tensors="pt")
    try:
        inputs = processor(text=prompt, images=images, return_tensors="pt")
        if (inputs["input_ids"] == loaded.tokenizer.convert_tokens_to_ids(token)).any():
            return inputs
    except ValueError:
        pass
    return processor(text=f"{token * len(pictures)}\n{prompt}", images=images, return_tensors="pt")
