"""Attention that chooses blocks of positions: what is chosen, where it lies, and in 8 bits.

`test_families` holds the tokens of such models against transformers.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_llm.common.block_indexers import BlockSizes, block_sizes
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages import SequenceSlice, SharedPrefix
from distributed_llm.common.model_sizes import layer_kv_bytes
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.model import block_attention, block_indexers, indexers
from distributed_llm.worker.model.block_indexers import use_packed_block_indexers
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU

SETTINGS: dict[str, Any] = {
    **{"num_layers": 3, "layer_types": ["full_attention"], "ple_layer_ids": None},
    **{"indexer_budget": 20, "indexer_compress_ratio": 4},
}
TEXT = torch.randint(VOCAB_SIZE, (75,), generator=torch.Generator().manual_seed(3)).tolist()
STOPS = (10, 22, 23, 24, 26, 41, 42, 60, 75)
"""Where steps end: in and at the end of blocks; below, at and above what a token may see."""
FORK = 42
"""Where a second text goes on with the same tokens: in a block, of which it shares the half."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(
        make_checkpoint(tmp_path_factory.mktemp("m"), "qwen4_exp_text", **SETTINGS)
    )


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What the first two layers make of TEXT in transformers."""
    whole = build_model("qwen4_exp_text", **SETTINGS)
    with torch.inference_mode():
        output = whole(input_ids=torch.tensor([TEXT]), use_cache=False, output_hidden_states=True)
    states: Tensor = output.hidden_states[2][0]
    return states


def last_states(
    checkpoint: Checkpoint, kv_dtype: KVDtype = "auto", fork: int | None = None
) -> Tensor:
    """Return what the first two layers make of TEXT, step by step, [tokens, streams * hidden].

    Args:
        checkpoint: of the model.
        kv_dtype: how keys and values are kept.
        fork: where another sequence goes on, which begins like the first; None: nowhere.
    """
    settings: Any = {"device": CPU, "dtype": torch.float32, "kv_dtype": kv_dtype}
    stage = Stage.load(checkpoint, LayerRange(0, 2), **settings)
    states, start, whose, prefix = [], 0, SequenceId(0), None
    for stop in STOPS:
        part = SequenceSlice(sequence_id=whose, start=start, num_tokens=stop - start, prefix=prefix)
        output = stage.run([part], torch.tensor(TEXT[start:stop], dtype=torch.int32), None)
        assert output.hidden_states is not None
        states.append(output.hidden_states.float())
        start, prefix = stop, None
        if stop == fork:
            prefix, whose = SharedPrefix(sequence_id=whose, length=stop, take=False), SequenceId(1)
    return torch.cat(states)


@pytest.mark.parametrize("at_once", [1, 700, 2**22])
@pytest.mark.parametrize("fork", [None, FORK])
def test_what_is_chosen_is_what_transformers_chooses(
    checkpoint: Checkpoint,
    expected: Tensor,
    at_once: int,
    fork: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In pieces of one position or token, of a few, and of all; in one segment and in two."""
    monkeypatch.setattr(indexers, "SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(block_indexers, "QUERIES_AT_ONCE", min(at_once, 7))
    monkeypatch.setattr(block_attention, "SCORES_AT_ONCE", at_once)
    actual = last_states(checkpoint, fork=fork)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.15), ("fp8", 0.3)])
def test_keys_of_blocks_may_be_kept_in_8_bits(
    checkpoint: Checkpoint, expected: Tensor, kv_dtype: KVDtype, most: float
) -> None:
    """Some tokens choose others, whose scores are nearly the same."""
    actual = last_states(checkpoint, kv_dtype, FORK)
    assert 0 < float((actual - expected).std() / expected.std()) < most


def test_tokens_in_one_batch_see_what_they_see_alone(checkpoint: Checkpoint) -> None:
    """A short text, one that chooses, one whose token ends a block, and a chunk."""
    stage = Stage.load(checkpoint, LayerRange(0, 2), device=CPU, dtype=torch.float32)
    starts, counts = (5, 50, 39, 30), (1, 1, 1, 9)

    def run(numbers: list[int], start: list[int], stop: list[int]) -> Tensor:
        parts = [
            SequenceSlice(sequence_id=SequenceId(n), start=first, num_tokens=last - first)
            for n, first, last in zip(numbers, start, stop, strict=True)
        ]
        tokens = [t for first, last in zip(start, stop, strict=True) for t in TEXT[first:last]]
        states = stage.run(parts, torch.tensor(tokens, dtype=torch.int32), None).hidden_states
        assert states is not None
        return states

    stops = [start + count for start, count in zip(starts, counts, strict=True)]
    for number, start in enumerate(starts):
        run([number], [0], [start])
    alone = [run([n], [starts[n]], [stops[n]]) for n in range(4)]
    together = run([0, 1, 2, 3], list(starts), stops)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 3, 4])
def test_blocks_are_complete_where_their_last_positions_are(block: int) -> None:
    sizes = BlockSizes(block, most=2, key_dim=8)
    for start in range(9):
        for stop in range(start, 14):
            found = [s for s in range(0, 20, block) if start <= s + block - 1 < stop]
            assert list(sizes.complete_in(start, stop)) == found


def test_keys_of_blocks_are_counted_beside_those_of_heads() -> None:
    """Two heads of 256 numbers for keys and values, and 128 by which blocks are chosen."""
    config = {
        **{"model_type": "qwen4_exp_text", "num_hidden_layers": 1, "hidden_size": 2048},
        **{"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256},
        **{"indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 32},
    }
    assert block_sizes(config) == BlockSizes(32, 64, 128)
    assert layer_kv_bytes(config, "bfloat16") == (2 * (2 * 2 * 256 + 128),)
    odd = layer_kv_bytes({**config, "num_key_value_heads": 3}, "bfloat16")
    assert odd == (2 * (3 * 2 * 256 + 129),)


@pytest.mark.parametrize("value", [None, 0, "four"])
def test_sizes_that_are_not_told_are_asked_for(value: object) -> None:
    config = {
        **{"model_type": "qwen4_exp_text", "indexer_head_dim": 128, "indexer_budget": 2048},
        "indexer_compress_ratio": value,
    }
    with pytest.raises(CheckpointError, match=f"indexer_compress_ratio = {value!r}"):
        block_sizes(config)


def test_an_indexer_of_another_kind_is_refused() -> None:
    model: Any = build_model("qwen4_exp_text", **{**SETTINGS, "num_layers": 1})
    layer = model.model.layers[0]
    layer.self_attn.indexer = torch.nn.Linear(1, 1)
    with pytest.raises(UnsupportedModel, match="Linear of the installed transformers chooses"):
        use_packed_block_indexers(layer)
