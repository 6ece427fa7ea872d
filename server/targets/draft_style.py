"""How a model begins and ends its texts, so that a draft can be written in its way.

Only the tokens that the model itself would have written save it passes. A wrong guess costs passes and changes no text.
"""

MAX_DRAFT = 4096  # characters; more is cut


class DraftStyle:
    """Learned from the model's last text. Threads that use it see one text's style or another's."""

    def __init__(self) -> None:
        self._starts_with_capital = self._ends_with_stop = False

    def learn(self, text: str) -> None:
        """Remembers in which way the model wrote this text."""
        if text:
            self._starts_with_capital, self._ends_with_stop = text[0].isupper(), text[-1] == "."

    def apply(self, draft: str) -> str:
        """The draft in this style, without space around it and without lone surrogates."""
        text = draft[:MAX_DRAFT].encode("utf-8", "ignore").decode().strip()
        if self._starts_with_capital:
            text = text[:1].upper() + text[1:]
        return text + "." if self._ends_with_stop and text[-1:].isalnum() else text
