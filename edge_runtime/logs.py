"""What strangers send must not fill the log."""


def is_told(count: int) -> bool:
    """Whether the count-th of the same trouble is worth a line: the 1st, 2nd, 4th, 8th, ..."""
    return count & (count - 1) == 0


def printable(text: str, limit: int = 128) -> str:
    """What a stranger sent, for one line of a log: without control characters (so no terminal escapes), cut."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])
