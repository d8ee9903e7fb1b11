"""Split models answer what transformers answers: for every family, token for token.

The reference is transformers alone: `generate`, and a whole forward, on each prompt by itself.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.architectures import VERIFIED, check_architecture
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.kv.cache import as_token_ids
from distributed_llm.worker.model.sampler import sample
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.model.driver import CPU, Pipeline

LENGTHS = (23, 3, 12)
"""Lengths of the prompts: longer than, shorter than and twice the sliding windows in FAMILIES."""
CHUNKS = (5, 2, 4)
NEW_TOKENS = 8
NUM_LAYERS = 4
NO_TOKENS = as_token_ids(())
SPLITS = ([4], [1, 3], [2, 1, 1], [1, 1, 1, 1])

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-tied": ("llama", {"tie": True}),
    "llama-sharded": ("llama", {"max_shard_size": "20KB"}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2-no-window": ("qwen2", {"use_sliding_window": False}),
    "gpt2-scaled-by-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "deepseek_v3-one-query-matrix": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False},
    ),
    "opt-norm-last": ("opt", {"do_layer_norm_before": False, "seed": 4}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, settings = VARIANTS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(path, family, num_layers=NUM_LAYERS, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def generated(whole: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return what `generate` adds to each prompt."""
    return [
        whole.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


class Stages:
    """Stages of one checkpoint: what several splits have in common is loaded once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._load = cache(
            lambda layers: Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32)
        )

    def pipeline(self, split: Sequence[int]) -> Pipeline:
        """Return stages of `split[i]` layers each, with nothing in their KV cache."""
        edges = (0, *accumulate(split))
        assert edges[-1] == NUM_LAYERS
        stages = [self._load(LayerRange(*pair)) for pair in pairwise(edges)]
        for stage in stages:
            stage.reset()
        return Pipeline(stages)


@pytest.fixture(scope="module")
def stages(checkpoint: Checkpoint) -> Stages:
    return Stages(checkpoint)


def test_keys_and_values_are_counted_as_they_are_kept(
    stages: Stages, checkpoint: Checkpoint
) -> None:
    config = dict(checkpoint.config)
    if config["model_type"] in ("gpt2", "gpt_neox", "opt"):
        del config["num_key_value_heads"]  # never in their files; here all families are given it
    told = Checkpoint(checkpoint.folder, config, {})
    planned = sum(told.layer_kv_bytes("float32"))
    (stage,) = stages.pipeline([NUM_LAYERS]).stages
    assert stage.kv_bytes_per_token == planned
    assert stage.state_bytes == sum(told.layer_state_bytes("float32"))


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"{len(split)}stages")
def test_greedy_tokens_equal_those_of_generate(
    stages: Stages, generated: list[list[int]], prompts: list[list[int]], split: list[int]
) -> None:
    pipeline = stages.pipeline(split)
    pipeline.prefill(prompts, [len(prompt) - 1 for prompt in prompts])
    for step in range(NEW_TOKENS):
        assert pipeline.decode() == [tokens[step] for tokens in generated]
    assert len({token for tokens in generated for token in tokens}) > 2


def test_chunks_of_prompts_mixed_with_each_other_give_the_whole_forward(
    stages: Stages, whole: Any, prompts: list[list[int]]
) -> None:
    """Sample after every chunk, and not only the likeliest: it tells nearly equal logits apart."""
    pipeline = stages.pipeline([1, 2, 1])
    with torch.inference_mode():
        logits = [
            whole(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts
        ]
    seen = set()
    while chunks := pipeline.next_chunks(prompts, CHUNKS):
        rows = torch.stack([logits[sequence][stop - 1] for sequence, _, stop in chunks])
        stops = [stop for _, _, stop in chunks]
        for sampling in (Sampling(), *(Sampling(temperature=2.0, seed=seed) for seed in (1, 2))):
            expected = sample(rows, [sampling] * len(rows), stops, [NO_TOKENS] * len(rows))
            assert pipeline.run(chunks, sampling) == expected.tolist()
            seen.update(expected.tolist())
    assert len(seen) > 10


def test_every_family_here_is_called_verified_and_no_other() -> None:
    assert {family for family, _ in VARIANTS.values()} == VERIFIED


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bloom", {}),
        ("falcon", {"alibi": True}),
        ("falcon", {"alibi": False}),
        ("gptj", {}),
        ("gpt_neo", {}),
        ("codegen", {}),
        ("mpt", {}),
        ("recurrent_gemma", {}),
        ("zamba2", {}),
        ("t5", {}),
        ("gemma3", {"text_config": {}}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("phi3", {"rope_scaling": {"type": "longrope"}}),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}),
    ],
)
def test_what_is_known_to_be_wrong_is_refused(family: str, settings: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{family}' is not supported: .+Use "):
        check_architecture({"model_type": family, **settings})


def test_a_type_that_transformers_does_not_know_is_refused() -> None:
    checkpoint = Checkpoint(Path("nowhere"), {"model_type": "llama9"}, {})
    with pytest.raises(UnsupportedModel, match="does not know the model type 'llama9'"):
        Stage.ensure_supported(checkpoint)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_what_is_no_decoder_is_refused(family: str) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16}
    checkpoint = Checkpoint(Path("nowhere"), {"model_type": family, **sizes}, {})
    with pytest.raises(UnsupportedModel):
        Stage.ensure_supported(checkpoint)
