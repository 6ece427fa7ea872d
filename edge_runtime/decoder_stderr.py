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
        self._python: int | None = None  # Python's own descriptor of standard error; None: Python writes to 2
        self._lock = threading.Lock()  # over the next one, and where 2 leads to
        self._decoding = 0  # pictures, on all threads

    def separate(self) -> None:
        """Once, at the start of a program, before its logging is set up.

        Does nothing if Python's standard error is not descriptor 2.
        """
        stderr = sys.__stderr__
        if stderr is None or stderr is not sys.stderr or stderr.fileno() != 2:
            return
        self._python = os.dup(2)
        sys.stderr = open(self._python, "w", 1, stderr.encoding, stderr.errors, closefd=False)  # noqa: SIM115
        if faulthandler.is_enabled():
            faulthandler.enable(sys.stderr)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """While a picture is decoded; any thread."""
        if self._python is None:
            yield
            return
        with self._lock:
            self._decoding += 1
            if self._decoding == 1:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 2)
                os.close(nowhere)
        try:
            yield
        finally:
            with self._lock:
                self._decoding -= 1
                if self._decoding == 0:
                    os.dup2(self._python, 2)


DECODER_STDERR = DecoderStderr()  # a process has one descriptor 2
