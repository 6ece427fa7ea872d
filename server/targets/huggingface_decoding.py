"""Greedy decoding of a transformers model with verified drafts, as a decoding method for its `generate`.

`generate` prepares prompt, picture, encoder, cache and logits processors for each architecture; its parameter
`custom_generate` replaces the loop after that. This loop reads several tokens per pass: the last one written, then
proposals. The rule which of them count is `server/verify.py`. Rejected proposals are removed from the cache.

Several texts after prompts of equal length are written in the same passes. All rows of the cache end where the row with
the fewest tokens does, and the tokens that the others have written beyond that are read once more in the next pass. So
no row is padded inside, and positions, masks and windows are those of a text alone, whatever the architecture.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from edge_runtime.errors import AiflowError
from server.verify import Text, propose_again, verify

BLOCK = 16  # tokens per pass at most, after the prompt's pass: beyond it a pass costs noticeably more

SHARED_BLOCK = 8  # tokens per pass and row of several: the cost grows with all of them

# Of foreign code on foreign inputs: they end one text, not the server.
FAILURES = (
    *(AiflowError, ValueError, TypeError, LookupError, AttributeError, RuntimeError),
    *(ArithmeticError, AssertionError),
)

# From the tokens written so far, and how many passes in a row accepted no proposal, to the likely next tokens.
Propose = Callable[[tuple[int, ...], int], tuple[int, ...]]


@dataclass
class Row:
    """One text, and how it was written."""

    text: Text  # before the first pass: the draft; then the written text
    propose: Propose | None = None  # proposals after the draft; None: only the draft's own
    log_probability: float = 0.0  # of the written tokens
    margin: float = float("inf")  # smallest difference between the two best scores where a token was chosen
    widest: int = 0  # most proposals in a pass
    misses: int = 0  # last passes in a row of which no proposal was accepted
    error: AiflowError | None = None  # why there is no text

    @property
    def is_done(self) -> bool:
        return self.text.is_done or self.error is not None

    def proposals(self) -> tuple[int, ...]:
        """Proposals for the tokens after the last one."""
        if self.propose and self.text.needs_proposals:
            self.text = propose_again(self.text, self.propose(self.text.tokens, self.misses))
        return self.text.rest

    def verify(self, scores: Tensor) -> None:
        """Adds the model's choices after a pass to the text. scores: float32 [proposals + 1, vocabulary]."""
        before = len(self.text.tokens)
        self.text = verify(self.text, scores.argmax(-1).tolist())  # of equal scores the first, as `generate` does
        written = len(self.text.tokens) - before
        self.widest = max(self.widest, len(scores) - 1)
        self.misses = self.misses + 1 if written == 1 else 0
        best, second = scores[:written].topk(2).values.unbind(-1)
        # argmax takes a NaN for a token. Here it stays NaN, and infinite scores become NaN.
        gain = float((best - scores[:written].logsumexp(-1)).sum())
        if math.isnan(gain):
            self.error = AiflowError(f"the model computed no finite numbers in pass {self.text.passes} of a text")
            return
        self.log_probability += gain
        self.margin = min(self.margin, float((best - second).min()))


