"""Latent attention of single tokens by the C library, against the same in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.model import token_attention
from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.kernels.native import latents, library
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring
from tests.checkpoints import make_checkpoint
from tests.model.test_latents import NUM_LAYERS, TEXT, error, last_states

pytestmark = pytest.mark.skipif(
    native.instructions() == "none", reason="the C library was not built here"
)

KEY_DIM, VALUE_DIM, SHARED_DIM, RANK = 24, 40, 32, 64
"""So that the processor's instructions for pairs of bfloat16 are used, if there are any."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: Any = {
        "kv_lora_rank": RANK,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 32,
        "v_head_dim": 8,
    }
    return make_checkpoint(
        tmp_path_factory.mktemp("youtu"), "youtu", num_layers=NUM_LAYERS, **sizes
    )


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("tokens", [1, 4, 7, 16])
def test_products_with_latents(tokens: int) -> None:
    """Of queries and results that lie otherwise than they are read; in threads."""
    heads = 3
    weight = drawn(heads, KEY_DIM + VALUE_DIM, RANK)
    queries = drawn(tokens, heads, KEY_DIM + SHARED_DIM).transpose(0, 1)
    attended = drawn(heads, tokens, RANK).transpose(0, 1)
    assert latents.can_multiply(queries, weight, KEY_DIM, VALUE_DIM, queries.shape[-1])
    own, shared = queries.double().tensor_split((KEY_DIM,), dim=-1)
    of_keys, of_values = weight.double().tensor_split((KEY_DIM,), dim=1)
    scoring = torch.cat((shared, own @ of_keys), dim=-1)
    values = torch.einsum("thr,hvr->thv", attended.double(), of_values)
    for actual, expected in (
        (latents.absorbed(queries, weight, KEY_DIM), scoring),
        (latents.values(attended, weight, KEY_DIM), values),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-4)


def test_more_tokens_and_other_dimensions_are_left_to_torch() -> None:
    weight = drawn(2, KEY_DIM + VALUE_DIM, RANK)
    assert latents.can_multiply(drawn(2, 16, KEY_DIM), weight)
    assert not latents.can_multiply(drawn(2, 17, KEY_DIM), weight)
    assert not latents.can_multiply(drawn(2, 16, KEY_DIM), weight, KEY_DIM + 4)
    assert not latents.can_multiply(drawn(2, 16, KEY_DIM).float(), weight)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("instructions", ["avx2", native.instructions()])
@pytest.mark.parametrize(("kv_dtype", "most"), [("auto", 0.006), ("int8", 0.02), ("fp8", 0.06)])
def test_tokens_attend_to_latents(
    kv_dtype: KVDtype,
    most: float,
    instructions: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two texts, one of a few whole pieces and some positions, with sinks; heads in pieces."""
    monkeypatch.setattr(library, "instructions", lambda: instructions)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lengths, heads, cache = (77, 3), 9, KVCache(1, kv_dtype=kv_dtype)
    held = []
    for one, length in enumerate(lengths):
        shared, rows = drawn(1, length, SHARED_DIM), drawn(1, length, RANK)
        cache.begin(SequenceId(one), 0, np.ones(length, dtype=np.int32))
        cache.append(0, SequenceId(one), 0, shared[:, :-1], rows[:, :-1])
        cache.commit(SequenceId(one), length - 1)
        cache.begin(SequenceId(one), length - 1, np.ones(1, dtype=np.int32))
        held.append((shared, rows))
    slices = [PackedSlice(SequenceId(n), length - 1, n, 1) for n, length in enumerate(lengths)]
    step = PackedStep(cache, 0, tuple(slices), [0])
    queries, sinks = drawn(heads, len(lengths), SHARED_DIM + RANK), drawn(heads)
    key, value = (torch.cat([kept[which][:, -1:] for kept in held], dim=1) for which in (0, 1))
    scoring = Scoring(0.2, 0, None, sinks)
    actual = token_attention.attend_tokens(step, 0, queries, key, value, scoring)
    for one, (shared, rows) in enumerate(held):
        keys, values = torch.cat((shared, rows), dim=-1)[0].double(), rows[0].double()
        scores = torch.cat((0.2 * queries[:, one].double() @ keys.T, sinks[:, None].double()), -1)
        expected = scores.softmax(dim=-1)[:, :-1] @ values
        assert error(actual[one].double(), expected) < most


def test_decoding_rounds_as_transformers_does(
    folder: Path, checkpoint: Checkpoint, whole: Any
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    inputs = {"input_ids": torch.tensor([TEXT]), "use_cache": False, "output_hidden_states": True}
    with torch.inference_mode():
        exact, reference = (
            model(**inputs).hidden_states[NUM_LAYERS - 1][0].float() for model in (whole, theirs)
        )
    ours = last_states(checkpoint, dtype=torch.bfloat16)
    assert 0 < error(ours, exact) < 1.3 * error(reference, exact)
