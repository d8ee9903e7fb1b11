"""Model types that stand in no table are checked with a small model before they are served."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model import architectures
from distributed_llm.worker.model.architectures import ensure_supported, shrink_config
from distributed_llm.worker.model.stage import Stage


def config_of(model_type: str, **settings: Any) -> dict[str, Any]:
    config: dict[str, Any] = CONFIG_MAPPING[model_type](**settings).to_dict()
    return {**config, "model_type": model_type}


def checkpoint_of(model_type: str) -> Checkpoint:
    return Checkpoint(Path("nowhere"), config_of(model_type), {})


@pytest.mark.parametrize("model_type", ["olmo3", "persimmon", "biogpt", "glm4_moe"])
def test_a_type_that_works_passes(model_type: str) -> None:
    Stage.ensure_supported(checkpoint_of(model_type))


def test_keys_and_values_are_counted_as_they_are_kept() -> None:
    held = []

    def load(checkpoint: Checkpoint, layers: LayerRange, **settings: Any) -> Stage:
        stage = Stage.load_unchecked(checkpoint, layers, **settings)
        counted = sum(checkpoint.layer_kv_bytes("float32")[layers.start : layers.stop])
        held.append((counted, stage.kv_bytes_per_token))
        return stage

    ensure_supported(checkpoint_of("glm4_moe"), load)
    assert held
    assert all(counted == kept for counted, kept in held)


def test_of_deepseeks_attention_the_latents_are_counted() -> None:
    """512 numbers and 64 that all heads share, not the keys and values of 128 heads."""
    checkpoint = checkpoint_of("deepseek_v3")
    assert set(checkpoint.layer_kv_bytes("bfloat16")) == {2 * (512 + 64)} == {1152}
    assert set(checkpoint.layer_kv_bytes("bfloat16", "int8")) == {512 + 2 + 64 + 2}


@pytest.mark.parametrize(
    "model_type", ["diffllama", "gpt_neox_japanese", "doge", "bert", "rembert", "xlnet"]
)
def test_a_type_that_does_not_work_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{model_type}' is not supported: .+Use a model"):
        Stage.ensure_supported(checkpoint_of(model_type))


def test_a_wrong_answer_is_refused() -> None:
    class Inexact(Stage):
        def run(self, sequences: Any, token_ids: Any, hidden_states: Any, *masks: Any) -> Any:
            if hidden_states is not None:
                hidden_states = hidden_states * 1.05
            return super().run(sequences, token_ids, hidden_states, *masks)

    with pytest.raises(UnsupportedModel, match="gave other tokens"):
        ensure_supported(checkpoint_of("olmo3"), Inexact.load_unchecked)


def test_a_covered_type_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_self_check", None)
    Stage.ensure_supported(checkpoint_of("llama"))


def test_a_small_config_keeps_the_structure() -> None:
    config = config_of("gemma3_text", num_hidden_layers=12)
    small = shrink_config(config)
    assert small["num_hidden_layers"] == 6
    assert small["layer_types"] == config["layer_types"][:6]
    assert len(set(small["layer_types"])) == 2
    assert small["hidden_size"] < 100
    assert torch.tensor(small["sliding_window"]) == 5
