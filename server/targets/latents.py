"""The latent of a request, decoded: for every target that reads latents of a bundle."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import BitstreamError
from edge_runtime.wire.bitstream import Inter, decode
from server.received import Received
from server.references import References


class Latents:
    """For any number of threads. Keeps the latents that later frames may be coded against."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.references = bundle, References()

    def symbols(self, received: Received) -> tuple[NDArray[np.int8], int, int]:
        """The latent's symbols, their level, and how many channels of them were sent. Raises BitstreamError."""
        tables, inter = self.bundle.tables, self.bundle.inter_tables
        board = received.arrival.board
        find = partial(self.references.find, board)
        decoded = decode(received.request.content, tables, Inter(inter, find) if inter else None)
        if not decoded.checked:  # a cut message and a damaged one look alike, and MQTT cuts none
            raise BitstreamError("bitstream ends early, so its check is missing: send it whole")
        if inter:
            self.references.keep(board, received.request.id, decoded.header, decoded.symbols)
        return decoded.symbols, decoded.header.level, decoded.complete_channels
