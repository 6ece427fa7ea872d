"""Random changes of an input: of its bytes, and, for a known format, of the values in it.

Most changed bytes do not even parse, and libFuzzer cannot see into the parsers, which are in C. A changed value gets
past them.
"""

import json
import math
import random
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import msgspec

WORD = re.compile(rb"[A-Za-z_]{3,24}")
CHUNKS = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"-1", b"1e999")
DEEP: Any = [[]]
for _ in range(100):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 3, 255, 65536, 1 << 31, 1 << 53, 1 << 63, (1 << 64) - 1, 1 << 70),
    *(0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf),
    *("", "x" * 65, "x" * 1500, "\x1b[2J\n", "\u00e9\U0001f431", "../../etc/passwd", "server", "nan", "1,2,3"),
    *(b"", bytes(8), b"\xff" * 300, [], {}, [0] * 300, {"": 0}, {str(i): i for i in range(100)}, DEEP),
)


@dataclass(frozen=True, slots=True)
class Format:
    """How an input becomes lists, dictionaries and plain values, and back."""

    loads: Callable[[bytes], Any]
    dumps: Callable[[Any], bytes]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, default=repr)


def _toml_tables(tree: Any) -> bytes:
    return "\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in tree.items()).encode()


MSGPACK = Format(msgspec.msgpack.decode, msgspec.msgpack.encode)
JSON = Format(json.loads, lambda tree: json.dumps(tree, default=repr).encode())
TOML = Format(msgspec.toml.decode, _toml_tables)


def words(corpus: list[bytes]) -> list[bytes]:
    """Keys and names in the corpus, for inserting."""
    return sorted({word for data in corpus for word in WORD.findall(data)})


def change_bytes(data: bytes, corpus: list[bytes], inserts: list[bytes], rng: random.Random) -> bytes:
    """One to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(changed))
        end = min(len(changed), at + rng.choice((1, 2, 4, 8, 64)))
        match rng.randrange(6):
            case 0:
                changed[at:end] = rng.randbytes(end - at)
            case 1:
                del changed[at:end]
            case 2:
                changed[at:at] = changed[at:end] * rng.randint(1, 16)
            case 3:
                changed[at:end] = rng.choice(CHUNKS)
            case 4:
                changed[at:at] = rng.choice(inserts or CHUNKS)
            case 5:
                other = rng.choice(corpus)
                changed[at:] = other[rng.randint(0, len(other)) :]
    return bytes(changed)


def change_values(data: bytes, format: Format, max_bytes: int, rng: random.Random) -> bytes | None:
    """One to three values are replaced, removed, repeated or exchanged. None if it does not parse or grows too long."""
    try:
        tree = format.loads(data)
        for _ in range(rng.randint(1, 3)):
            places = _places(tree)
            if not places:
                return None
            (inside, key), (other, other_key) = rng.choice(places), rng.choice(places)
            match rng.randrange(5):
                case 0 | 1:
                    inside[key] = deepcopy(rng.choice(VALUES))
                case 2:
                    del inside[key]
                case 3:
                    inside[key] = [inside[key]] * rng.choice((1, 2, 9))
                case 4:
                    inside[key] = format.loads(format.dumps({"": other[other_key]}))[""]  # a copy: no cycles
        changed = format.dumps(tree)
        return changed if len(changed) <= max_bytes else None
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with each of its keys or indices."""
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(places) < 300:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            places += [(value, key) for key in keys]
            waiting += [value[key] for key in keys]
    return places
