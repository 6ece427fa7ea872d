"""Features of boards as image tokens for another model, in place of a picture: a tail of `aiflow distil`."""

from pathlib import Path

from torch import Tensor

from edge_runtime.inference.bundle import Bundle
from models.tower_tail import Record, SymbolReader, read_tower_tail
from server.loading import load_engine
from server.received import Received
from server.targets.latents import Latents
from server.targets.target import FeaturesError


class FeatureReader:
    """Computes image tokens from requests, on any number of threads."""

    def __init__(self, bundle: Bundle, record: Record, reader: SymbolReader) -> None:
        """bundle: whose latents it reads. record: of the tail."""
        self.bundle, self.record, self.reader = bundle, record, reader
        self._latents = Latents(bundle)

    def tokens(self, received: Received) -> Tensor:
        """Image tokens [N, D], finite, for a request with a latent. Raises BitstreamError and FeaturesError."""
        found = self.reader.tokens(*self._latents.symbols(received))
        if not found.isfinite().all():
            raise FeaturesError(
                f"the tail for {self.record.target} made image tokens that are not finite: run `aiflow distil` again"
            )
        return found


def load_features(folder: Path, bundle: Bundle, device: str, threads: int) -> FeatureReader:
    """The tail in a folder, for this bundle. device, threads: to compute on. Raises ConfigError and BundleError."""
    record, tower_tail = read_tower_tail(folder, bundle)
    _ = bundle.tables, bundle.inter_tables  # a mistake in them is found at the start
    tail = load_engine(bundle, (), device, threads).tail
    return FeatureReader(bundle, record, SymbolReader(tail, tower_tail.to(device)))
