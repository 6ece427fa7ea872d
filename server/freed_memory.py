"""Gives memory that was freed back to the operating system.

glibc's heap rarely uses the aligned block of a freed tensor for the next one (glibc bug 14581), once blocks that live
longer lie between them. Under load, the heap of a server grows by some 10 MB per second, while what is in use stays.
"""

import ctypes

M_ARENA_MAX = -8  # malloc.h

_libc = ctypes.CDLL(None)
_mallopt, _trim = getattr(_libc, "mallopt", None), getattr(_libc, "malloc_trim", None)  # other C libraries have none


def use_one_heap() -> None:
    """Call it before there are threads. Otherwise each gets a heap of its own, and `give_back` cannot free the end of
    those: mtrim in glibc's malloc.c.
    """
    if _mallopt:
        _mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """The pages of all free blocks. Takes milliseconds, in which other threads may wait for memory."""
    if _trim:
        _trim(0)
