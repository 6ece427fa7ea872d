"""Drafts between texts and a model's tokens.

A draft comes from another vocabulary, so it comes as text. Only the tokens that the model itself would have written
save passes. So the text is written in the model's way: with a space before the first word or without, with a capital
letter or without. The model's own last text shows its way. A wrong guess costs passes and changes no text.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from server.targets.draft_style import DraftStyle


class DraftTokenizer:
    """A model's tokenizer, for texts that follow a prompt. For one thread."""

    def __init__(self, tokenizer: Any, config: Any) -> None:
        """tokenizer, config: of the transformers model."""
        self.vocabulary: int = config.get_text_config(decoder=True).vocab_size
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        # A text with the token of a picture's place would ask for another picture.
        self.special = frozenset(tokenizer.all_special_ids) | added | _special_tokens(config)
        self._tokenizer = tokenizer
        self._encode: Callable[[str], list[int]] = self._directly
        self._style = DraftStyle()

    def tokens(self, draft: str) -> tuple[int, ...]:
        """The draft as the model would have written it, up to its first special token."""
        if not (text := self._style.apply(draft)):
            return ()
        return tuple(takewhile(lambda token: token not in self.special, self._encode(text)))

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special tokens and without space around it."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def learn(self, tokens: Sequence[int]) -> None:
        """Remembers in which way the model wrote this text."""
        text = self.text(tokens)
        if not text:
            return
        ways = (self._directly, self._after_space, self._after_newline)
        self._encode = max(ways, key=lambda encode: common_prefix(encode(text), tokens))
        self._style.learn(text)

    def _directly(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _after_space(self, text: str) -> list[int]:
        return self._directly(f" {text}")

    def _after_newline(self, text: str) -> list[int]:
        """Without the space that some tokenizers put before the first word of a text."""
        before = self._directly("\n")
        return self._directly(f"\n{text}")[len(before) :]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _special_tokens(config: Any) -> set[int]:
    """The tokens that a model's configuration names, such as `image_token_id`."""
    named = {**config.get_text_config(decoder=True).to_dict(), **config.to_dict()}
    return {
        value
        for name, value in named.items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
