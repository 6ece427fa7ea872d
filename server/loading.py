"""From a bundle's files to an engine."""

import logging
from collections.abc import Sequence
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle, BundleError
from models.family import LATENT, Classifier, DecoderShape, Head, Tail, TextDecoder
from models.labels import words_of_labels
from models.lookahead import Lookahead, lookahead_file
from models.stored_weights import unpack
from server.engine import SIZES, WIDTHS, Engine, Proof
from server.numerics import prove
from server.packed import pack

logger = logging.getLogger(__name__)

HEAD = "head.safetensors"  # a bundle may lack it

Network = TypeVar("Network", bound=nn.Module)


def load_engine(bundle: Bundle, tiers: Sequence[str], device: str = "cpu", threads: int = 1) -> Engine:
    """Loads the tail, the classifier, the float head if there is one, and these tiers' decoders, as float32.

    Sets torch's thread count for the whole process, since bits depend on it. Raises BundleError, and ConfigError if the
    device is not there.
    """
    prepare_device(device, threads)
    manifest = bundle.manifest
    if (manifest.latent.channels, manifest.latent.height, manifest.latent.width) != LATENT:
        raise BundleError(f"bundle {manifest.name} codes {manifest.latent}, this version's networks read {LATENT}")
    weights = load_weights(bundle, manifest.tail)
    decoders = {tier: _decoder(bundle, tier) for tier in tiers}
    tail = filled(Tail(len(manifest.latent.gains)), _below(weights, "tail."), manifest.tail)
    classifier, head = None, None
    if manifest.classes:
        classifier = filled(Classifier(len(manifest.classes)), _below(weights, "classifier."), manifest.tail)
    if HEAD in manifest.files:
        head = filled(Head(), load_weights(bundle, HEAD), HEAD)
    # Then the weights of its 3 x 3 convolutions are matrices already.
    tail = tail.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for network in (tail, classifier, head, *decoders.values()):
        if network is not None:
            network.to(device)
    lookaheads = {tier: found for tier in tiers if (found := _lookahead(bundle, tier))}
    label_words: list[tuple[int, ...]] = []
    if any(decoder.shape.label_words for decoder in decoders.values()):
        if classifier is None:
            raise BundleError(f"bundle {manifest.name}: its decoders see labels, but it has no classes")
        label_words = words_of_labels(manifest.classes, bundle.words)
    return Engine(
        tail, decoders, classifier, manifest.classes, head, lookaheads, label_words, manifest.label_temperature, device
    )


def ready_engine(
    bundle: Bundle, tiers: Sequence[str], device: str = "cpu", threads: int = 1, sizes: Sequence[int] = SIZES
) -> Engine:
    """`load_engine`, with the start test's proof for these batch sizes.

    Packed weights are faster, and are used unless plain ones prove more. Only if packed ones do not prove everything,
    plain ones are tried as well: so the start test usually runs once (docs/adr/0039-packed-weights.md).
    """
    engine = load_engine(bundle, tiers, device, threads)
    is_packed = pack(engine.tail, *engine.decoders.values())
    engine.proof = prove(engine, sizes)
    everything = 1, len(sizes) * (2 + len(WIDTHS))
    if not is_packed or _worth(engine.proof) == everything:
        return engine
    plain = load_engine(bundle, tiers, device, threads)
    plain.proof = prove(plain, sizes)
    if _worth(plain.proof) <= _worth(engine.proof):
        return engine
    logger.warning(
        "plain weights are used: packed ones prove less on this machine packed=%s plain=%s", engine.proof, plain.proof
    )
    return plain


def _worth(proof: Proof) -> tuple[int, int]:
    """Larger for a better proof: drafts first, since without them each text takes several times the passes."""
    return int(proof.may_speculate), len(proof.tail_sizes) + len(proof.image_sizes) + len(proof.shapes)


def prepare_device(device: str, threads: int) -> None:
    """Settings of the whole process that bits depend on. Raises ConfigError if the device is not there."""
    check_device(device)
    torch.set_num_threads(threads)
    # On a GPU: float32 everywhere, and no algorithm that sums in another order at each run.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True


def check_device(device: str) -> None:
    """Raises ConfigError if it is not there."""
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f'device = "{device}", but PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices: '
            'want device = "cpu", or a driver and a PyTorch that fit the GPU'
        )


def _decoder(bundle: Bundle, tier: str) -> TextDecoder:
    target = bundle.manifest.targets.get(tier)
    if target is None:
        raise BundleError(f"bundle {bundle.manifest.name} has no target {tier}: it has {list(bundle.manifest.targets)}")
    shape = DecoderShape(
        bundle.manifest.vocabulary,
        target.width,
        target.heads,
        target.encoder_layers,
        target.decoder_layers,
        bundle.manifest.max_tokens,
        target.label_words,
    )
    weights = load_weights(bundle, target.file)  # first, since it checks the size that bounds the shape
    return filled(TextDecoder(shape), weights, target.file)


def _lookahead(bundle: Bundle, tier: str) -> Lookahead | None:
    name = lookahead_file(tier)
    if name not in bundle.manifest.files:
        return None
    tensors = load_tensors(bundle, name)
    try:
        return Lookahead.of_tensors(tensors, bundle.manifest.targets[tier].width, bundle.manifest.vocabulary)
    except ValueError as error:
        raise BundleError(f"{bundle.path / name} is no lookahead of the target {tier}: {error}") from error


def load_tensors(bundle: Bundle, name: str) -> dict[str, Tensor]:
    """A safetensors file of the bundle, checked against its hash, with finite numbers only. Raises BundleError."""
    try:
        tensors: dict[str, Tensor] = load_file(bundle.file(name))
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{bundle.path / name} is no readable safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BundleError(f"{bundle.path / name}: tensor {key[:128]!r} has NaN or infinite values: export it again")
    return tensors


def load_weights(bundle: Bundle, name: str) -> dict[str, Tensor]:
    """The weights of a network, float32. Raises BundleError."""
    try:
        return unpack(load_tensors(bundle, name))
    except ValueError as error:
        raise BundleError(f"{bundle.path / name}: {error}: export it again") from error


def filled(network: Network, weights: dict[str, Tensor], name: str) -> Network:
    """The network with these weights as float32, each of them used, and ready to serve. Raises BundleError."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise BundleError(f"{name} does not hold this network's weights: {error}") from error
    return network.eval().requires_grad_(False)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
