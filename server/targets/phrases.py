"""What a target has written before, as proposals for what it writes next.

Captions repeat phrases, and so do the answers of one camera. Proposals by n-grams: prompt lookup decoding (Saxena,
2023) and LLMA (Yang et al., arXiv 2304.04487). A wrong proposal changes no token, see `server/verify.py`.
"""

from collections.abc import Callable, Sequence

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

    def longest(self, tokens: Sequence[int], shortest: int = 1) -> tuple[int, tuple[int, ...]]:
        """The longest known end of `tokens`, of at least `shortest` tokens: its length, and what followed it."""
        for size in range(min(LONGEST_KEY, len(tokens)), shortest - 1, -1):
            if found := self._next.get(tuple(tokens[-size:])):
                return size, found
        return 0, ()


class Proposer:
    """Proposals for one text after its draft has ended or gone wrong."""

    def __init__(
        self,
        draft: Sequence[int],
        own: PhraseMemory,
        shared: PhraseMemory,
        assistant: Callable[[Sequence[int]], tuple[int, ...]] | None = None,
    ) -> None:
        """own: phrases of this text's prompt; it also learns the draft and the text. shared: of earlier texts.

        assistant: proposes what may follow a text, at a cost.
        """
        self.draft, self.own, self.shared, self.assistant = tuple(draft), own, shared, assistant
        self._shift = 0  # tokens that the draft is ahead of the text
        self._known = 0
        own.learn((START, *draft))

    def __call__(self, tokens: Sequence[int], misses: int) -> tuple[int, ...]:
        """What may follow these tokens of the text. misses: last passes in a row that accepted no proposal."""
        text = (START, *tokens)
        self.own.learn(text, self._known)
        self._known = len(text)
        both, found = (self.own, self.shared), tuple[int, ...]()
        if misses < 2:
            # An assistant knows more than what followed two tokens. At the beginning of a text there are no more.
            memories, shortest = (both, min(LONGEST_KEY, len(text))) if self.assistant else ((self.own,), 2)
            rest, phrase = self._rest_of_draft(tokens), self._phrases(text, memories, shortest)
            found = phrase or rest if misses else rest or phrase  # the draft was right until now
        if self.assistant and not found:
            found = self.assistant(tokens)
        return found or self._phrases(text, both, 1)

    def _phrases(self, text: tuple[int, ...], memories: Sequence[PhraseMemory], shortest: int) -> tuple[int, ...]:
        """Phrase after phrase, so that a short one or a repeated word fills a block too."""
        found: tuple[int, ...] = ()
        while len(found) < LENGTH:
            _, more = max((memory.longest(text + found, shortest) for memory in memories), key=lambda end: end[0])
            if not more:
                break
            found += more
        return found[:LENGTH]

    def _rest_of_draft(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The draft after one word that was replaced, or up to three that were left out."""
        last, at = tokens[-1:], len(tokens) + self._shift
        skipped = self.draft[at : at + 3]
        # A word that is written again and again does not say where in the draft it comes from.
        if last and last != tokens[-2:-1] and last[0] in skipped:
            self._shift += skipped.index(last[0]) + 1
        return self.draft[len(tokens) + self._shift :]
