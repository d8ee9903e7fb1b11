"""Kimi K2 is a DeepSeek V3 whose config.json names a type, and code, of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed_llm.common.architectures import check_architecture
from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.coordinator import serve
from distributed_llm.worker.model.empty_model import parameters_of
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import make_checkpoint
from tests.model.driver import Pipeline, load_stages
from tests.wholes import edit_config

NEW_TOKENS = 5
PROMPT = list(range(3, 20))
OF_KIMI = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A checkpoint as Kimi K2's, and what transformers generated with it as a DeepSeek V3."""
    folder = make_checkpoint(tmp_path_factory.mktemp("kimi"), "deepseek_v3", num_layers=2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    edit_config(folder, lambda config: config | OF_KIMI)
    return folder, made[0, len(PROMPT) :].tolist()


def test_its_tokens_are_those_of_deepseek_v3(expected: tuple[Path, list[int]]) -> None:
    folder, tokens = expected
    checkpoint = open_checkpoint(folder)
    check_architecture(checkpoint.config)
    pipeline = Pipeline(load_stages(checkpoint, [1, 1]))
    pipeline.prefill([PROMPT], [len(PROMPT) - 1])
    assert [pipeline.decode()[0] for _ in range(NEW_TOKENS)] == tokens


def test_it_is_planned(expected: tuple[Path, list[int]]) -> None:
    folder, _ = expected
    planned = serve.plan(
        *(str(folder), ["pc=1GiB"], CoordinatorSettings()),
        parameters_of=parameters_of,
        check_loading=Stage.check_loading,
    )
    assert planned.plans
