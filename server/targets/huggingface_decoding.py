"""Greedy decoding of a transformers model with verified drafts, as a decoding method for its `generate`.

`generate` prepares prompt, picture, encoder, cache and logits processors for each architecture; its parameter
`custom_generate` replaces the loop after that. This loop reads several tokens per pass: the last one written, then
proposals. The rule which of them count is `server/verify.py`. What the cache holds for rejected proposals is removed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edge_runtime.errors import AiflowError
from server.verify import Text, propose_again, verify

BLOCK = 16  # tokens per pass at most, after the prompt's pass: beyond it a pass costs noticeably more

# From the tokens written so far, and how many passes in a row accepted no proposal, to the likely next tokens.
Propose = Callable[[tuple[int, ...], int], tuple[int, ...]]


class NotFiniteError(AiflowError, ArithmeticError):
    """The model computed NaN or infinity, in the last of so many passes."""

    def __init__(self, passes: int) -> None:
        super().__init__(f"the model computed no finite numbers in pass {passes} of a text")
        self.passes = passes


@dataclass
class GreedyDecoding:
    """One text, and how it was written. Call it through `custom_generate`; read `text` afterwards."""

    text: Text  # before the first pass: the draft, and which tokens end it; then the written text
    propose: Propose | None = None  # proposals after the draft; None: only the draft's own
    reads_draft_with_prompt: bool = True  # in one pass; else the prompt has a pass of its own
    log_probability: float = 0.0  # of the written tokens
    margin: float = float("inf")  # smallest difference between the two best scores where a token was chosen
    widest: int = 0  # most proposals in a pass
    misses: int = 0  # last passes in a row of which no proposal was accepted
    can_roll_back: bool = False  # the model's cache, known after the first pass

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Writes the text after `input_ids` [1, T] and returns both, [1, T + N]. Raises NotFiniteError.

        Ends at one of the text's end tokens or at its limit. The stopping criteria say the same and are not used.
        """
        self.text = replace(self.text, ends=_ends(generation_config))
        is_first, is_recorded = True, bool(self.text.rest or self.propose)
        if is_recorded:
            kwargs["cache"].activate_past_recording()  # sliding windows then keep what `crop` needs
        while not self.text.is_done:
            proposals = self._proposals(is_first)
            ahead = torch.cat([input_ids, input_ids.new_tensor([proposals], dtype=torch.long)], -1)
            inputs = model.prepare_inputs_for_generation(
                ahead,
                next_sequence_length=None if is_first else len(proposals) + 1,
                is_first_iteration=is_first,
                **_longer(model, kwargs, {}, len(proposals)),
            )
            if "logits_to_keep" in inputs:
                inputs["logits_to_keep"] = len(proposals) + 1
            outputs = model(**inputs, return_dict=True)
            cache = outputs.get("cache")
            self.can_roll_back = cache is not None and cache.is_croppable
            logits = outputs.logits[0, -len(proposals) - 1 :].to(input_ids.device, torch.float32)
            written = self._verify(logits, ahead, logits_processor, len(proposals))
            if is_recorded:
                cache.crop(written - 1 - len(proposals))
            input_ids = torch.cat([input_ids, input_ids.new_tensor([self.text.tokens[-written:]])], -1)
            kwargs = _longer(model, kwargs, outputs, written)
            is_first = False
        return input_ids

    def _proposals(self, is_first: bool) -> tuple[int, ...]:
        """What the next pass reads after the last token."""
        if is_first and not self.reads_draft_with_prompt:
            return ()
        if self.propose and self.text.needs_proposals:
            self.text = propose_again(self.text, self.propose(self.text.tokens, self.misses))
        proposals = self.text.rest if is_first else self.text.rest[: BLOCK - 1]
        self.widest = max(self.widest, len(proposals))
        return proposals

    def _verify(self, logits: Tensor, ahead: Tensor, logits_processor: Any, proposals: int) -> int:
        """Adds the model's choices after a pass to the text, and returns how many there are.

        logits: float32 [proposals + 1, vocabulary]. Logits processors see the text before each position, as they would
        without proposals.
        """
        known = ahead.shape[1] - proposals
        scores = logits
        if len(logits_processor):
            scores = torch.cat(
                [logits_processor(ahead[:, : known + i], logits[i : i + 1]) for i in range(proposals + 1)]
            )
        before = len(self.text.tokens)
        self.text = verify(self.text, scores.argmax(-1).tolist())  # of equal scores the first, as `generate` does
        written = len(self.text.tokens) - before
        self.misses = self.misses + 1 if written == 1 else 0
        best, second = scores[:written].topk(2).values.unbind(-1)
        # argmax takes a NaN for a token. Here it stays NaN, and infinite scores become NaN.
        gain = float((best - scores[:written].logsumexp(-1)).sum())
        if math.isnan(gain):
            raise NotFiniteError(self.text.passes)
        self.log_probability += gain
        self.margin = min(self.margin, float((best - second).min()))
        return written


def _longer(model: Any, kwargs: dict[str, Any], outputs: Any, tokens: int) -> dict[str, Any]:
    """The arguments of the next pass after so many more tokens: positions, masks and token types."""
    if not tokens:
        return kwargs
    is_encoder_decoder = model.config.is_encoder_decoder
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(
        outputs, dict(kwargs), is_encoder_decoder=is_encoder_decoder, num_new_tokens=tokens
    )
    return updated


def _ends(generation_config: Any) -> frozenset[int]:
    ends = generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,))
