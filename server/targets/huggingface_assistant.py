"""A small language model of the target's family, which proposes how a text goes on: assisted generation.

It has the target's vocabulary. It reads the prompt and the text so far, but no picture. The target verifies its
proposals, so a wrong one costs time and changes no token (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318).

Knows nothing of drafts, phrases and batches.
"""

import inspect
import logging
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from transformers import DynamicCache

from edge_runtime.errors import AiflowError
from server.targets.huggingface_decoding import BLOCK, FAILURES
from server.targets.huggingface_drafts import common_prefix
from server.targets.huggingface_loading import Loaded, TargetError

logger = logging.getLogger(__name__)

FIRST_LENGTH = 5  # tokens per proposal, as transformers' `heuristic` schedule begins
MAX_LENGTH = BLOCK - 1  # what one pass of the target verifies
# In a configuration: the tokens in whose places the target reads a picture. To the assistant they mean nothing.
PLACES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class Assistant:
    """One small model beside one target. For one thread, except `status`."""

    def __init__(self, loaded: Loaded, target: Loaded, special: frozenset[int]) -> None:
        """special: tokens that are never proposed. Raises TargetError if it cannot propose for this target."""
        if loaded.processor is not None:
            raise TargetError(f"assistant {loaded.name} describes pictures: want a causal language model")
        self.loaded = loaded
        config = loaded.model.config.get_text_config(decoder=True)
        self.positions = getattr(config, "max_position_embeddings", None)  # tokens that it can read
        keeps = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
        self.settings = {"logits_to_keep": 1} if keeps else {}
        shared = _shared_tokens(loaded, target)
        self.readable = shared - {getattr(target.model.config, name, None) for name in PLACES}
        self.usable = frozenset(token for token in shared - special if token < _vocabulary(target))
        written = shared - set(target.model.generation_config.suppress_tokens or ())
        others = [token for token in range(_vocabulary(loaded)) if token not in written]
        self.others = torch.tensor(others, dtype=torch.long, device=loaded.model.device)  # the target never writes them
        self.length = FIRST_LENGTH  # of the next proposal
        self.counts = dict.fromkeys(("proposed", "accepted", "passes", "failed"), 0)
        trial = AssistedText(self, sorted(self.usable)[:2], 2)
        try:
            trial.propose((), 1)
        except FAILURES as error:
            raise TargetError(f"assistant {loaded.name}: {loaded.architecture} cannot propose: {error}") from error
        if not trial.cache.is_croppable:
            raise TargetError(
                f"assistant {loaded.name}: the cache of {loaded.architecture} cannot be rolled back after a wrong "
                "proposal: want a language model with attention"
            )
        self.counts["passes"] = 0
        logger.info("assistant loaded model=%s architecture=%s", loaded.name, loaded.architecture)

    def status(self) -> dict[str, Any]:
        """Its tokens proposed and accepted, its passes, and the texts for which it failed, since the start."""
        return {"model": self.loaded.name, **self.counts}

    def learn(self, proposed: int, accepted: int) -> None:
        """Counts a proposal of so many tokens, and sets the length of the next one.

        This is the `heuristic` schedule of transformers. An assistant that is always wrong soon costs only one of its
        passes per pass of the target.
        """
        self.counts["proposed"] += proposed
        self.counts["accepted"] += accepted
        self.length = min(self.length + 2, MAX_LENGTH) if accepted == proposed else max(self.length - 1, 1)

    def failed(self, error: BaseException) -> None:
        """Counts a text for which it failed. The log has the first one."""
        if not self.counts["failed"]:
            logger.warning("assistant failed, texts go on without it model=%s why=%s", self.loaded.name, error)
        self.counts["failed"] += 1


class AssistedText:
    """One text that an assistant reads along. Call it with the text so far."""

    def __init__(self, assistant: Assistant, prompt: Sequence[int], limit: int) -> None:
        """prompt: of the target. limit: tokens of the text at most."""
        self.assistant, self.limit = assistant, limit
        self.cache = DynamicCache(config=assistant.loaded.model.config)
        self.cache.activate_past_recording()  # sliding windows then keep what `crop` needs
        self._prompt = [token for token in prompt if token in assistant.readable]
        self._read: list[int] = []  # tokens in the cache
        self._proposed: tuple[int, ...] = ()  # the last proposal
        self._at = 0  # tokens of the text before it
        self._has_failed = False

    def __call__(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """What may follow these tokens of the text. If the model fails, nothing."""
        self.settle(tokens)
        length = min(self.assistant.length, self.limit - len(tokens) - 1)
        if self._has_failed or length < 1:
            return ()
        try:
            self._at, self._proposed = len(tokens), self.propose(tokens, length)
        except FAILURES as error:
            self._has_failed = True
            self.assistant.failed(error)
        return self._proposed

    def settle(self, tokens: Sequence[int]) -> None:
        """Counts which tokens of the last proposal are in the text."""
        if self._proposed:
            self.assistant.learn(len(self._proposed), common_prefix(self._proposed, tokens[self._at :]))
            self._proposed = ()

    @torch.no_grad()
    def propose(self, tokens: Sequence[int], length: int) -> tuple[int, ...]:
        """At most so many likely next tokens. Raises AiflowError for NaN, and what the model raises."""
        text = self._prompt + [token for token in tokens if token in self.assistant.readable]
        positions = self.assistant.positions
        if not text or (isinstance(positions, int) and len(text) + length > positions):
            return ()
        kept = min(common_prefix(self._read, text), len(text) - 1)
        if self._read:
            self.cache.crop(kept - len(self._read))
            del self._read[kept:]
        unread, found = text[kept:], list[int]()
        while len(found) < length and (token := self._next(unread)) in self.assistant.usable:
            found.append(token)
            unread = [token]
        return tuple(found)

    def _next(self, unread: Sequence[int]) -> int:
        """Reads these tokens and returns the likeliest next one."""
        assistant = self.assistant
        model = assistant.loaded.model
        inputs = torch.tensor([unread], device=model.device)
        scores = model(input_ids=inputs, cache=self.cache, use_cache=True, **assistant.settings).logits[0, -1]
        self._read += unread
        assistant.counts["passes"] += 1
        scores[assistant.others] = -torch.inf
        best, token = scores.max(-1)
        if not best.isfinite():  # the maximum of scores with a NaN is NaN
            raise AiflowError("it computed no finite numbers")
        return int(token)


def _vocabulary(loaded: Loaded) -> int:
    """How many tokens the model computes scores for."""
    size: int = loaded.model.config.get_text_config(decoder=True).vocab_size
    return size


def _shared_tokens(loaded: Loaded, target: Loaded) -> frozenset[int]:
    """The tokens that both models have. Raises TargetError if one of the target's words is not among them.

    Tokens that were added to a vocabulary, such as the place of a picture, may differ.
    """
    size, own, added = _vocabulary(loaded), loaded.tokenizer.get_vocab(), target.tokenizer.added_tokens_decoder
    shared = set[int]()
    for text, token in sorted(target.tokenizer.get_vocab().items(), key=itemgetter(1)):
        if own.get(text) == token < size:
            shared.add(token)
        elif token not in added:
            raise TargetError(
                f"assistant {loaded.name} has another vocabulary than {target.name}: its token {token} is not "
                f"{text!r}; want a smaller language model of the same family"
            )
    return frozenset(shared)
