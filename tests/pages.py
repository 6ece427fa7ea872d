"""Facts in a page of docs/, whatever words are around them."""

import re


def says(page: str, *facts: str | int) -> bool:
    """Whether one sentence, or one row of a table, has all of these words and numbers (with commas), in any order."""
    sentences = re.split(r"(?<=[.;])\s+|\n\n|\n(?=[|-] )", page)
    words = [re.escape(f"{fact:,}" if isinstance(fact, int) else fact) for fact in facts]
    patterns = [re.compile(rf"(?<![\w.,]){word}(?!\w|[.,]\d)", re.IGNORECASE) for word in words]
    return any(all(pattern.search(sentence) for pattern in patterns) for sentence in sentences)
