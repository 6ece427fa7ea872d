"""What a fuzzer calls."""

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.mutations import Format, change_bytes, change_values

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True, slots=True)
class Target:
    """A reader of bytes from outside. `error` is all that it may raise; any other exception is a fault."""

    read: Callable[[bytes], object]
    error: type[Exception]
    max_bytes: int  # of an input
    weight: int = 1  # its part of all inputs
    format: Format | None = None  # for changes of its values

    def call(self, data: bytes) -> None:
        """Reads the input. Raises what is a fault."""
        with suppress(self.error):
            self.read(data)

    def mutate(self, corpus: list[bytes], inserts: list[bytes], rng: random.Random) -> bytes:
        """An input of the corpus, changed."""
        data = rng.choice(corpus)
        return self.change_values(data, rng) or change_bytes(data, corpus, inserts, rng)[: self.max_bytes]

    def change_values(self, data: bytes, rng: random.Random) -> bytes | None:
        """An input with other values. None if the target has no format, and for every third input."""
        return change_values(data, self.format, self.max_bytes, rng) if self.format and rng.randrange(3) else None


def seeds(name: str) -> list[bytes]:
    """The committed inputs of a target, in a fixed order."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
