"""Attention that chooses positions: who chooses, where what is chosen lies, and in 8 bits.

`test_families` holds the tokens of such models against transformers.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.indexers import choosers
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.layer_sharing import lenders_within, uncut
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.model_sizes import layer_kv_bytes
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.model import indexers, sparse_attention
from distributed_llm.worker.model.indexers import use_packed_indexers
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU

SETTINGS: dict[str, Any] = {"num_layers": 3, "index_topk": 24, "index_head_dim": 12}
TEXT = torch.randint(VOCAB_SIZE, (75,), generator=torch.Generator().manual_seed(3)).tolist()
STOPS = (20, 21, 40, 41, 60, 75)
"""Where steps end: below, across and above the positions that a token may choose."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(
        make_checkpoint(tmp_path_factory.mktemp("m"), "deepseek_v32", **SETTINGS)
    )


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What the first two layers make of TEXT in transformers."""
    whole = build_model("deepseek_v32", **SETTINGS)
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
    """In pieces of one position or token, of a few, and of all."""
    monkeypatch.setattr(indexers, "SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(indexers, "QUERIES_AT_ONCE", min(at_once, 7))
    monkeypatch.setattr(sparse_attention, "SCORES_AT_ONCE", at_once)
    torch.testing.assert_close(last_states(checkpoint), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.15), ("fp8", 0.3)])
def test_keys_of_indexers_may_be_kept_in_8_bits(
    checkpoint: Checkpoint, expected: Tensor, kv_dtype: KVDtype, most: float
) -> None:
    """Some tokens choose others, whose scores are nearly the same."""
    actual = last_states(checkpoint, kv_dtype)
    assert 0 < float((actual - expected).std() / expected.std()) < most


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"index_topk_freq": 3},
        {"index_topk_freq": 3, "index_skip_topk_offset": 4},
        {"index_topk_pattern": "FSFFSSFF"},
        {"indexer_types": ["full", *["shared"] * 3, *["full"] * 4]},
    ],
)
def test_layers_take_what_those_do_that_transformers_names(told: dict[str, Any]) -> None:
    kind: Any = CONFIG_MAPPING["glm_moe_dsa"]
    made = kind(num_hidden_layers=8, **told).indexer_types
    found = choosers({"model_type": "glm_moe_dsa", **told}, 8)
    assert [kind == "shared" for kind in made] == [chooser is not None for chooser in found]
    assert all(made[one] == "full" and one < layer for layer, one in enumerate(found) if one)


def test_keys_of_indexers_are_counted_beside_the_latents() -> None:
    """512 numbers, 64 that all heads share, and 128 where a layer chooses; of two bytes each."""
    kind: Any = CONFIG_MAPPING["glm_moe_dsa"]
    config = kind(num_hidden_layers=4, index_topk_pattern="FSFS").to_dict()
    assert layer_kv_bytes(config, "bfloat16") == (1408, 1152, 1408, 1152)
    assert layer_kv_bytes(config, "bfloat16", "int8") == (708, 580, 708, 580)


def test_no_stage_begins_with_a_layer_that_takes_what_others_choose() -> None:
    config = {"model_type": "glm_moe_dsa", "index_topk_pattern": "FSSFS"}
    assert uncut(config, 5) == (1, 2, 4)
    with pytest.raises(ValueError, match="attend to what layers before them have chosen"):
        lenders_within(config, 5, LayerRange(2, 5))


def test_an_indexer_of_another_kind_is_refused() -> None:
    model: Any = build_model("deepseek_v32", num_layers=1)
    layer = model.model.layers[0]
    layer.self_attn.indexer = torch.nn.Linear(1, 1)
    with pytest.raises(UnsupportedModel, match="Linear of the installed transformers chooses"):
        use_packed_indexers(layer)