@dataclass
class GreedyDecoding:
    """Texts that are written in the same passes. Call it through `custom_generate`; read `rows` afterwards."""

    rows: Sequence[Row]
    reads_draft_with_prompt: bool = True  # in one pass; else the prompt has a pass of its own
    on_pass: Callable[[], None] = lambda: None
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
        """Writes the texts after `input_ids` [B, T], which it returns. The rows have the texts.

        Each ends at one of its end tokens or at its limit. The stopping criteria say the same and are not used.
        """
        for row in self.rows:
            row.text = replace(row.text, ends=_ends(generation_config))
        rows, batch, prompt = list(self.rows), input_ids, input_ids.shape[1]
        # Of every row: tokens that the cache holds, and tokens that the masks and positions in kwargs are for.
        cached, covered = 0, prompt
        is_recorded = any(row.text.rest or row.propose for row in rows)
        if is_recorded:
            kwargs["cache"].activate_past_recording()  # sliding windows then keep what `crop` needs
        while True:
            is_first = not cached
            tails = self._tails(rows, None if is_first else cached - prompt)
            end = prompt + max(map(len, tails))
            ahead = torch.cat([batch, batch.new_tensor(_filled_up(tails), dtype=torch.long)], -1)
            inputs = model.prepare_inputs_for_generation(
                ahead,
                next_sequence_length=None if is_first else end - cached,
                is_first_iteration=is_first,
                **_longer(model, kwargs, {}, end - covered),
            )
            first = prompt + min(len(row.text.tokens) for row in rows) - 1  # of the positions whose logits count
            if "logits_to_keep" in inputs:
                inputs["logits_to_keep"] = end - first
            outputs = model(**inputs, return_dict=True)
            cache = outputs.get("cache")
            self.can_roll_back = cache is not None and cache.is_croppable
            logits = outputs.logits[:, first - end :].to(batch.device, torch.float32)
            for i, (row, tail) in enumerate(zip(rows, tails, strict=True)):
                known = prompt + len(row.text.tokens)
                if known <= end:
                    scores = logits[i, known - 1 - first : prompt + len(tail) - first]
                    row.verify(_processed(scores, ahead[i : i + 1], known, logits_processor))
            self.on_pass()
            left = [i for i, row in enumerate(rows) if not row.is_done]
            if not left:
                return input_ids
            cached = kept(end, [prompt + len(rows[i].text.tokens) for i in left])
            if is_recorded:
                cache.crop(cached - end)
            kwargs = _longer(model, kwargs, outputs, cached + 1 - covered)
            covered = cached + 1
            if len(left) < len(rows):
                index = torch.tensor(left, device=batch.device)
                cache.reorder_cache(index)
                kwargs = {name: _rows_of(value, index, len(rows), name) for name, value in kwargs.items()}
                rows, batch = [rows[i] for i in left], batch[index]

    def _tails(self, rows: Sequence[Row], cached: int | None) -> list[list[int]]:
        """The tokens of each row after the prompt that the next pass reads: its text, then proposals.

        cached: tokens of them in the cache; None: before the first pass, which reads whole drafts.
        """
        end = None
        if cached is not None:  # at least the last token of one row, so that each pass writes something
            width = BLOCK if len(rows) == 1 else SHARED_BLOCK
            end = max(cached + width, min(len(row.text.tokens) for row in rows))
        reads_drafts = cached is not None or self.reads_draft_with_prompt
        return [[*row.text.tokens, *(row.proposals() if reads_drafts else ())][:end] for row in rows]


def kept(end: int, lengths: Sequence[int]) -> int:
    """Tokens that the cache keeps after a pass that read up to `end`: each row reads its last token in the next one.

    lengths: of the rows' texts with the prompt.
    """
    return min(end, min(lengths) - 1)


def _filled_up(tails: Sequence[list[int]]) -> list[list[int]]:
    """Rows filled up with tokens of the longest: they are valid, and no row reads those after its own last one."""
    longest = max(tails, key=len)
    return [[*tail, *longest[len(tail) :]] for tail in tails]


def _rows_of(value: Any, index: Tensor, rows: int, name: str) -> Any:
    """These rows of an argument of a batch's next pass. Those that only the first pass reads may be cut in any way."""
    if isinstance(value, ModelOutput):  # of an encoder
        return type(value)(**{part: _rows_of(each, index, rows, part) for part, each in value.items()})
    if not isinstance(value, Tensor):
        return value
    dim = value.ndim - 2 if name.endswith("position_ids") else 0  # some positions have several numbers
    return value.index_select(dim, index) if value.ndim and value.shape[dim] == rows else value


def _processed(scores: Tensor, ahead: Tensor, known: int, logits_processor: Any) -> Tensor:
    """The scores after logits processors, which see the text before each position, as they would without proposals.

    scores: float32 [N, vocabulary]. ahead: [1, T]; the first row of the scores is of the first `known` tokens of it.
    """
    if not len(logits_processor):
        return scores
    return torch.cat([logits_processor(ahead[:, : known + i], scores[i : i + 1]) for i in range(len(scores))])


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
