"""Replies to try an implementation with: the golden ones, and such that are changed at random, always the same."""

import json
import random
from pathlib import Path

from tests.fuzz.mutations import MSGPACK, change_bytes, change_values

ENVELOPES = json.loads((Path(__file__).parents[1] / "golden" / "envelope.json").read_text())
REPLIES = [bytes.fromhex(vector["bytes"]) for vector in ENVELOPES if vector["name"].startswith("reply")]


def changed_replies() -> list[bytes]:
    """Most are no replies."""
    rng = random.Random(22)
    changed = [change_bytes(rng.choice(REPLIES), REPLIES, [], rng) for _ in range(500)]
    return changed + list(
        filter(None, (change_values(rng.choice(REPLIES), MSGPACK, 1 << 16, rng) for _ in range(2500)))
    )
