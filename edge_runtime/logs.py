"""What strangers send must not fill the log."""


def is_told(count: int) -> bool:
    """Whether the count-th of the same trouble is worth a line: the 1st, 2nd, 4th, 8th, ..."""
    return count & (count - 1) == 0
