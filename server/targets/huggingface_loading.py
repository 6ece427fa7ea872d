"""From a folder or a name on the hub to a transformers model, its tokenizer and its picture processor.

Weights come from safetensors only, and no code of the folder is run. Nothing is downloaded unless that is allowed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from edge_runtime.errors import ConfigError
from server.config import check_model
from server.loading import prepare_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What transformers raises for a folder that is not as it should be, or for a library that is missing.
LOADING_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)


class TargetError(ConfigError):
    """This model cannot be a target here. The message says what to change."""


class NoVideos(dict[str, Any]):
    """In the place of a video processor: what some processors ask it for even if there is no video, and as JSON."""

    num_frames = None
    fps = None


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to serve."""

    name: str
    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    processor: Any  # transformers.ProcessorMixin; None: the model takes no pictures

    @property
    def architecture(self) -> str:
        """The model's class."""
        return type(self.model).__name__


def load(name: str, dtype: str = "float32", device: str = "cpu", threads: int = 1, offline: bool = True) -> Loaded:
    """Loads an image-text-to-text model or a causal language model.

    name: a folder, or a name on the hub. offline: use only what lies on this machine. Sets torch's thread count for the
    whole process, since bits depend on it. Raises TargetError, and ConfigError if the device is not there.
    """
    if dtype not in DTYPES:
        raise TargetError(f"dtype = {dtype!r}: want one of {', '.join(DTYPES)}")
    check_model(name)
    _refuse_pickle(name)
    prepare_device(device, threads)
    transformers.logging.disable_progress_bar()  # a server has no terminal
    source = {"trust_remote_code": False, "local_files_only": offline}
    try:
        config = AutoConfig.from_pretrained(name, **source)
    except LOADING_ERRORS as error:
        raise TargetError(f"{name}: {_reason(error, offline)}") from error
    takes_pictures = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not takes_pictures and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise TargetError(
            f"{name} is a model of type {config.model_type!r}: want an image-text-to-text model or a causal language "
            "model of transformers"
        )
    kind = transformers.AutoModelForImageTextToText if takes_pictures else transformers.AutoModelForCausalLM
    try:
        model, report = kind.from_pretrained(
            name, config=config, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **source
        )
        processor = _load_processor(name, config, source) if takes_pictures else None
        tokenizer = processor.tokenizer if processor else AutoTokenizer.from_pretrained(name, **source)
        model = model.to(device)
    except LOADING_ERRORS as error:
        raise TargetError(f"{name} ({config.model_type}): {_reason(error, offline)}") from error
    if lacking := sorted(report["missing_keys"]):
        raise TargetError(
            f"{name} has no weights for {len(lacking)} tensors of {type(model).__name__}, such as {lacking[0]}: they "
            "would be random; want all safetensors files of this model"
        )
    for tensor, value in model.state_dict().items():
        if value.dtype in DTYPES.values() and not value.isfinite().all():
            raise TargetError(f"{name}: tensor {tensor} has NaN or infinite values: want another copy of this model")
    model.generation_config.max_length = None  # each job has its own limit, and transformers would warn of two
    return Loaded(name, model.eval().requires_grad_(False), tokenizer, processor)


def _refuse_pickle(name: str) -> None:
    files = [file.name for file in Path(name).iterdir()] if Path(name).is_dir() else []
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise TargetError(
            f"{name} has its weights in {pickles[0]}, a pickle, which can run any code: want safetensors; convert it "
            "on a machine that you can lose"
        )


def _reason(error: BaseException, offline: bool) -> str:
    """What is wrong, in one line, with what to do if that is known."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code from its own folder, which is never run: want an architecture that transformers has"
    if "torchvision" in text.lower():
        return "its picture processor needs torchvision, which is not installed: want the build that fits this PyTorch"
    if isinstance(error, ArithmeticError | AssertionError):  # which say nothing of the value that led to them
        return (
            f"cannot be loaded: {text[:600] or type(error).__name__}: want the values of its config.json as they were"
        )
    if isinstance(error, OSError) and offline:
        text += " (nothing is downloaded: download the model first, or set offline = false in [hf], or --online)"
    return f"cannot be loaded: {text[:600] or type(error).__name__}"


def _load_processor(name: str, config: Any, source: dict[str, Any]) -> Any:
    """What makes a model's inputs of a picture and a text."""
    kind = transformers.PROCESSOR_MAPPING.get(type(config), None)
    # Video processors exist for torchvision only, but pictures need none.
    if kind is None or is_torchvision_available() or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(name, **source)
    loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    arguments = [
        loaders[part].from_pretrained(name, **source) if part in loaders else NoVideos()
        for part in kind.get_attributes()
    ]
    settings, _ = kind.get_processor_dict(name, local_files_only=source["local_files_only"])
    return _without_videos(kind).from_args_and_dict(arguments, settings)


def _without_videos(kind: Any) -> Any:
    """The processor's class, but one that accepts anything as its video processor."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        return argument_name == "video_processor" or kind.check_argument_for_proper_class(self, argument_name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
