"""What a step takes beside weights and KV cache is within what is planned for it."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.common.workspace import workspace_bytes
from distributed_llm.worker.model import chunk_attention, sampled_rows
from distributed_llm.worker.model.kernels.native import recurrences
from distributed_llm.worker.model.sampled_rows import RowToSample, sample_rows
from distributed_llm.worker.model.sampler import RowsFailed
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import make_checkpoint

TOKENS = 512
SMALL_BYTES = 8 << 20
"""What is planned for whatever is small, and not measured here."""

EVERYTHING = Sampling(
    temperature=5.0,
    top_k=15_000,
    top_p=0.99,
    min_p=1e-6,
    typical_p=0.99,
    repetition_penalty=1.1,
    seed=1,
    logprobs=20,
)
_LATENTS = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 2 * TOKENS,
}
_CHOSEN = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "index_head_dim": 64,
    "index_block_size": 16,
    "index_topk_blocks": 8,
    "layer_types": ["minimax_m3_sparse"],
    "max_position_embeddings": 2 * TOKENS,
    "num_local_experts": 4,
}
FAMILIES: dict[str, tuple[float, dict[str, Any]]] = {
    "llama": (1.5, {}),
    "qwen3_moe": (1.6, {"moe_intermediate_size": 384}),
    "gpt_oss": (1.3, {}),
    "gpt2": (1.5, {}),
    "deepseek_v3": (1.7, {**_LATENTS, "num_attention_heads": 8, "num_key_value_heads": 8}),
    "minicpm3": (1.7, {**_LATENTS, "kv_lora_rank": 32}),  # all attend to latents as they are
    "deepseek_v32": (1.7, {**_LATENTS, "index_topk": 128, "index_head_dim": 64}),
    "qwen4_exp_text": (
        1.5,
        {
            **{"num_attention_heads": 8, "head_dim": 64, "layer_types": ["full_attention"]},
            **{"ple_layer_ids": None, "indexer_head_dim": 64, "indexer_n_heads": 4},
            **{"indexer_budget": 128, "indexer_compress_ratio": 16},
        },
    ),
    "minimax_m3_vl_text": (1.3, _CHOSEN),
    "gemma2": (5.0, {}),  # blocks of scores, which a short prompt does not fill
}
"""How many times what was measured may be planned."""

_DELTA_NET = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MIXERS: dict[str, tuple[float, dict[str, Any]]] = {
    "mamba": (1.1, {"intermediate_size": 512, "state_size": 16}),
    "mamba2": (1.3, {"num_heads": 8, "head_dim": 64, "state_size": 64, "chunk_size": 128}),
    "qwen3_next": (1.2, _DELTA_NET),
    "qwen4_exp_text": (
        1.5,
        {
            **_DELTA_NET,
            **{"layer_types": ["linear_attention"], "hc_count": 6, "ple_embed_dim": 256},
        },
    ),
    "recurrent_gemma": (1.2, {"block_types": ["recurrent"], "lru_width": 1024}),
    "kimi_linear": (1.1, {"linear_num_heads": 8, "linear_head_dim": 64}),
    "xlstm": (1.2, {"num_heads": 4, "chunk_size": 64}),
    "zaya": (1.2, {"num_attention_heads": 8, "head_dim": 128, "moe_intermediate_size": 256}),
    "rwkv": (1.2, {"attention_hidden_size": 1024}),
}
"""The same for models whose layers with a state take most, with what they have beside."""


def peak_of(run: Callable[[], object]) -> int:
    """Return by how many bytes torch's and NumPy's memory grows at most in a call."""
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    results: Any = profiled.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak + most


def planned(folder: Path, tokens: int, rows: int) -> int:
    checkpoint = open_checkpoint(folder)
    vocab_size = checkpoint.vocab_size
    return workspace_bytes(
        checkpoint.config, "bfloat16", vocab_size=vocab_size, tokens=tokens, rows=rows
    )


def measured(
    folder: Path, tokens: int, sampling: Sampling, count: int, *, begins: bool = False
) -> int:
    """Return the peak of the second of two steps of `count` sequences; `begins`: of others."""
    stage = Stage.load(
        open_checkpoint(folder),
        LayerRange(0, 2),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    each = tokens // count

    def step(number: int) -> None:
        parts = [
            SequenceSlice(
                sequence_id=SequenceId(one + number * count * begins),
                start=number * each * (not begins),
                num_tokens=each,
                sample=True,
                sampling=sampling,
            )
            for one in range(count)
        ]
        stage.run(parts, torch.randint(3, 100, (tokens,), dtype=torch.int32), None)

    step(0)
    return peak_of(lambda: step(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's attention; where the C library attends, it needs less."""
    monkeypatch.setattr(chunk_attention, "can_attend_chunk", lambda *_: False)
    most, given = FAMILIES[family]
    make_checkpoint(
        tmp_path / "model",
        family,
        num_layers=2,
        hidden_size=512,
        intermediate_size=1536,
        **{"max_position_embeddings": 4096, **given},
    )
    peak = measured(tmp_path / "model", TOKENS, Sampling(), 1)
    room = planned(tmp_path / "model", TOKENS, 1) - SMALL_BYTES
    assert 1.0 <= room / peak <= most


