"""What a fuzzer calls."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True, slots=True)
class Target:
    """A reader of bytes from outside. `error` is all that it may raise; any other exception is a fault."""

    read: Callable[[bytes], object]
    error: type[Exception]
    max_bytes: int  # of an input
    weight: int = 1  # its part of all inputs

    def call(self, data: bytes) -> None:
        """Reads the input. Raises what is a fault."""
        with suppress(self.error):
            self.read(data)


def seeds(name: str) -> list[bytes]:
    """The committed inputs of a target, in a fixed order."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
