"""A plan from config.json alone is that of the whole checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.other_formats import INDEX_NAME
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.coordinator import serve
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from distributed_llm.worker.model.empty_model import parameters_of
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.unit.made_tokenizers import byte_level, save

WORKERS = ("pc=9160KiB", "mac=9160KiB")


def plan(model: Path) -> Any:
    return serve.plan(
        *(str(model), WORKERS, CoordinatorSettings()),
        parameters_of=parameters_of,
        check_loading=Stage.check_loading,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_is_that_of_the_checkpoint(tmp_path: Path, family: str) -> None:
    whole = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=4))
    described = Checkpoint(tmp_path, whole.config, parameters_of(whole.config))
    assert described.dtype == whole.dtype
    for dtype in ("float32", "bfloat16"):
        assert model_cost(described, dtype) == model_cost(whole, dtype)


@pytest.mark.parametrize("tie", [True, False])
def test_the_plan_is_that_of_the_checkpoint(tmp_path: Path, tie: bool) -> None:
    folder = make_checkpoint(tmp_path / "whole", tie=tie, max_shard_size="60KB")
    whole = plan(folder)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", INDEX_NAME):
        (bare / name).write_bytes((folder / name).read_bytes())
        described = plan(bare)
        assert described.plans == whole.plans
        assert described.cost == whole.cost
        assert described.assumed == ("weights as config.json describes them", *whole.assumed)
    assert plan(bare / "config.json") == described
    assert plan(folder / "config.json") == described


@pytest.mark.parametrize("changes", [{"dtype": None}, {"dtype": "float8_e4m3fn"}])
def test_a_dtype_that_is_not_named_or_not_computed_in(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = json.loads((make_checkpoint(tmp_path) / "config.json").read_text()) | changes
    assert {tensor.dtype for tensor in parameters_of(config).values()} == {"F32"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi": True}, "ALiBi"),
        ({"model_type": "nonesuch"}, "does not know the model type"),
        ({"model_type": "vit"}, "no language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    ],
)
def test_what_could_not_be_served_is_not_planned(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = make_checkpoint(tmp_path) / "config.json"
    (tmp_path / "model.safetensors").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UnsupportedModel, match=words):
        plan(tmp_path)


IMPOSSIBLE = {
    "num_hidden_layers = -1; it must be above 0": {"num_hidden_layers": -1},
    "num_hidden_layers = 1000000000; it must be at most 4,096": {"num_hidden_layers": 10**9},
    "hidden_size = 1099511627776; it must be at most": {"hidden_size": 2**40},
    "vocab_size = 0; it must be above 0": {"vocab_size": 0},
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
@pytest.mark.parametrize("with_weights", [True, False], ids=["with weights", "config alone"])
def test_a_config_with_an_impossible_value(tmp_path: Path, words: str, with_weights: bool) -> None:
    """Before memory is taken for it."""
    path = make_checkpoint(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    if not with_weights:
        (tmp_path / "model.safetensors").unlink()
    path.write_text(json.dumps(config | IMPOSSIBLE[words]))
    read = serve.open_model if with_weights else lambda model, _: plan(Path(model))
    with pytest.raises(CheckpointError, match=words):
        read(str(tmp_path), CoordinatorSettings())
    path.write_text(json.dumps(config))
    assert plan(tmp_path)


def test_weights_that_could_not_be_loaded_are_not_planned(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"_proj.weight has shape .* config.json says .*64"):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{}", r"tokenizer.json cannot be read .*Model missing"),
        ("tokenizer_config.json", '{"eos_token": 7}', r"eos_token.*tokenizer.json, tokenizer_conf"),
    ],
)
@pytest.mark.parametrize("with_weights", [True, False], ids=["with weights", "config alone"])
def test_a_tokenizer_that_a_coordinator_would_refuse_is_refused(
    tmp_path: Path, name: str, content: str, words: str, with_weights: bool
) -> None:
    """In the words that it would use."""
    save(make_checkpoint(tmp_path), byte_level())
    (tmp_path / name).write_text(content)
    if not with_weights:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as by_coordinator:
        Tokenizer.open(tmp_path)
    with pytest.raises(CheckpointError, match=words) as by_plan:
        plan(tmp_path)
    assert str(by_plan.value) == str(by_coordinator.value)


def test_a_plan_knows_the_tokenizer(tmp_path: Path) -> None:
    """Or that there is none; then prompts are token ids, as for a coordinator."""
    assert plan(make_checkpoint(tmp_path)).plans
    save(tmp_path, byte_level())
    assert plan(tmp_path).plans