@pytest.mark.parametrize("family", MIXERS)
def test_a_prompt_in_layers_with_a_state(family: str, tmp_path: Path) -> None:
    most, given = MIXERS[family]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 4096}
    folder = make_checkpoint(tmp_path / "model", family, num_layers=2, **{**sizes, **given})
    peak = measured(folder, TOKENS // 2, Sampling(), 1, begins=True)
    room = planned(folder, TOKENS // 2, 1) - SMALL_BYTES
    assert 1.0 <= room / peak <= most


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "qwen3_next", "rwkv"])
def test_single_tokens_in_layers_with_a_state(
    family: str, begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the states that sequences keep, which the latest step has made anew.

    Those that begin are computed one by one, and need not be planned for. Where the C library makes
    the states, it needs less.
    """
    monkeypatch.setattr(recurrences, "can_compute", lambda states: False)
    given = {"hidden_size": 256, "intermediate_size": 512, **MIXERS[family][1]}
    folder = make_checkpoint(tmp_path / "model", family, num_layers=2, **given)
    kept = 32 * sum(open_checkpoint(folder).layer_state_bytes("bfloat16"))
    peak = measured(folder, 32, Sampling(), 32, begins=begins) - kept
    room = planned(folder, 32, 32) - SMALL_BYTES
    assert room / peak >= 1.0
    assert begins or room / peak <= 1.6


@pytest.mark.parametrize("sampling", [Sampling(), EVERYTHING], ids=["greedy", "everything"])
@pytest.mark.parametrize("rows", [4, 300])
def test_sampling(rows: int, sampling: Sampling, tmp_path: Path) -> None:
    """With so many rows that they are sampled in blocks, and so few that one row counts."""
    folder = make_checkpoint(
        tmp_path / "model",
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=20_000,
        max_position_embeddings=4096,
    )
    peak = measured(folder, rows, sampling, rows)
    room = planned(folder, rows, rows) - SMALL_BYTES
    assert room / peak >= 1.0
    if sampling is EVERYTHING and rows == 300:
        assert room / peak <= 1.6


def test_blocks_of_rows_give_what_all_give_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 50)
    history = torch.arange(5, dtype=torch.int32).numpy()
    samplings = [
        Sampling(temperature=1.0, seed=row, logprobs=row if row % 3 else None) for row in range(7)
    ]
    rows = [RowToSample(sampling, 5, history, None) for sampling in samplings]
    whole = sample_rows(logits, rows)
    assert whole.logprobs is not None
    assert whole.logprobs.shape == (7, 6)
    monkeypatch.setattr(sampled_rows, "LOGITS_AT_ONCE", 3 * 50)
    for actual, expected in zip(sample_rows(logits, rows), whole, strict=True):
        assert actual is not None
        assert expected is not None
        assert torch.equal(actual, expected)
    greedy = [RowToSample(Sampling(), 5, history, None)] * 7
    assert sample_rows(logits, greedy).token_ids.tolist() == logits.argmax(-1).tolist()
    assert sample_rows(logits, greedy).logprobs is None


def test_a_row_that_fails_in_a_later_block_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_rows, "LOGITS_AT_ONCE", 100)
    history = torch.arange(5, dtype=torch.int32).numpy()
    nothing = torch.zeros(7, dtype=torch.uint8).numpy()
    rows = [RowToSample(Sampling(), 5, history, None)] * 6
    rows[3] = rows[3]._replace(mask=nothing)
    with pytest.raises(RowsFailed) as caught:
        sample_rows(torch.randn(6, 50), rows)
    assert caught.value.rows == (3,)
    assert isinstance(caught.value.error, InvalidRequest)
