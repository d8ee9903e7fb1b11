"""Model types that stand in no table are checked with a small model before they are served."""

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from distributed_llm.common.architectures import VERIFIED
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.config_defaults import generates_text, has_type
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.worker.model import architectures
from distributed_llm.worker.model.architectures import ensure_supported
from distributed_llm.worker.model.small_config import LONG_TEXT, shrink_config
from distributed_llm.worker.model.stage import Stage


def config_of(model_type: str, **settings: Any) -> dict[str, Any]:
    config: dict[str, Any] = CONFIG_MAPPING[model_type](**settings).to_dict()
    return {**config, "model_type": model_type}


def checkpoint_of(model_type: str) -> Checkpoint:
    return Checkpoint(Path("nowhere"), config_of(model_type), {})


@pytest.fixture
def _none_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "has_tests", lambda config: False)


@pytest.mark.usefixtures("_none_is_covered")
@pytest.mark.parametrize("model_type", ["cwm", "minimax_m2", "gemma3_text", "deepseek_v3"])
def test_a_type_that_works_passes(model_type: str) -> None:
    """Among them one that has to have token ids, and one with windows, experts or latents."""
    Stage.ensure_supported(checkpoint_of(model_type))


def test_of_deepseeks_attention_the_latents_are_counted() -> None:
    """512 numbers and 64 that all heads share, not the keys and values of 128 heads."""
    checkpoint = checkpoint_of("deepseek_v3")
    assert set(checkpoint.layer_kv_bytes("bfloat16")) == {2 * (512 + 64)} == {1152}
    assert set(checkpoint.layer_kv_bytes("bfloat16", "int8")) == {512 + 2 + 64 + 2}


@pytest.mark.parametrize("model_type", ["big_bird", "doge", "roformer"])
def test_a_type_that_does_not_work_is_refused(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if no table says so."""
    monkeypatch.setattr(architectures, "check_architecture", lambda config: None)
    with pytest.raises(UnsupportedModel, match=f"'{model_type}' is not supported: .+Use a model"):
        Stage.ensure_supported(checkpoint_of(model_type))


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "qwen2_moe", "use_sliding_window": True, "max_window_layers": 28},
        {"model_type": "phimoe", "sliding_window": 4096},
    ],
    ids=lambda settings: str(settings["model_type"]),
)
def test_a_window_that_is_overlooked_shows(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are longer than what is left of a window."""
    monkeypatch.setattr(architectures, "has_tests", lambda config: False)
    monkeypatch.setattr(architectures, "check_architecture", lambda config: None)
    config = config_of(**settings)
    with pytest.raises(UnsupportedModel, match=r"gave [0-9]+ other tokens"):
        Stage.ensure_supported(Checkpoint(Path("nowhere"), config, {}))


def test_what_a_refusal_says(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Once, in a few words, and nothing of how the small model was made."""
    monkeypatch.setattr(architectures, "check_architecture", lambda config: None)
    with pytest.raises(UnsupportedModel) as caught:
        Stage.ensure_supported(checkpoint_of("roformer"))
    said = str(caught.value)
    assert said.startswith("The model type 'roformer' is not supported: no test covers it, and a ")
    assert said.endswith("that is known to work, such as llama, qwen3 or mistral.")
    assert len(said) < 500
    assert "shards" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("_none_is_covered")
def test_a_wrong_answer_is_refused() -> None:
    class Inexact(Stage):
        def run(self, sequences: Any, token_ids: Any, hidden_states: Any, *masks: Any) -> Any:
            if hidden_states is not None:
                hidden_states = hidden_states * 1.05
            return super().run(sequences, token_ids, hidden_states, *masks)

    with pytest.raises(UnsupportedModel, match=r"gave [0-9]+ other tokens"):
        ensure_supported(checkpoint_of("olmo3"), Inexact.load_unchecked)


def test_a_covered_type_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_self_check", None)
    Stage.ensure_supported(checkpoint_of("llama"))


def test_a_small_config_has_factors_of_rotary_positions_for_its_heads() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    small = shrink_config(config_of("phi3", rope_parameters={**rope, **factors}))
    assert small["rope_parameters"]["long_factor"] == [1.0] * 8  # its context is as short


def test_a_small_config_keeps_the_structure() -> None:
    config = config_of("gemma3_text", num_hidden_layers=12)
    small = shrink_config(config)
    assert small["num_hidden_layers"] == 6
    assert small["layer_types"] == config["layer_types"][:6]
    assert len(set(small["layer_types"])) == 2
    assert small["hidden_size"] < 100


def test_a_small_config_has_experts_in_groups_behind_a_dense_layer() -> None:
    small = shrink_config(config_of("deepseek_v3"))
    assert (small["n_routed_experts"], small["n_group"], small["topk_group"]) == (8, 4, 2)
    assert (small["num_hidden_layers"], small["first_k_dense_replace"]) == (2, 1)


@pytest.mark.parametrize(
    "config",
    [
        config_of("mistral"),
        config_of("modernbert-decoder"),
        config_of("llama4_text"),
        config_of("ministral3"),
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_texts_are_longer_than_what_a_small_model_sees_at_once(config: dict[str, Any]) -> None:
    limits = ("sliding_window", "attention_chunk_size", "local_attention")
    original = "original_max_position_embeddings"

    def lengths(values: Any) -> list[int]:
        inner = values.get("rope_parameters") or {}
        named = [values.get(name) for name in limits]
        return [n for n in (*named, inner.get(original)) if n is not None]

    small = lengths(shrink_config(config))
    assert len(small) == len(lengths(config)) > 0
    assert max(small) < LONG_TEXT / 2


def test_a_small_config_names_token_ids_that_it_has() -> None:
    config = config_of("cwm", eos_token_id=[128_001, 128_008])
    small = shrink_config(config)
    assert small["bos_token_id"] < small["vocab_size"]
    assert len(small["eos_token_id"]) == 2
    assert max(small["eos_token_id"]) < small["vocab_size"]
    assert small["pad_token_id"] is None


def test_model_types_are_told_without_loading_transformers() -> None:
    """As a coordinator does, by the tables that transformers' own classes are found in."""
    generating = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    types = {*CONFIG_MAPPING, *generating, "nonesuch"}
    assert {one for one in types if generates_text(one)} == generating
    assert all(map(has_type, generating & {*CONFIG_MAPPING} - VERIFIED))
    assert (has_type("vit"), has_type("nonesuch")) == (True, False)
