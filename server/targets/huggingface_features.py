"""Features of boards as image tokens for a model of transformers, in place of a picture: a tail of `aiflow distil`."""

from pathlib import Path

import torch
from torch import Tensor

from edge_runtime.inference.bundle import Bundle
from models.tower_tail import SymbolReader, TowerTailError, read_tower_tail
from server.accepted import Accepted
from server.loading import load_engine
from server.targets.huggingface import HuggingFaceTarget
from server.targets.huggingface_tower import Tower
from server.targets.latents import Latents


class FeatureReader:
    """For one thread."""

    def __init__(self, bundle: Bundle, reader: SymbolReader) -> None:
        """bundle: whose latents it reads."""
        self.bundle, self.reader = bundle, reader
        self._latents = Latents(bundle)

    def tokens(self, accepted: Accepted) -> Tensor:
        """Of a request with a latent: image tokens [N, D]. Raises BitstreamError."""
        return self.reader.tokens(*self._latents.symbols(accepted))


def load_features(folder: Path, bundle: Bundle, model: HuggingFaceTarget, prompt: str, device: str) -> FeatureReader:
    """The tail in a folder, for this bundle and this model, which then takes image tokens. prompt: any.

    Raises TowerTailError, TargetError and BundleError.
    """
    record, tower_tail = read_tower_tail(folder, bundle)
    tower = Tower(model.loaded, record.pixels, prompt)
    if (tower.count, tower.width) != (record.tokens, record.width):
        raise TowerTailError(
            f"{folder} has a tail for {record.tokens} tokens of {record.width} numbers, the tower of "
            f"{model.loaded.name} makes {tower.count} of {tower.width}: want the model that it was made for, "
            f"{record.target}, with the same preprocessor_config.json, or run `aiflow distil` again"
        )
    if tower.weights_hash() != record.target_weights:
        raise TowerTailError(
            f"{folder} was made for {record.architecture} {record.target}, and {model.loaded.name} has other weights: "
            f"run `aiflow distil --target hf:{model.loaded.name}`"
        )
    model.tower = tower
    _ = bundle.tables, bundle.inter_tables  # a mistake in them is found at the start
    tail = load_engine(bundle, (), device, torch.get_num_threads()).tail
    return FeatureReader(bundle, SymbolReader(tail, tower_tail.to(device)))
