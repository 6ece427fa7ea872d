"""`aiflow distil`: teaches a tail to feed somebody's vision-language model with the features of boards."""

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.capture.picture_files import read_pictures
from models import SHIPPED_BUNDLE
from testbed.argument_types import PHOTOS, hf_model, number
from testbed.terminal import markdown_table, print_table, track

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from edge_runtime.inference.bundle import Bundle
    from edge_runtime.inference.head import Head
    from models.distilling import Agreement
    from server.targets.huggingface_model import HuggingFaceModel
    from server.targets.huggingface_tower import Tower

MAX_TEXT = 32  # tokens of the texts on which two models are compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=hf_model, required=True, metavar="hf:NAME_OR_PATH", help="as in server.toml")
    parser.add_argument(
        "--photos",
        **PHOTOS,
        required=True,
        help="thousands of photos like those of the cameras; they need no captions",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder for `tail` in [hf] or [vllm] of a server"
    )
    parser.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, help="the boards' (default: the shipped bundle)")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help="results so far, to resume after an interruption (default: OUT.work)",
    )
    parser.add_argument("--prompt", help="the prompt in training (default: that of a server)")
    parser.add_argument(
        "--pixels", type=_pixels, default=448, help="side of the square picture that the tower reads (default: 448)"
    )
    parser.add_argument("--limit", type=number, metavar="N", help="use the first N photos")
    parser.add_argument("--steps", type=number, help="steps towards the tower's tokens (default: 3000)")
    parser.add_argument("--kl-steps", type=number, help="then steps on the model's texts (default: 500)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=number, default=1)
    parser.add_argument("--online", action="store_true", help="download a model that is not on this machine")


def _pixels(text: str) -> int:
    if not 32 <= number(text) <= 2048:
        raise argparse.ArgumentTypeError(f"{text!r}, want 32 to 2048")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want cpu, cuda or, of several, cuda:1")
    return text


class LanguageModel(NamedTuple):
    """The interface of models.distilling to the language model behind the tower."""

    target: "HuggingFaceModel"
    tower: "Tower"
    prompt: str

    def log_probabilities(self, tokens: "Tensor", text: Sequence[int]) -> "Tensor":
        return self.tower.log_probabilities(self.prompt, tokens, list(text))

    def write(self, tokens: "Tensor") -> list[int]:
        from server.targets.huggingface_prompts import Job

        inputs = self.tower.inputs(Job(self.prompt, image_tokens=tokens))
        return list(self.target.decode(inputs, [self.target.row(MAX_TEXT)]).rows[0].text.tokens)


def run(args: argparse.Namespace) -> None:
    """Looks at the photos, trains, writes the folder and prints the agreement."""
    import msgspec
    import numpy as np

    from edge_runtime.inference.bundle import open_bundle
    from edge_runtime.inference.networks import load_head
    from edge_runtime.inference.preprocess import PIXELS
    from models.distilling import MEASURED, Distilling, Settings, measure, some_rates, split
    from models.tower_tail import Record, SymbolReader, read_tower_tail, write_tower_tail
    from server.loading import load_engine
    from server.prompts import QUESTION
    from server.targets.huggingface_model import HuggingFaceModel
    from server.targets.huggingface_tower import Tower

    bundle, prompt = open_bundle(args.bundle), args.prompt or QUESTION
    head = load_head(bundle, "onnx", 1)
    target = HuggingFaceModel.load(args.target, args.dtype, args.device, args.threads, offline=not args.online)
    target.tower = Tower(target.loaded, args.pixels, prompt)
    model = LanguageModel(target, target.tower, prompt)
    tail = load_engine(bundle, (), args.device, args.threads).tail
    work = args.work or args.out.with_name(f"{args.out.name}.work")
    weights = model.tower.weights_hash()
    photos = compute_features(work, args.photos, args.limit, bundle, head, model, weights)
    taught, held_out = split(photos)
    held_out = held_out[:MEASURED]
    given = {"steps": args.steps, "kl_steps": args.kl_steps}
    settings = Settings(**{name: value for name, value in given.items() if value})

    latent = head.latent(np.zeros((PIXELS, PIXELS, 3), np.uint8))  # what it has besides the codes is always the same

    def symbols(codes: "NDArray[np.integer]", level: int) -> "NDArray[np.int8]":
        return replace(latent, codes=codes).symbols(level)

    net = Distilling(work, taught, tail, symbols, model, settings).run(track)
    tower = model.tower
    record = Record(
        bundle.id.hex(),
        bundle.manifest.name,
        args.target,
        target.loaded.architecture,
        weights,
        args.pixels,
        tower.count,
        tower.width,
        settings.inner_width,
        settings.layers,
        len(taught),
        {},
    )
    write_tower_tail(args.out, record, net)
    reader = SymbolReader(tail, read_tower_tail(args.out, bundle)[1].to(args.device))  # as a server has it
    rows: dict[str, Agreement] = {}
    for rate in (None, *some_rates(bundle)):
        name = f"level {rate.level}, {rate.groups} groups" if rate else "the mean photo"
        rows[name] = measure(reader, bundle, track(held_out, name), symbols, model, rate)
    quality = {f"{name} {what}": value for name, row in rows.items() for what, value in row._asdict().items()}
    write_tower_tail(args.out, msgspec.structs.replace(record, quality=quality), net)
    _print_table(rows, len(held_out))
    print(
        f"{args.out}: {tower.count} tokens of {tower.width} numbers, from {len(taught)} photos\n"
        f'server.toml: [server] target = "hf:{args.target}", bundle = "{args.bundle}"\n'
        f'             [hf] tail = "{args.out}"'
    )


def compute_features(
    work: Path,
    sources: Sequence[Path],
    limit: int | None,
    bundle: "Bundle",
    head: "Head",
    model: LanguageModel,
    weights: str,
) -> list[Path]:
    """Codes, image tokens and text of each photo: files in `work`. Uses those of an earlier run. Raises AiflowError."""
    from edge_runtime.inference.preprocess import to_input
    from edge_runtime.picture_checks import PictureError, decode_picture
    from models.distilling import Seen, keep

    setting = f"{bundle.id.hex()} {weights} {model.tower.pixels} {model.tower.count} {model.prompt}"
    folder = work / f"photos-{hashlib.sha256(setting.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    found, unreadable = list[Path](), 0
    for picture in track(islice((each for source in sources for each in read_pictures(source)), limit), "photos"):
        path = folder / f"{hashlib.sha256(picture.data).hexdigest()[:32]}.safetensors"
        if not path.is_file():
            try:
                pixels = decode_picture(picture.data)
            except PictureError:
                unreadable += 1
                continue
            tokens = model.tower.tokens(pixels)
            keep(path, Seen(head.latent(to_input(pixels)).codes, tokens, model.write(tokens)))
        found.append(path)
    if unreadable:
        print(f"{unreadable} photos left out: they cannot be read")
    return found


def _print_table(rows: "dict[str, Agreement]", photos: int) -> None:
    header = ("what the model reads", "bytes", "error", "nats per token", "same first token", "same text")
    cells = [
        (name, f"{row.bytes:.0f}", f"{row.error:.3f}", f"{row.kl:.3f}", f"{row.first:.3f}", f"{row.whole:.3f}")
        for name, row in rows.items()
    ]
    print(f"compared with what the model writes of the picture itself, on {photos} photos that were held out:")
    print_table(markdown_table([header, *cells]))
