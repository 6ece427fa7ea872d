"""What strangers send must not fill the log."""


def is_told(count: int) -> bool:
    """Whether the count-th of the same trouble is worth a line: the 1st, 2nd, 4th, 8th, ..."""
    return count & (count - 1) == 0


def printable(text: str, limit: int | None = None) -> str:
    """Text from files or the network without the characters that a terminal would obey, cut after `limit`."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])
