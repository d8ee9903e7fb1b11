"""Rotary positions that transformers lets change with the batch are fixed by the served context."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import NO_EPOCH, Epoch
from distributed_llm.coordinator.inspect_model import served_model
from distributed_llm.coordinator.serve import note_on_rope
from distributed_llm.worker.model.empty_model import model_config
from distributed_llm.worker.session.events import Drop, Load, Loaded, Serve
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.driver import Pipeline, load_stages
from tests.model.workers import Cluster, workers
from tests.reference import generated

NEW_TOKENS = 6
TRAINED = 16
"""Positions that the models here were first trained for."""

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.5, 1.1, 1.8, 1.7],
    "long_factor": [2.0, 2.8, 4.3, 2.2],
    "rope_theta": 100.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("phi"),
        "phi3",
        num_layers=2,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=TRAINED,
    )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scales = {"short_mscale": 1.1, "long_mscale": 1.3}
    rope = {**LONGROPE, **scales, "original_max_position_embeddings": TRAINED}
    return make_checkpoint(
        tmp_path_factory.mktemp("mixture"), "phimoe", num_layers=2, rope_parameters=rope
    )


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("dynamic"),
        num_layers=2,
        rope_parameters=DYNAMIC,
        max_position_embeddings=TRAINED,
    )


def transformers_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (n,), generator=draw).tolist() for n in lengths]


def answers(whole: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [generated(whole, prompt, NEW_TOKENS) for prompt in prompts]


def served(folder: Path, prompts: Sequence[Sequence[int]], context: int = 0) -> list[list[int]]:
    checkpoint = open_checkpoint(folder).limited_to(context)
    pipeline = Pipeline(load_stages(checkpoint, [1, 1]))
    pipeline.prefill(prompts, [len(prompt) - 1 for prompt in prompts])
    steps = [pipeline.decode() for _ in range(NEW_TOKENS)]
    return [list(tokens) for tokens in zip(*steps, strict=True)]


@pytest.mark.parametrize("model", ["phi", "mixture"])
def test_long_texts_get_what_transformers_gives_them(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder, prompts = request.getfixturevalue(model), prompts_of((23, 17))
    assert served(folder, prompts) == answers(transformers_model(folder), prompts)


@pytest.mark.parametrize("model", ["phi", "dynamic"])
def test_short_texts_get_what_transformers_gives_them(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder, prompts = request.getfixturevalue(model), prompts_of((3, 10, 5))
    expected = answers(transformers_model(folder), prompts)
    assert served(folder, prompts, context=TRAINED) == expected
    assert served(folder, prompts) != expected  # else nothing here depends on the context


def test_a_text_does_not_depend_on_the_length_of_others(phi: Path) -> None:
    long, short = prompts_of((23, 5))
    assert served(phi, [long, short])[1] == served(phi, [short])[0]


@pytest.mark.parametrize("context", [40, 64])
def test_dynamic_scaling_is_that_of_the_longest_text(dynamic: Path, context: int) -> None:
    whole = transformers_model(dynamic)
    rotary = whole.model.rotary_emb
    rotary.inv_freq = ROPE_INIT_FUNCTIONS["dynamic"](whole.config, seq_len=context)[0]
    rotary.rope_type = "default"  # so that transformers leaves the frequencies alone
    prompts = prompts_of((23, 4))
    assert served(dynamic, prompts, context) == answers(whole, prompts)


@pytest.mark.parametrize("beside", [None, NO_EPOCH])
def test_workers_are_told_the_longest_text(phi: Path, beside: Epoch | None) -> None:
    (prompt,) = prompts_of((8,))
    plan = (("a", (0, 2)),)
    with workers("a") as made:
        cluster = Cluster(phi, plan, made)
        texts = []
        for epoch, context in ((2, TRAINED), (3, 0)):
            order = cluster.order(epoch, (0, 2), beside=beside, context_length=context)
            if beside is not None:
                made["a"].engine.put(Drop())
            made["a"].ask(Load(0, order), Loaded)
            if beside is not None:
                made["a"].engine.put(Serve(Epoch(epoch)))
            cluster.serve_epoch(epoch, plan)
            cluster.prefill([prompt], [len(prompt) - 1])
            texts.append([cluster.decode()[0] for _ in range(NEW_TOKENS)])
    assert texts == [served(phi, [prompt], TRAINED)[0], served(phi, [prompt])[0]]


def test_the_coordinator_serves_no_longer_texts_than_it_is_told(phi: Path) -> None:
    source, checkpoint = ModelSource(kind="folder", name=str(phi)), open_checkpoint(phi)

    def context(**settings: Any) -> int:
        made = served_model(source, checkpoint, CoordinatorSettings(**settings), {})
        return made.defaults.context_length

    assert (context(), context(max_context=9), context(max_context=10**6)) == (256, 9, 256)


def test_people_are_told_which_positions_all_texts_get(phi: Path) -> None:
    checkpoint = open_checkpoint(phi)
    assert f"--max-context {TRAINED}:" in note_on_rope(checkpoint, 256)
    assert note_on_rope(checkpoint, TRAINED) == ""
    usual = replace(checkpoint, config={**checkpoint.config, "rope_parameters": {}})
    assert note_on_rope(usual, 256) == ""


def test_every_scale_of_longrope_is_fixed() -> None:
    """Of this type, transformers takes the factors for short texts whatever their length."""
    scales = {"short_mscale": 1.1, "long_mscale": 1.3}
    rope = {**LONGROPE, **scales, "original_max_position_embeddings": TRAINED}
    config = {
        **{"model_type": "phimoe", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 8},
        **{"num_hidden_layers": 2, "max_position_embeddings": 64, "rope_scaling": rope},
    }
    for context, scale in ((TRAINED, 1.1), (64, 1.3)):
        made: Any = model_config(config, context).rope_parameters
        assert made["short_mscale"] == made["long_mscale"] == scale
        assert made["short_factor"] == made["long_factor"] == LONGROPE["short_factor"]
    assert rope["short_factor"] != rope["long_factor"]


def test_a_fixed_base_stays() -> None:
    """Hunyuan's files say "dynamic" and mean a base that `alpha` makes larger once."""
    rope = {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}
    config = {
        **{"model_type": "hunyuan_v1_dense", "hidden_size": 32, "num_attention_heads": 4},
        **{"num_hidden_layers": 2, "max_position_embeddings": 64, "rope_scaling": rope},
        "vocab_size": 8,
    }
    made: Any = model_config(config).rope_parameters
    assert (made["rope_type"], made["alpha"]) == ("dynamic", 1000.0)
