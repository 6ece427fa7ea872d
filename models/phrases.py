"""What usually follows three words, counted in texts that the largest target wrote about the training photos.

Captions are made of phrases. Where the target leaves a draft, the rest of that draft was meant for another sentence;
how the target usually goes on is a far better guess than that, and a table of it costs a server no time: kin to
Ou et al., "Lossless Acceleration with Adaptive N-gram Parallel Decoding" (arXiv 2404.08698). Words of the draft count
more, since its writer has seen the photo. Shorter contexts answer where a longer one was hardly ever seen (Brants et
al., "Large Language Models in Machine Translation", EMNLP 2007, section 4, with nothing else of it needed).
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from edge_runtime.bundle import BOS, EOS, PAD, UNKNOWN

ORDER = 3  # words of context at most: 4 and 5 gain one pass in a hundred, for two and three times the table
MIN_SEEN = 2  # of a context longer than one word, else a shorter one says more
CHOICES = 4  # likeliest words kept for a context
DRAFT_WEIGHT = 3  # of a word that the draft has too; measured best of 1, 2, 3, 4 and 8, by a narrow margin

Follows = dict[tuple[int, ...], list[tuple[int, int]]]  # context to (token, how often), most frequent first


class Phrases:
    """A table of phrases."""

    def __init__(self, follows: Follows) -> None:
        self._follows = follows

    @classmethod
    def of_texts(cls, texts: Iterable[Sequence[int]]) -> "Phrases":
        """Counted in texts that begin with BOS and end with EOS; PAD is left out."""
        counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for padded in texts:
            text = [int(token) for token in padded if token != PAD]
            for end in range(1, len(text)):
                for start in range(max(0, end - ORDER), end):
                    counts[tuple(text[start:end])][text[end]] += 1
        return cls(
            {
                context: found.most_common(CHOICES)
                for context, found in sorted(counts.items())
                if len(context) == 1 or found.total() >= MIN_SEEN
            }
        )

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], vocabulary: int) -> "Phrases":
        """What `tensors` gave. Raises ValueError for anything else."""
        try:
            contexts, tokens, counts = (tensors[name] for name in ("contexts", "tokens", "counts"))
        except KeyError as error:
            raise ValueError(f"no tensor {error}") from error
        size = len(contexts)
        for name, tensor, width in (
            ("contexts", contexts, ORDER),
            ("tokens", tokens, CHOICES),
            ("counts", counts, CHOICES),
        ):
            if tensor.shape != (size, width) or tensor.is_floating_point():
                raise ValueError(f"{name} of {tensor.dtype} {list(tensor.shape)}, want whole numbers [{size}, {width}]")
        if size and not 0 <= min(int(contexts.min()), int(tokens.min())) <= int(tokens.max()) < vocabulary:
            raise ValueError(f"tokens outside of 0..{vocabulary - 1}")
        rows = zip(contexts.tolist(), tokens.tolist(), counts.tolist(), strict=True)
        return cls(
            {
                tuple(token for token in context if token != PAD): [
                    (token, count) for token, count in zip(choices, seen, strict=True) if count > 0
                ]
                for context, choices, seen in rows
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """As they are kept in a bundle: contexts int32 [K, 3], PAD before shorter ones; tokens, counts int32 [K, 4]."""
        contexts = [[PAD] * (ORDER - len(context)) + list(context) for context in self._follows]
        filled = [choices + [(PAD, 0)] * (CHOICES - len(choices)) for choices in self._follows.values()]
        pairs = torch.tensor(filled, dtype=torch.int32).view(-1, CHOICES, 2)
        return {
            "contexts": torch.tensor(contexts, dtype=torch.int32).view(-1, ORDER),
            "tokens": pairs[..., 0].contiguous(),
            "counts": pairs[..., 1].contiguous(),
        }

    def propose(self, text: Sequence[int], count: int, draft: Collection[int] = ()) -> tuple[int, ...]:
        """Up to `count` words that may follow a text, given without its BOS; fewer where an end is likelier."""
        history, proposed = [BOS, *text], list[int]()
        while len(proposed) < count and (token := self._next(history, draft)) > UNKNOWN:
            history.append(token)
            proposed.append(token)
        return tuple(proposed)

    def _next(self, history: list[int], draft: Collection[int]) -> int:
        for length in range(min(ORDER, len(history)), 0, -1):
            if choices := self._follows.get(tuple(history[-length:])):
                return max(choices, key=lambda c: c[1] * (DRAFT_WEIGHT if c[0] in draft else 1))[0]
        return EOS
