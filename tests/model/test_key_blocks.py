"""Attention that chooses blocks of positions: where what is chosen lies, in pieces and in 8 bits.

`test_families` holds the tokens of such models against transformers.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.key_blocks import choosing_layers, key_block_sizes
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.model_sizes import layer_kv_bytes
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.model import block_attention, key_blocks
from distributed_llm.worker.model.key_blocks import use_key_block_indexers
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU

FAMILY = "minimax_m3_vl_text"
SETTINGS: dict[str, Any] = {
    "num_layers": 3,
    "layer_types": ["minimax_m3_sparse"],
    "index_block_size": 5,
    "index_topk_blocks": 4,
    "index_local_blocks": 2,
}
TEXT = torch.randint(VOCAB_SIZE, (75,), generator=torch.Generator().manual_seed(3)).tolist()
STOPS = (17, 18, 36, 37, 60, 75)
"""Where steps end: below, across and above the positions that a token may choose."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("m"), FAMILY, **SETTINGS))


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What the first two layers make of TEXT in transformers."""
    whole = build_model(FAMILY, **SETTINGS)
    with torch.inference_mode():
        output = whole(input_ids=torch.tensor([TEXT]), use_cache=False, output_hidden_states=True)
    states: Tensor = output.hidden_states[2][0]
    return states


def last_states(checkpoint: Checkpoint, kv_dtype: KVDtype = "auto") -> Tensor:
    """Return what the first two layers make of TEXT, step by step, [tokens, hidden_size]."""
    settings: Any = {"device": CPU, "dtype": torch.float32, "kv_dtype": kv_dtype}
    stage = Stage.load(checkpoint, LayerRange(0, 2), **settings)
    states, start = [], 0
    for stop in STOPS:
        part = SequenceSlice(sequence_id=SequenceId(0), start=start, num_tokens=stop - start)
        output = stage.run([part], torch.tensor(TEXT[start:stop], dtype=torch.int32), None)
        assert output.hidden_states is not None
        states.append(output.hidden_states.float())
        start = stop
    return torch.cat(states)


@pytest.mark.parametrize("at_once", [1, 700, 2**22])
def test_what_is_chosen_is_what_transformers_chooses(
    checkpoint: Checkpoint, expected: Tensor, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of one block or token, of a few, and of all."""
    for module in (key_blocks, block_attention):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(key_blocks, "QUERIES_AT_ONCE", min(at_once, 7))
    torch.testing.assert_close(last_states(checkpoint), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.3), ("fp8", 0.4)])
def test_keys_that_blocks_are_chosen_by_may_be_kept_in_8_bits(
    checkpoint: Checkpoint, expected: Tensor, kv_dtype: KVDtype, most: float
) -> None:
    """Some tokens choose others, whose scores are nearly the same."""
    actual = last_states(checkpoint, kv_dtype)
    assert 0 < float((actual - expected).std() / expected.std()) < most


def test_layers_and_sizes_are_those_of_the_files_as_they_were_published() -> None:
    """There they have other names, which go before those of today."""
    told: dict[str, Any] = {
        "num_hidden_layers": 4,
        "index_topk_blocks": 7,
        "sparse_attention_config": {
            "sparse_attention_freq": [0, 1, 1, 0],
            "sparse_num_index_heads": 4,
            "sparse_index_dim": 64,
            "sparse_block_size": 32,
            "sparse_topk_blocks": 8,
        },
    }
    kind: Any = CONFIG_MAPPING[FAMILY]
    made = kind(**told)
    config = {"model_type": FAMILY, **told}
    assert choosing_layers(config, 4) == tuple("sparse" in kind for kind in made.layer_types)
    sizes = (made.index_head_dim, made.index_block_size, made.index_topk_blocks)
    assert key_block_sizes(config) == sizes == (64, 32, 8)
    assert choosing_layers(made.to_dict(), 4) == choosing_layers(config, 4)


def test_a_size_that_is_none_is_named() -> None:
    with pytest.raises(CheckpointError, match="index_block_size = '32'"):
        key_block_sizes({"model_type": FAMILY, "index_block_size": "32"})


def test_keys_that_blocks_are_chosen_by_are_counted() -> None:
    """4 heads with keys and values of 128 numbers, and another 128 where a layer chooses."""
    types = ["full_attention", "minimax_m3_sparse"]
    kind: Any = CONFIG_MAPPING[FAMILY]
    config = kind(num_hidden_layers=2, layer_types=types).to_dict()
    assert layer_kv_bytes(config, "bfloat16") == (2048, 2304)


def test_an_indexer_of_another_kind_is_refused() -> None:
    model: Any = build_model(FAMILY, num_layers=2, index_n_heads=4)
    with pytest.raises(UnsupportedModel, match="chooses blocks of positions in another way"):
        use_key_block_indexers(model.model.layers[1])
