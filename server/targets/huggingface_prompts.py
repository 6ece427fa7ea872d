"""What a model reads: a prompt and a picture, in the form that its makers trained it with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_runtime.capture.picture_checks import MAX_PICTURE_PIXELS
from edge_runtime.errors import AiflowError
from server.targets.huggingface_loading import Loaded

MAX_PROMPT = 16_384  # characters; a page of instructions has about 3,000
INPUTS_TO_DROP = ("labels",)  # for training only


class PromptError(AiflowError, ValueError):
    """This model cannot answer this prompt, or not about this picture."""


def model_inputs(loaded: Loaded, prompt: str, pixels: NDArray[np.uint8] | None) -> dict[str, Any]:
    """The arguments of `generate`, on the model's device: `input_ids` int64 [1, T], and more for a picture.

    pixels: RGB, uint8 [H, W, 3]. The processor scales and crops them. Raises PromptError.
    """
    if len(prompt) > MAX_PROMPT:
        raise PromptError(f"the prompt has {len(prompt)} characters: want at most {MAX_PROMPT}")
    if loaded.processor is None and pixels is not None:
        raise PromptError(f"{loaded.architecture} is a language model and takes no picture: want a prompt alone")
    if loaded.processor is not None and pixels is None:
        raise PromptError(f"{loaded.architecture} describes pictures: want one")
    try:
        inputs = _with_picture(loaded, prompt, _picture(pixels)) if pixels is not None else _text_only(loaded, prompt)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:  # as the processors raise them
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


def _text_only(loaded: Loaded, prompt: str) -> Any:
    tokenizer = loaded.tokenizer
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def _with_picture(loaded: Loaded, prompt: str, picture: Image.Image) -> Any:
    processor = loaded.processor
    if processor.chat_template:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    # Without a template, some processors put the picture's tokens before the prompt, and some want to be told where.
    token = str(getattr(processor, "image_token", ""))
    if not token or token in prompt:
        return processor(text=prompt, images=[picture], return_tensors="pt")
    try:
        inputs = processor(text=prompt, images=[picture], return_tensors="pt")
        if (inputs["input_ids"] == loaded.tokenizer.convert_tokens_to_ids(token)).any():
            return inputs
    except ValueError:
        pass
    return processor(text=f"{token}\n{prompt}", images=[picture], return_tensors="pt")
