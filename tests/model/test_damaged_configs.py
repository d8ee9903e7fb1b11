"""Values of a config.json, damaged one at a time: what is wrong with one that is refused is named.

Of any family, with weights or without. Some damages hurt nothing, and then the model is served.
"""

import json
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable, UnsupportedModel
from distributed_llm.common.model_sizes import is_size, positive
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.text_config import text_config
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator import serve
from distributed_llm.worker.model.config_faults import computing
from distributed_llm.worker.model.empty_model import parameters_of
from distributed_llm.worker.model.stage import Stage
from tests import encoder_decoders
from tests.checkpoints import FAMILIES, config_of, make_checkpoint
from tests.damages import HUGE, Json, damaged_values, paths_in, put, verdict
from tests.real_configs import REAL, shrunk

OF_TYPES = ("architectures", "model_type", "is_encoder_decoder")
"""Names of values that tell what a model is."""

SAMPLE = (
    *("gemma4_text", "gemma3n_text", "qwen3_next", "kimi_linear", "mamba2", "jamba", "nemotron_h"),
    *("lfm2", "gpt2", "deepseek_v3", "gpt_oss", "llama4_text"),
)
"""Families of which some damages are tried in every run of the suite; `make chaos` tries all."""

ABSENT = object()
IMPOSSIBLE: tuple[object, ...] = ("damaged", -1, HUGE, [], {})
"""What is hardly ever the value of anything, so that its name is in whatever is said against it.

Of what is empty, another value may be told that does not fit it.
"""

_NAMED = re.compile(
    r"\b\w+ ?= ?|\w+, which it lacks|config.json says|lacks tensor|has none of|\btells? "
)


def damages(config: Json, numbers: random.Random) -> Iterator[tuple[str, object]]:
    """Yield names of values, and what stands there instead; each name once for each damage."""
    for name, value in config.items():
        if name not in OF_TYPES:
            yield from ((name, other) for other in (*damaged_values(value, numbers), ABSENT))


def config_with(config: Json, name: str, value: object) -> Json:
    rest = {one: told for one, told in config.items() if one != name}
    return rest if value is ABSENT else {**rest, name: value}


def json_of(family: str) -> Json:
    """Return the config.json of a small model."""
    made = encoder_decoders.config_of if family in encoder_decoders.SETTINGS else config_of
    content: Json = json.loads(made(family).to_json_string(use_diff=False))
    return {**content, "model_type": family}


