"""libjpeg and libpng write a line to standard error for each damaged picture, which a camera could repeat without end.

They write to descriptor 2, so it leads nowhere while they decode. Before, Python gets a descriptor of its own: what it
logs on other threads meanwhile, and what faulthandler writes of a crash, is not lost.
"""

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DecoderStderr:
    """Descriptor 2 of this process. Silences nothing before `separate`."""

    def __init__(self) -> None:
        self.own: int | None = None  # the descriptor for all other words, such as a child's; None: it is 2
        self._nowhere = -1
        self._lock = threading.Lock()  # over the next one, and where 2 leads to
        self._decoding = 0  # pictures, on all threads

    def separate(self) -> None:
        """Once, at the start of a program, before its logging is set up.

        Does nothing if Python's standard error is not descriptor 2.
        """
        stderr = sys.__stderr__
        if stderr is None or stderr is not sys.stderr or stderr.fileno() != 2:
            return
        self.own, self._nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        sys.stderr = open(self.own, "w", 1, stderr.encoding, stderr.errors, closefd=False)  # noqa: SIM115
        if faulthandler.is_enabled():
            faulthandler.enable(sys.stderr)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """While a picture is decoded; any thread."""
        if self.own is None:
            yield
            return
        with self._lock:
            self._decoding += 1
            if self._decoding == 1:
                os.dup2(self._nowhere, 2)
        try:
            yield
        finally:
            with self._lock:
                self._decoding -= 1
                if self._decoding == 0:
                    os.dup2(self.own, 2)


DECODER_STDERR = DecoderStderr()  # a process has one descriptor 2
