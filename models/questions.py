"""A question that a user taught with a few photos: a linear layer on what a server knows of a photo, and its file.

A server knows the tail's features and a probability of each label of the bundle, corrected by the labels that the board
has seen. The layer reads square roots of these, so that unlikely labels count too.

The file is safetensors: `weight` float32 [classes, 1280], `label_weight` float32 [classes, labels], `bias` float32
[classes], and one entry of metadata with the rest as JSON (several entries would be written in random order). A
question runs in numpy, so that a configuration can be checked where torch is not installed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_runtime.bounded_file import read_bounded
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire.envelope import Share

FORMAT = 2  # 1 had no label_weight
ENTRY = "aiflow_question"  # of the metadata
FEATURES = 1280  # of the tail: models.backbone.FEATURES, which needs torch
MAX_PHOTOS = 5000
MAX_CLASSES = 64  # as in a reply's answers
MAX_CLASS = 64  # characters
MAX_BYTES = 1 << 20  # of the file; 64 classes and 1000 labels take 584 KB
MAX_WEIGHT = 1e6  # the sums over a photo's features, which are at most 6, stay finite

Temperature = Annotated[float, Meta(ge=0.01, le=100)]
ClassName = Annotated[str, Meta(min_length=1, max_length=MAX_CLASS)]


class QuestionError(ConfigError):
    """A question's file is missing or damaged, or belongs to another bundle."""


class Record(msgspec.Struct, frozen=True):
    """What a file says of its question."""

    classes: Annotated[tuple[ClassName, ...], Meta(min_length=2, max_length=MAX_CLASSES)]
    bundle: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]  # its id: other bundles have other features
    bundle_name: Annotated[str, Meta(max_length=64)]
    temperature: Temperature  # the logits are divided by it
    temperature_alone: Temperature  # the same if the board sends no labels, so that the features tell them alone
    photos: Annotated[int, Meta(ge=1, le=MAX_PHOTOS)]  # that it was taught with
    accuracy: Share  # expected, by cross-validation
    format: int = FORMAT


class _Versioned(msgspec.Struct):
    """What the record of every format has."""

    format: int


class _Header(msgspec.Struct):
    """The part of a safetensors header that says what a file is."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What a server knows of a photo."""

    features: NDArray[np.float32]  # [1280], of the tail, the mean over the positions
    labels: NDArray[np.float32]  # [labels]: the probability of each of the bundle's; empty if it has none
    has_seen_labels: bool  # the board has sent its own, and `labels` has them


@dataclass(frozen=True)
class Question:
    """Ready to be asked."""

    record: Record
    weight: NDArray[np.float32]  # [classes, 1280]
    label_weight: NDArray[np.float32]  # [classes, labels]
    bias: NDArray[np.float32]  # [classes]

    def answer(self, known: Evidence) -> dict[str, float]:
        """The probability of each class, the likeliest first."""
        temperature = self.record.temperature if known.has_seen_labels else self.record.temperature_alone
        logits = self.weight @ known.features + self.label_weight @ np.sqrt(known.labels) + self.bias
        logits /= temperature
        odds = np.exp(logits - logits.max())
        shares = odds / odds.sum()
        # Four digits: what a linear layer knows, and what people read.
        return {self.record.classes[i]: round(float(shares[i]), 4) for i in np.argsort(-shares, kind="stable")}

    def write(self, path: Path) -> None:
        """The same question gives the same bytes. Raises QuestionError for one that could not be read; OSError."""
        from safetensors.numpy import save

        metadata = {ENTRY: msgspec.json.encode(self.record).decode()}
        data = save({"weight": self.weight, "label_weight": self.label_weight, "bias": self.bias}, metadata)
        if len(data) > MAX_BYTES:
            raise QuestionError(f"{path} would have {len(data)} bytes, at most {MAX_BYTES}: want fewer classes")
        _read_layer(path, data, len(_read_record(path, data).classes), self.label_weight.shape[1])
        path.write_bytes(data)


def read_question(path: Path, bundle: Bundle) -> Question:
    """A question for this bundle, checked. Raises QuestionError."""
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise QuestionError(f"{path}: {error.strerror}: name a file that `aiflow teach` wrote") from error
    record = _read_record(path, data)
    if record.bundle != bundle.id.hex():
        raise QuestionError(
            f"{path} was taught with bundle {record.bundle_name} {record.bundle}, this is {bundle.manifest.name} "
            f"{bundle.id.hex()}, whose features differ: teach it again with --bundle {bundle.path}"
        )
    return Question(record, **_read_layer(path, data, len(record.classes), len(bundle.manifest.classes)))


def _read_record(path: Path, data: bytes) -> Record:
    size = int.from_bytes(data[:8], "little")  # of the header, see the safetensors format
    try:
        entry = msgspec.json.decode(data[8 : 8 + size], type=_Header).metadata[ENTRY]
        found = msgspec.json.decode(entry, type=_Versioned).format
        if found != FORMAT:
            raise QuestionError(
                f"{path} has format {found}, this version reads {FORMAT}: teach it again, or update this side"
            )
        record = msgspec.json.decode(entry, type=Record)
    except (KeyError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise QuestionError(f"{path} is no question ({error}): name a file that `aiflow teach` wrote") from error
    if len(set(record.classes)) < len(record.classes):
        raise QuestionError(f"{path} has a class twice: teach it again")
    return record


def _read_layer(path: Path, data: bytes, classes: int, labels: int) -> dict[str, NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        layer = load(data)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: of a data type that numpy does not have
        raise QuestionError(f"{path} is damaged ({error}): copy it again, or teach it again") from error
    found = {name: (tensor.dtype.name, tensor.shape) for name, tensor in layer.items()}
    shapes = {"weight": (classes, FEATURES), "label_weight": (classes, labels), "bias": (classes,)}
    wanted = {name: ("float32", shape) for name, shape in shapes.items()}
    if found != wanted:
        raise QuestionError(f"{path} has the tensors {str(found)[:256]}, want {wanted}: teach it again")
    if not all((np.abs(tensor) <= MAX_WEIGHT).all() for tensor in layer.values()):  # false for NaN too
        raise QuestionError(f"{path} has values that are not finite, or far too large: teach it again")
    return layer
