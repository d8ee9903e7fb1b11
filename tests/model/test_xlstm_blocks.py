"""Blocks of xLSTM go on from a state: the reference, transformers' own, computes all at once."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.layer_states import state_bytes
from distributed_llm.worker.model.state_layers import MixerCache
from distributed_llm.worker.model.xlstm_blocks import use_xlstm_with_caches
from tests.checkpoints import build_model

SIZES: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "chunk_size": 4}
STATES = torch.randn((2, 9, 128), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stops", [(1, 2, 3, 9), (4, 8, 9), (6, 9)], ids=str)
def test_chunks_give_what_transformers_makes_of_the_whole(stops: tuple[int, ...]) -> None:
    whole: Any = build_model("xlstm", num_layers=1, **SIZES)
    ours: Any = build_model("xlstm", num_layers=1, **SIZES)
    use_xlstm_with_caches(ours)
    outputs, made = [], None
    with torch.inference_mode():
        expected, _ = whole.backbone.blocks[0](STATES)
        for start, stop in pairwise((0, *stops)):
            cache = MixerCache(made)
            outputs.append(ours.backbone.blocks[0](STATES[:, start:stop], cache)[0])
            made = cache.made
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_bfloat16_keeps_states_in_float32() -> None:
    """For which transformers' own fails, unless they are bfloat16."""
    whole: Any = build_model("xlstm", num_layers=1, **SIZES)
    ours: Any = build_model("xlstm", num_layers=1, **SIZES).bfloat16()
    use_xlstm_with_caches(ours)
    cache = MixerCache(None)
    with torch.inference_mode():
        expected, _ = whole.backbone.blocks[0](STATES)
        actual = ours.backbone.blocks[0](STATES.bfloat16(), cache)[0]
    assert actual.dtype == torch.bfloat16
    assert {state.dtype for state in cache.made.values()} == {torch.float32}
    assert float((actual.float() - expected).std() / expected.std()) < 0.03
    nbytes = sum(state[0].nbytes for state in cache.made.values())
    assert state_bytes(whole.config.to_dict(), "bfloat16") == (nbytes,)


def test_sizes_are_those_of_files_as_they_were_published() -> None:
    """They name blocks and embeddings; 8 heads of 256 by 512 numbers, 256, and one."""
    config = {"model_type": "xlstm", "num_blocks": 32, "embedding_dim": 4096, "num_heads": 8}
    assert state_bytes(config, "bfloat16") == (8 * (256 * 512 + 256 + 1) * 4,) * 32
    with pytest.raises(CheckpointError, match="qk_dim_factor = -1"):
        state_bytes({**config, "qk_dim_factor": -1}, "bfloat16")
