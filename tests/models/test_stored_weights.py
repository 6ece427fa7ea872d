"""Weights survive their storage: exactly if float16 holds them, within half a step of their row as a large table."""

import pytest
import torch

from models.stored_weights import LARGE, SCALES, pack, unpack


def test_small_weights_are_stored_as_float16_and_come_back_unchanged():
    weights = {"bias": torch.randn(100).half().float(), "conv.weight": torch.randn(4, 3, 3, 3).half().float()}
    packed = pack(weights)
    assert all(tensor.dtype == torch.float16 for tensor in packed.values())
    assert all(torch.equal(unpack(packed)[name], weight) for name, weight in weights.items())


def test_a_large_table_takes_a_byte_per_weight_and_comes_back_within_half_a_step_of_its_row():
    table = torch.randn(LARGE // 100, 100) * torch.rand(LARGE // 100, 1) * 4
    table[7] = 0.0
    packed = pack({"tokens.weight": table})
    assert packed["tokens.weight"].dtype == torch.int8
    back = unpack(packed)
    assert list(back) == ["tokens.weight"]
    steps = table.abs().amax(1) / 127
    assert ((back["tokens.weight"] - table).abs().amax(1) <= 0.501 * steps).all()


@pytest.mark.parametrize("scales", [None, torch.ones(3), torch.ones(2, 2)])
def test_an_int8_table_without_a_scale_per_row_is_refused(scales):
    tensors = {"tokens.weight": torch.ones(2, 2, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"tokens\.weight"):
        unpack(tensors if scales is None else tensors | {"tokens.weight" + SCALES: scales})
