"""What the draft decoder's training sees, and how its texts are drawn."""

import numpy as np
import torch

from edge_runtime.wire.labels import LABEL_BYTES, MAX_LABELS, encode_labels
from models.recipe.stage5_symbols import labels_of
from models.recipe.stage7_critic import TEMPERATURE, chosen_tokens
from models.recipe.stage9_draft import some_labels


def test_tokens_are_drawn_as_often_as_they_are_likely_and_never_without_a_chance():
    torch.manual_seed(1)
    wanted = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    drawn = chosen_tokens((TEMPERATURE * wanted.log()).expand(20_000, -1))
    shares = torch.bincount(drawn, minlength=6) / 20_000
    assert torch.allclose(shares, wanted, atol=0.015)
    assert not shares[wanted == 0].any()


def test_some_rows_lose_their_last_labels_and_none_gets_others():
    sent = encode_labels([(5, 0.5), (300, 0.2), (7, 0.1)])
    row = np.frombuffer(sent.ljust(LABEL_BYTES * MAX_LABELS, b"\0"), np.uint8)
    rows = some_labels(np.tile(row, (2000, 1)), np.random.default_rng(1))
    whole = list(labels_of(row).items())
    kept = [len(labels_of(each)) for each in rows]
    assert all(list(labels_of(each).items()) == whole[:k] for each, k in zip(rows, kept, strict=True))
    assert np.bincount(kept)[:3].min() > 50
    assert kept.count(3) > 1200