def plan_of(config: Json, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    workers, settings = ["pc=64GiB"], CoordinatorSettings()
    serve.plan(
        *(str(folder), workers, settings),
        parameters_of=parameters_of,
        check_loading=Stage.check_loading,
    )


@pytest.mark.parametrize("family", [*FAMILIES, *encoder_decoders.SETTINGS])
def test_a_value_that_is_refused_is_named(
    family: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    config, numbers = json_of(family), random.Random(family)
    plan_of(config, tmp_path)
    tried = list(damages(config, numbers))
    if not pytestconfig.getoption("--schedules"):
        tried = numbers.sample(tried, 12 if family in SAMPLE else 1)
    for name, value in tried:
        said = verdict(partial(plan_of, config_with(config, name, value), tmp_path), tmp_path)
        told = name in said if value in IMPOSSIBLE and value else _NAMED.search(said)
        assert not said or told, (name, value, said)


HIDDEN: list[tuple[str, tuple[str, ...], object]] = [
    ("qwen4_exp_text", ("indexer_budget",), ABSENT),
    ("gpt_neox", ("num_attention_heads",), 5),
    ("gpt-sw3", ("n_head",), 5),
    ("olmo_hybrid", ("layer_types",), []),
    ("bamba", ("mamba_d_head",), "damaged"),
    ("longcat_flash", ("moe_topk",), HUGE),
    ("longcat_flash", ("zero_expert_num",), HUGE),
    ("kimi_linear", ("num_shared_experts",), "damaged"),
    ("llama4_text", ("layer_types",), "damaged"),
    ("zamba", ("layers_block_type",), ABSENT),
    ("zamba", ("layers_block_type",), None),
    ("gemma3_text", ("rope_parameters", "sliding_attention", "rope_type"), "damaged"),
    ("gemma4_text", ("rope_parameters", "full_attention", "rope_type"), "yarn"),
    ("t5gemma2", ("decoder", "rope_parameters", "full_attention", "rope_type"), "damaged"),
    ("mvp", ("d_model",), -1),
    ("mvp", ("decoder_ffn_dim",), "damaged"),
    ("mvp", ("decoder_start_token_id",), HUGE),
    ("switch_transformers", ("encoder_sparse_step",), []),
    ("t5gemma2", ("decoder",), []),
    ("t5gemma2", ("encoder", "text_config"), "damaged"),
    ("t5gemma2", ("encoder", "text_config", "vocab_size"), -1),
    ("t5gemma2", ("encoder", "text_config", "rope_parameters"), "damaged"),
]


@pytest.mark.parametrize(("family", "path", "value"), HIDDEN)
def test_a_value_that_is_hidden_is_named(
    family: str, path: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    """Where transformers names none, or another; and what is right goes without blame."""
    config = json_of(family)
    damaged = config_with(config, path[0], value) if len(path) == 1 else put(config, path, value)
    said = verdict(partial(plan_of, damaged, tmp_path), tmp_path)
    assert path[-1] in said
    assert "chunk_size_feed_forward" not in said


def test_a_choice_is_no_size() -> None:
    assert is_size("moe_topk")
    assert not is_size("topk_method")


def test_a_dtype_of_a_part_that_is_none_hurts_nothing(tmp_path: Path) -> None:
    """As that of a whole model: weights have their own."""
    plan_of(put(json_of("t5gemma2"), ("encoder", "text_config", "dtype"), "damaged"), tmp_path)


PUBLISHED = [name for name in REAL if "Phi-4" not in name]  # whose factors fit no smaller heads


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_value_within_others_is_named(
    model: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Of the text model among other parts, and of rotary positions."""
    config, numbers = shrunk(REAL[model]), random.Random(model)
    plan_of(config, tmp_path)
    places = [
        path
        for path in paths_in(config)
        if path[0] not in ("vision_config", "audio_config") and path[-1] not in OF_TYPES
        if len(path) > 1 or isinstance(config[path[0]], dict)
    ]
    if not pytestconfig.getoption("--schedules"):
        places = numbers.sample(places, min(len(places), 4))
    for path in places:
        for value in IMPOSSIBLE:
            damaged = put(config, path, value)
            said = verdict(partial(plan_of, damaged, tmp_path), tmp_path) if value != {} else ""
            assert not said or path[-1] in said, (path, value, said)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", ["damaged", 7, []])
def test_a_part_that_is_none(part: str, value: object) -> None:
    config = {"model_type": "gemma3", "text_config": {}, part: value}
    with pytest.raises(CheckpointError, match=f"{part} = .*; it must be an object, which"):
        text_config(config)


LOADED: dict[str, tuple[str, object, str]] = {
    "deepseek_v3": ("n_group", -1, "it fails where it reads n_group = -1"),
    "mamba2": ("time_step_limit", [], r"time_step_limit = \[\]"),
    "qwen3_next": ("num_experts_per_tok", ABSENT, "num_experts_per_tok, which it lacks"),
    "gemma4_text": ("sliding_window", 0, "sliding_window = 0; it must be above 0"),
    "llama": ("hidden_act", "relu7", "hidden_act = 'relu7'"),
}


@pytest.mark.parametrize("family", LOADED)
def test_a_value_that_shows_when_something_is_computed(family: str, tmp_path: Path) -> None:
    """It is an error that lasts, so that nobody loads the layers again and again."""
    name, value, words = LOADED[family]
    path = make_checkpoint(tmp_path, family) / "config.json"
    path.write_text(json.dumps(config_with(json.loads(path.read_text()), name, value)))

    def load() -> None:
        checkpoint = open_checkpoint(tmp_path)
        layers, cpu = LayerRange(0, checkpoint.num_layers), torch.device("cpu")
        Stage.load(checkpoint, layers, device=cpu, dtype=torch.float32)

    with pytest.raises(CheckpointError, match=words) as caught:
        load()
    assert not isinstance(caught.value, UnsupportedModel | CheckpointUnavailable)


def test_what_this_package_raises_is_passed_on() -> None:
    with pytest.raises(CheckpointError, match="has none of"), computing(json_of("llama")):
        positive({}, "num_hidden_layers")
