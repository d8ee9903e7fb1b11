"""Layers that have to be together are, whatever the plan."""

from itertools import pairwise

import pytest

from distributed_llm.common.errors import ConfigError, NotEnoughMemory
from distributed_llm.common.layer_sharing import kv_lenders, pieces, uncut
from distributed_llm.common.model_sizes import layer_kv_bytes
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.planning.advice import advise
from distributed_llm.coordinator.planning.strategies import StaticStrategy, make_plan
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed

GEMMA_4_E2B = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 35,
    "num_kv_shared_layers": 20,
    "hidden_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "layer_types": [
        "full_attention" if (layer + 1) % 5 == 0 else "sliding_attention" for layer in range(35)
    ],
}
COST = ModelCost((10,) * 8, 0, 0, 0, (0,) * 8, uncut=(4, 5, 6))
MEMORY = {WorkerId(name): 60 for name in "abcd"}


def test_borrowers_of_gemma_4_read_the_last_of_their_kind() -> None:
    lenders = kv_lenders(GEMMA_4_E2B, 35)
    assert lenders[:15] == (None,) * 15
    assert lenders[15:20] == (13, 13, 13, 13, 14)
    assert uncut(GEMMA_4_E2B, 35) == tuple(range(14, 35))
    assert pieces(35, uncut(GEMMA_4_E2B, 35))[-2:] == [LayerRange(12, 13), LayerRange(13, 35)]


def test_kv_cache_of_gemma_4_is_that_of_the_lenders() -> None:
    """Two numbers of two bytes for each of 256, and of 512 where all positions are seen."""
    sizes = layer_kv_bytes(GEMMA_4_E2B, "bfloat16")
    assert sizes == (*(1024, 1024, 1024, 1024, 2048) * 3, *(0,) * 20)


def test_files_of_today_tell_heads_by_layer() -> None:
    told = {"per_layer_config": {str(layer): {"head_dim": 512} for layer in range(4, 35, 5)}}
    config = {name: value for name, value in GEMMA_4_E2B.items() if name != "global_head_dim"}
    assert layer_kv_bytes({**config, **told}, "bfloat16") == layer_kv_bytes(GEMMA_4_E2B, "bfloat16")


def test_global_layers_may_have_heads_of_their_own() -> None:
    config = {**GEMMA_4_E2B, "num_kv_shared_layers": 0, "num_global_key_value_heads": 4}
    assert layer_kv_bytes(config, "bfloat16")[:5] == (1024, 1024, 1024, 1024, 2048)
    told = {**config, "attention_k_eq_v": True}
    assert layer_kv_bytes(told, "bfloat16")[:5] == (1024, 1024, 1024, 1024, 8192)


def test_other_models_have_no_borrowers() -> None:
    assert kv_lenders({"model_type": "llama", "num_kv_shared_layers": 2}, 4) == (None,) * 4
    assert pieces(3, ()) == [LayerRange(0, 1), LayerRange(1, 2), LayerRange(2, 3)]


@pytest.mark.parametrize("strategy", ["memory", "even"])
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_no_stage_begins_in_between(strategy: StaticStrategy, workers: int) -> None:
    memory = dict(list(MEMORY.items())[:workers])
    plan = make_plan(COST, memory, strategy=strategy, kv_tokens=1)
    assert not {stage.layers.start for stage in plan} & set(COST.uncut)
    assert plan[0].layers.start == 0
    assert all(left.layers.stop == right.layers.start for left, right in pairwise(plan))
    assert plan[-1].layers.stop == 8


def test_an_order_that_cuts_in_between_is_refused() -> None:
    layers = {"a": LayerRange(0, 5), "b": LayerRange(5, 8)}
    with pytest.raises(ConfigError, match=r"layers 4-7 have to be on one worker.* 6-8 begin in"):
        make_plan(COST, MEMORY, strategy="custom", kv_tokens=1, layers=layers)


def test_what_is_missing_is_said_of_layers_that_are_together() -> None:
    memory = {WorkerId(name): 30 for name in "abcd"}
    with pytest.raises(
        NotEnoughMemory, match="one of them has to hold layers 4-7, of which some read"
    ):
        make_plan(COST, memory, strategy="memory", kv_tokens=1)


# ------------------------------------------------------------------ what people are told of it

COST_WITH_KV = ModelCost((10,) * 8, 0, 0, 0, (1,) * 8, uncut=(4, 5, 6))
COST_OF_ONE_PIECE = ModelCost((10,) * 8, 0, 0, 0, (0,) * 8, uncut=tuple(range(1, 8)))
TOGETHER = "layers 4-7 have to be on one worker, for some read keys and values of others"


def test_which_layers_cannot_be_parted() -> None:
    assert COST.together_text == TOGETHER
    assert ModelCost((10,) * 8, 0, 0, 0, (0,) * 8).together_text == ""


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((30, 30, 30), r"of which some read keys and values of others, which takes 44 bytes, and"),
        ((30, 30), f": 28 bytes are missing, and {TOGETHER}: these take 44 bytes. Add a worker t"),
        ((70,), r": 18 bytes are missing. One layer takes 11 bytes"),
    ],
)
def test_why_it_does_not_fit(sizes: tuple[int, ...], words: str) -> None:
    """More workers of the same size would not help."""
    memory = {WorkerId(f"w{number}"): size for number, size in enumerate(sizes)}
    with pytest.raises(NotEnoughMemory, match=words):
        make_plan(COST_WITH_KV, memory, strategy="memory", kv_tokens=1)


def advice_about(sizes: dict[str, int]) -> dict[str, str]:
    ids = {WorkerId(name): size for name, size in sizes.items()}
    speeds = {worker: WorkerSpeed(Prior(0.01, 0, 0, 0, 0, 0)) for worker in ids}
    some = Machines(ids, speeds, LinkSpeeds(bytes_per_token=0).links)
    demand = Demand(sequences=1, positions=0, prompt_tokens=0, chunk_tokens=1)
    found = advise(COST_OF_ONE_PIECE, some, demand, objective="latency", kv_tokens=0)
    assert found is not None
    return {str(worker): advice.text for worker, advice in found.items()}


def test_why_a_worker_has_no_layers() -> None:
    why = "layers 1-8 have to be on one worker, for some read keys and values of others"
    texts = advice_about({"a": 100, "b": 100, "c": 30})
    assert texts["b"].endswith(f": no layers are left for it: {why}")
    assert texts["c"] == f"left out: too little memory (80 bytes needed, 30 bytes offered): {why}"
