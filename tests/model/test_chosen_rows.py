"""What is gathered of the positions that attention has chosen, wherever they are kept."""

import pytest
import torch
from torch import Tensor

from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.chosen_rows import ChosenRows
from distributed_llm.worker.model.packed_step import PackedStep

HEADS, POSITIONS = 2, 40
PARTS = pytest.mark.parametrize("sizes", [[POSITIONS], [9, 20, 11]], ids=["one", "three"])
"""Positions of the segments in which they are kept."""


def rows() -> tuple[Tensor, Tensor]:
    """Return keys and values, [heads, positions, dim]; no two numbers are equal."""
    keys = torch.arange(HEADS * POSITIONS * 6.0).view(HEADS, POSITIONS, 6)
    return keys, -torch.arange(HEADS * POSITIONS * 4.0).view(HEADS, POSITIONS, 4)


def kept(sizes: list[int]) -> ChosenRows:
    keys, values = rows()
    parts = zip(*(torch.split(one, sizes, dim=1) for one in (keys, values)), strict=True)
    step = PackedStep(KVCache(1), 0, (), [0])
    return ChosenRows(step, [KVBuffers(*part) for part in parts], keys, values)


@PARTS
def test_all_heads_get_the_positions_that_a_token_has_chosen(sizes: list[int]) -> None:
    chosen = torch.tensor([[0, 8, 9], [28, 29, 39], [39, 0, 0]])
    keys, values = rows()
    found = kept(sizes).gathered(chosen)
    assert torch.equal(found[0], keys[:, chosen])
    assert torch.equal(found[1], values[:, chosen])


@PARTS
def test_each_head_gets_the_positions_that_it_has_chosen(sizes: list[int]) -> None:
    chosen = torch.tensor([[[0, 8, 9], [28, 29, 39]], [[39, 0, 0], [30, 31, 9]]])
    keys, values = rows()
    found = kept(sizes).gathered(chosen)
    for head in range(HEADS):
        assert torch.equal(found[0][head], keys[head, chosen[head]])
        assert torch.equal(found[1][head], values[head, chosen[head]])


@PARTS
@pytest.mark.parametrize("every", [1, 4])
def test_what_is_kept_behind_the_keys_comes_in_order(sizes: list[int], every: int) -> None:
    keys, _ = rows()
    found = torch.cat(kept(sizes).index_keys(2, every), dim=1)
    assert torch.equal(found, keys[:, every - 1 :: every, -2:])
