"""Split models answer what transformers answers: for every family, token for token.

The reference is transformers alone: `generate`, and a whole forward, on each text by itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.architectures import VERIFIED, check_architecture
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.layer_sharing import pieces, uncut
from distributed_llm.common.layer_windows import layer_windows
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.kv.cache import as_token_ids
from distributed_llm.worker.model.sampler import sample
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import FAMILIES, VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU, GREEDY, Pipeline, load_stages
from tests.model.raw_outputs import answer, other_default_dtype, same
from tests.reference import generated
from tests.wholes import WHOLES

LENGTHS = (23, 3, 12)
"""Lengths of the prompts: longer than, shorter than and twice the sliding windows in FAMILIES."""
CHUNKS = (8, 1, 4)
SHARED = 16
"""Positions that a fourth text has in common with the first prompt; a chunk ends there."""
NEW_TOKENS = 6
NUM_LAYERS = {"gemma3n_text": 4, "nemotron_h": 4}
"""Where it takes more than 3 layers to have one of each kind, or 3 are something else."""
NO_TOKENS = as_token_ids(())
HOT = tuple(Sampling(temperature=2.0, seed=seed) for seed in (1, 2))
"""They tell nearly equal logits apart."""

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
        {
            "q_lora_rank": None,
            "rope_interleave": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "falcon-grouped": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_key_value_heads": 2},
    ),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "hidden_size": 64}),
    "gemma4-global-heads": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4-experts": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "zaya-windows": (
        "zaya",
        {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 5},
    ),
    "opt-norm-last": ("opt", {"do_layer_norm_before": False, "seed": 4}),
}


def numbers(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()
    return found


PROMPTS = [numbers(length, length) for length in LENGTHS]
CHILD = [*PROMPTS[0][:SHARED], *numbers(4, 1)]


class Expected:
    """What transformers makes of the texts: the prompts, and the one that shares a prefix."""

    def __init__(self, whole: Any) -> None:
        self.prompts = [*PROMPTS, CHILD]
        self.answers = [generated(whole, prompt, NEW_TOKENS) for prompt in self.prompts]
        texts = [p + a for p, a in zip(self.prompts, self.answers, strict=True)]
        with torch.inference_mode():
            self._logits = [whole(torch.tensor([t]), use_cache=False).logits[0] for t in texts]

    def sampled(self, ends: list[tuple[int, int]], sampling: Sampling) -> list[int]:
        """Return what follows the first `length` tokens of text `number`, for each (both)."""
        rows = torch.stack([self._logits[number][length - 1] for number, length in ends])
        lengths = [length for _, length in ends]
        found = sample(rows, [sampling] * len(ends), lengths, [NO_TOKENS] * len(ends))
        return [int(token) for token in found]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    """Greedy and sampled; in 1 to 3 stages; texts of different lengths, in chunks, and shared."""
    family, settings = VARIANTS[variant]
    count = NUM_LAYERS.get(family, 3)
    made: Any = {"num_layers": count, **settings}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, **made))
    made.pop("max_shard_size", None)
    expected = Expected(build_model(family, **made))
    whole, halves = load_stages(checkpoint, [count]), load_stages(checkpoint, [1, count - 1])
    check_kv_bytes(whole[0], checkpoint)
    check_default_dtype(whole[0])
    check_tokens("1 stage", whole, expected, ())
    check_tokens("2 stages", halves, expected, HOT)
    halves[0].reset()
    rest = [
        Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32)
        for layers in pieces(count, uncut(checkpoint.config, count))[1:]
    ]
    check_tokens("as many stages as may be", [halves[0], *rest], expected, ())
    assert len({token for answer in expected.answers for token in answer}) > 1


def check_kv_bytes(stage: Stage, checkpoint: Checkpoint) -> None:
    planned = sum(checkpoint.layer_kv_bytes("float32"))
    assert stage.kv_bytes_per_token == planned, "planned bytes of KV cache"
    assert stage.state_bytes == sum(checkpoint.layer_state_bytes("float32")), "planned states"
    windows = layer_windows(checkpoint.config, checkpoint.num_layers)
    places = len(stage._cache.windows) // checkpoint.num_layers
    planned_windows = [window for window in windows for _ in range(places)]
    assert [*stage._cache.windows] == planned_windows, "planned windows of layers"


def check_default_dtype(stage: Stage) -> None:
    """Whoever builds a model in another thread changes it for the whole process."""
    before = answer(stage)
    with other_default_dtype():
        meanwhile = answer(stage)
    assert same(meanwhile, before)


def check_tokens(
    name: str, stages: list[Stage], expected: Expected, samplings: tuple[Sampling, ...]
) -> None:
    """Compare chunks of prompts, then a text that shares a prefix, then answers."""
    pipeline = Pipeline(stages)
    most = [len(prompt) - 1 for prompt in PROMPTS]
    while chunks := [
        (i, start, min(stop, most[i]))
        for i, start, stop in pipeline.next_chunks(PROMPTS, CHUNKS)
        if start < most[i]
    ]:
        for sampling in (*samplings, GREEDY):
            ends = [(i, stop) for i, _, stop in chunks]
            found = pipeline.run(chunks, sampling, snapshot=True)
            assert found == expected.sampled(ends, sampling), f"{name}: chunks {chunks}, {sampling}"
    child = pipeline.share(0, SHARED, CHILD[SHARED:])
    pipeline.run([(child, SHARED, len(CHILD) - 1)], None)
    answers = expected.answers
    for step in range(NEW_TOKENS):
        chunks = [(i, pipeline.done[i], len(text)) for i, text in enumerate(pipeline.texts)]
        ends = [(i, stop) for i, _, stop in chunks]
        for sampling in samplings:
            found = pipeline.run(chunks, sampling)
            assert found == expected.sampled(ends, sampling), f"{name}: token {step}, {sampling}"
        found = pipeline.run(chunks)
        wanted = [answer[step] for answer in answers]
        assert found == wanted, f"{name}: greedy token {step} of long, short, middle, shared text"
        for text, token in zip(pipeline.texts, found, strict=True):
            text.append(token)


def test_every_family_here_is_called_verified_and_no_other() -> None:
    parts = {text for text, _, _ in WHOLES.values()}
    assert {family for family, _ in VARIANTS.values()} | parts == VERIFIED


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"alibi": True}),
        ("xlnet", {}),
        ("whisper", {}),
        ("mllama", {}),
        ("gemma", {"part_of": "paligemma"}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64}),
        ("phimoe", {"sliding_window": 64, "max_position_embeddings": 128}),
        ("bert", {}),
        ("roberta", {"is_decoder": True}),
    ],
)
def test_what_is_known_to_be_wrong_is_refused(family: str, settings: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{family}',? is not supported: .+Use "):
        check_architecture({"model_type": family, **settings})


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"is_decoder": True}),
        ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 64}),
        ("phimoe", {"sliding_window": 131072, "max_position_embeddings": 131072}),
        ("gemma4_text", {"use_bidirectional_attention": "vision"}),
        ("phi3", {"rope_scaling": {"type": "longrope"}}),
        ("phi", {"auto_map": {"AutoModelForCausalLM": "modeling.Phi"}}),
    ],
)
def test_what_is_known_to_be_right_is_not_refused(family: str, settings: dict[str, object]) -> None:
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
