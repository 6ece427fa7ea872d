"""What a target has written before, as proposals for what it writes next.

Captions repeat phrases, and so do the answers of one camera. Proposals by n-grams: prompt lookup decoding (Saxena,
2023) and LLMA (Yang et al., arXiv 2304.04487). A wrong proposal changes no token, see `server/verify.py`.
"""

from collections.abc import Iterable, Sequence

LENGTH = 8  # tokens of a continuation: a pass of 8 tokens costs hardly more than one of 1
LONGEST_KEY = 3  # tokens; longer ones hardly ever repeat in captions
START = -1  # stands before the first token of a text


class PhraseMemory:
    """What followed the last one to three tokens, the latest time they were written."""

    def __init__(self, capacity: int) -> None:
        """capacity: keys that are kept; the oldest are forgotten first."""
        self.capacity = capacity
        self._next: dict[tuple[int, ...], tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._next)

    def learn(self, tokens: Sequence[int], known: int = 0) -> None:
        """Remembers a sequence of tokens, of which the first `known` ones are remembered already."""
        for end in range(max(1, known - LENGTH), len(tokens)):
            for size in range(1, min(LONGEST_KEY, end) + 1):
                key = tuple(tokens[end - size : end])
                self._next.pop(key, None)  # so that it becomes the newest
                self._next[key] = tuple(tokens[end : end + LENGTH])
        while len(self._next) > self.capacity:
            del self._next[next(iter(self._next))]

    def after(self, key: tuple[int, ...]) -> tuple[int, ...]:
        """What followed exactly these tokens: up to LENGTH tokens, none if that is not known."""
        return self._next.get(key, ())


def propose(memories: Iterable[PhraseMemory], tokens: Sequence[int]) -> tuple[int, ...]:
    """What followed the longest known end of `tokens`; of equally long ones, in the first of the memories."""
    memories = tuple(memories)
    for size in range(min(LONGEST_KEY, len(tokens)), 0, -1):
        for memory in memories:
            if found := memory.after(tuple(tokens[-size:])):
                return found
    return ()
