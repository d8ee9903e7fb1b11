"""Scaled rotary positions give the context that publishers promise, and the tokens of transformers.

The settings are those of published checkpoints, with lengths divided by 512: trained on 64 tokens,
scaled to 256.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import ContextLengthExceeded
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_sizes import context_length
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.coordinator.inspect_model import served_model
from distributed_llm.coordinator.requests.parameters import resolve
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.driver import Pipeline, load_stages

TRAINED, SCALED = 64, 256
YARN = {"factor": 4.0, "original_max_position_embeddings": TRAINED}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BY_LAYER = {
    "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, **YARN},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

AS_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-yarn-by-type": ("qwen2", {"rope_scaling": {"type": "yarn", **YARN}}),
    "qwen3-yarn": ("qwen3", {"rope_scaling": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}),
    "yarn-without-original": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "yarn-scaled-length-given": (
        "gpt_oss",
        {
            "max_position_embeddings": SCALED,
            "rope_scaling": {"rope_type": "yarn", "truncate": False, **YARN},
        },
    ),
    "llama3-scaled-length-given": (
        "llama",
        {"max_position_embeddings": SCALED, "rope_scaling": {**LLAMA3, "factor": 2.0}},
    ),
    "llama3": ("llama", {"rope_scaling": LLAMA3}),
    "linear-by-type": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "yarn-in-new-words": (
        "mistral",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN},
        },
    ),
}


@pytest.fixture(scope="module", params=AS_PUBLISHED)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, published = AS_PUBLISHED[request.param]
    folder = make_checkpoint(tmp_path_factory.mktemp("long"), family, num_layers=2)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    content = {**config, "max_position_embeddings": TRAINED, "rope_theta": 1e4, **published}
    (folder / "config.json").write_text(json.dumps(content))
    return open_checkpoint(folder)


def test_the_context_is_as_long_as_promised(checkpoint: Checkpoint) -> None:
    source = ModelSource(kind="folder", name=str(checkpoint.folder))
    defaults = served_model(source, checkpoint, CoordinatorSettings(), {}).defaults
    assert defaults.context_length == SCALED
    params = SamplingParams(max_new_tokens=56)
    resolve(params, defaults, prompt_tokens=200, kv_tokens=10_000, seed=0)
    with pytest.raises(ContextLengthExceeded, match="context length is 256"):
        resolve(params, defaults, prompt_tokens=201, kv_tokens=10_000, seed=0)


def test_far_tokens_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(VOCAB_SIZE, (SCALED - 20,), generator=generator).tolist()
    expected = generated(checkpoint.folder, prompt)
    pipeline = Pipeline(load_stages(checkpoint, [1, 1]))
    pipeline.prefill([prompt], [len(prompt) - 1])
    assert [pipeline.decode()[0] for _ in expected] == expected
    config = json.loads((checkpoint.folder / "config.json").read_text())
    del config["rope_parameters" if "rope_parameters" in config else "rope_scaling"]
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    assert generated(checkpoint.folder, prompt) != expected  # the scaling shows


def generated(folder: Path, prompt: list[int]) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(answer[0, len(prompt) :].tolist())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": BY_LAYER}, 256),
        ({"rope_scaling": None}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 256),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, 64),
        ({"original_max_position_embeddings": 16, "rope_scaling": {"type": "longrope"}}, 64),
        (
            {"original_max_position_embeddings": 16, "rope_scaling": {"type": "su", "factor": 32}},
            64,
        ),
        ({"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}}, 64),
        ({"rope_scaling": {"type": "yarn"}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": 1e9}}, 2**31 - 1),
        ({"original_max_position_embeddings": 32, "rope_scaling": {"type": "yarn", **YARN}}, 128),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
    ],
)
def test_what_else_a_config_may_say(config: dict[str, Any], expected: int) -> None:
    assert context_length({"max_position_embeddings": TRAINED, **config}) == expected


def test_a_model_that_names_no_limit() -> None:
    assert context_length({}) == 2048
