"""Latent attention: what is kept, both ways to attend to it, and what else may become of it.

The reference is transformers, which makes keys and values of every head of all latents.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import KV_BLOCK, LayerRange, SequenceId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.worker.model import latent_attention
from distributed_llm.worker.model.latents import LatentExpansion, keep_latents
from distributed_llm.worker.model.partial_attention import row_scores
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU, Pipeline, load_stages
from tests.model.test_engine_moves import move
from tests.model.workers import Cluster, workers
from tests.reference import generated

NUM_LAYERS = 3
TOKEN_BYTES = NUM_LAYERS * (24 + 8) * 4
SIZES = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "youtu": {**SIZES, "v_head_dim": 16},
    "minicpm3": {**SIZES, "v_head_dim": 24, "dim_model_base": 48},
}
"""Values shorter than keys, and longer ones."""
TEXT = torch.randint(VOCAB_SIZE, (75,), generator=torch.Generator().manual_seed(3)).tolist()
STOPS = (20, 21, 40, 41, 60, 75)
"""Where steps end: chunks after chunks, and single tokens between them."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(path, request.param, num_layers=NUM_LAYERS, **FAMILIES[request.param])


def last_states(checkpoint: Checkpoint, **settings: Any) -> Tensor:
    """Return what the first layers make of TEXT, step by step, [tokens, hidden_size]."""
    layers = LayerRange(0, NUM_LAYERS - 1)
    stage = Stage.load(checkpoint, layers, **{"device": CPU, "dtype": torch.float32, **settings})
    states, start = [], 0
    for stop in STOPS:
        part = SequenceSlice(sequence_id=SequenceId(0), start=start, num_tokens=stop - start)
        output = stage.run([part], torch.tensor(TEXT[start:stop], dtype=torch.int32), None)
        assert output.hidden_states is not None
        states.append(output.hidden_states.float())
        start = stop
    return torch.cat(states)


@pytest.fixture(scope="module")
def expected(whole: Any) -> Tensor:
    """What transformers makes of TEXT in the same layers."""
    with torch.inference_mode():
        output = whole(input_ids=torch.tensor([TEXT]), use_cache=False, output_hidden_states=True)
    states: Tensor = output.hidden_states[NUM_LAYERS - 1][0]
    return states


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).std() / expected.std())


@pytest.mark.parametrize("absorbs", [True, False], ids=["absorbed", "expanded"])
@pytest.mark.parametrize("at_once", [1, 9, 1000])
def test_both_ways_give_what_transformers_gives(
    checkpoint: Checkpoint,
    expected: Tensor,
    absorbs: bool,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In pieces of one position, of a few, and of all."""
    monkeypatch.setattr(latent_attention, "absorbing_is_faster", lambda *_: absorbs)
    monkeypatch.setattr(latent_attention, "SCORES_AT_ONCE", at_once * 4 * 20)
    monkeypatch.setattr(latent_attention, "EXPANDED_AT_ONCE", at_once * 4 * 84)
    torch.testing.assert_close(last_states(checkpoint), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("absorbs", [True, False], ids=["absorbed", "expanded"])
@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.03), ("fp8", 0.1)])
def test_latents_may_be_kept_in_8_bits(
    checkpoint: Checkpoint,
    expected: Tensor,
    kv_dtype: KVDtype,
    most: float,
    absorbs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latent_attention, "absorbing_is_faster", lambda *_: absorbs)
    assert 0 < error(last_states(checkpoint, kv_dtype=kv_dtype), expected) < most


def test_in_bfloat16_the_error_is_that_of_transformers(
    folder: Path, checkpoint: Checkpoint, expected: Tensor
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    inputs = {"input_ids": torch.tensor([TEXT]), "use_cache": False, "output_hidden_states": True}
    with torch.inference_mode():
        reference = theirs(**inputs).hidden_states[NUM_LAYERS - 1][0].float()
    ours = last_states(checkpoint, dtype=torch.bfloat16)
    assert 0 < error(ours, expected) < 1.3 * error(reference, expected)


def test_scores_that_bfloat16_would_round_too_much_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    queries = (8 * torch.randn(1, 4, 20, generator=generator)).bfloat16()
    shared, latents = (torch.randn(1, 9, dim, generator=generator).bfloat16() for dim in (8, 12))
    exact = queries.double() @ torch.cat((shared, latents), dim=-1).double().transpose(1, 2)
    assert float(exact.abs().max()) > 40
    torch.testing.assert_close(
        row_scores(queries, shared, latents).double(), exact, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_models_multiply_latents_by_floating_point_numbers(
    checkpoint: Checkpoint, expected: Tensor, quantize: Quantize
) -> None:
    layers = LayerRange(0, NUM_LAYERS)
    stage = Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32, quantize=quantize)
    attention: Any = stage._held.layers[1].self_attn
    assert isinstance(attention.kv_b_proj, LatentExpansion)
    assert attention.kv_b_proj.weight.dtype == torch.float32
    assert type(attention.o_proj).__name__ == "QuantLinear"
    planned = sum(
        checkpoint.weight_bytes(weight, "float32", quantize)
        for weight in checkpoint.weights_of(layers)
    )
    assert abs(stage.weight_bytes - planned) < attention.kv_b_proj.weight.nbytes / 2
    most = {"int8": 0.03, "int4": 0.3}[quantize]
    assert 0 < error(last_states(checkpoint, quantize=quantize), expected) < most


def test_attention_that_expands_in_another_way_is_refused() -> None:
    model: Any = build_model("deepseek_v3", num_layers=1)
    attention = model.model.layers[0].self_attn
    expand = attention.expand_kv
    attention.expand_kv = lambda latents, shared: expand(latents, 2 * shared)
    with pytest.raises(UnsupportedModel, match="DeepseekV3Attention of the installed"):
        keep_latents(model.model.layers[0])
    assert isinstance(attention.kv_b_proj, nn.Linear)
    attention.expand_kv = expand
    keep_latents(model.model.layers[0])
    assert isinstance(attention.kv_b_proj, LatentExpansion)


def test_workers_keep_and_move_latents(folder: Path, whole: Any) -> None:
    with workers("a", "b") as made:
        cluster = Cluster(folder, (("a", (0, 2)), ("b", (2, 3))), made)
        cluster.prefill([TEXT], [len(TEXT) - 1])
        cluster.decode()
        move(cluster, 2, (("b", (0, 2)), ("a", (2, 3))))
        for _ in range(5):
            cluster.decode()
        assert cluster.texts[0][len(TEXT) :] == generated(whole, TEXT, 6)
        assert all(worker.silent for worker in made.values())
        held = sum(worker.engine.vitals.kv_bytes for worker in made.values())
        assert held == 2 * KV_BLOCK * TOKEN_BYTES


def test_tokens_that_share_a_prefix_and_others_are_attended_together(
    checkpoint: Checkpoint, whole: Any
) -> None:
    pipeline = Pipeline(load_stages(checkpoint, [1, 2]))
    pipeline.prefill([TEXT, TEXT[5:30]], [70, 20])
    child = pipeline.share(0, 70, [9, 8])
    for _ in range(3):
        pipeline.decode()
    for text, prompt in zip(pipeline.texts, (TEXT, TEXT[5:30], [*TEXT[:70], 9, 8]), strict=True):
        assert text[len(prompt) :] == generated(whole, prompt, 3)
    assert child == 2
