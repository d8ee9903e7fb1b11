"""Recurrent blocks of RecurrentGemma go on from a state: the reference computes all at once."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from distributed_llm.worker.model.recurrent_blocks import RecurrentBlock
from distributed_llm.worker.model.state_layers import MixerCache
from tests.checkpoints import HIDDEN_SIZE, build_model


@pytest.mark.parametrize("stops", [(1, 2, 3, 9), (2, 7, 8, 9), (6, 9)], ids=str)
def test_chunks_give_what_transformers_makes_of_the_whole(stops: tuple[int, ...]) -> None:
    model: Any = build_model("recurrent_gemma", num_layers=1)
    block = model.model.layers[0].temporal_block
    states = torch.randn((2, 9, HIDDEN_SIZE), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).expand(2, 9)
    ours = RecurrentBlock(block, 0)
    outputs, made = [], None
    with torch.inference_mode():
        expected, _ = block(states, positions, None, use_cache=False)
        for start, stop in pairwise((0, *stops)):
            cache = MixerCache(made)
            outputs.append(ours(states[:, start:stop], past_key_values=cache)[0])
            made = cache.made
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-5)
