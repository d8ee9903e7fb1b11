"""The configuration of a text model is taken out of that of a whole, as transformers takes it."""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from distributed_llm.common.config_defaults import config_defaults
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.text_config import PART_OF, text_config

WHOLES = (
    *("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "gemma3", "gemma3n"),
    *("gemma4", "glm4v", "glm4v_moe", "idefics3", "internvl", "janus", "kimi_k25", "lfm2_vl"),
    *("llama4", "llava", "llava_next", "llava_onevision", "mistral3", "mllama", "ovis2"),
    *("qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl"),
    "qwen4_exp",
    *("qwen3_vl_moe", "smolvlm", "voxtral", "glmasr"),
)


@pytest.mark.parametrize("model_type", WHOLES)
def test_what_a_file_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    config = {"model_type": model_type, "text_config": {"num_hidden_layers": 2}}
    found = text_config(config)
    kind: Any = CONFIG_MAPPING[model_type]
    expected = kind(text_config={"num_hidden_layers": 2}).text_config
    assert found.pop("model_type") == expected.model_type
    assert found.pop(PART_OF) == model_type
    assert found.pop("tie_word_embeddings") in (True, False)
    assert len(found) > 5
    assert type(expected)(**found).to_dict() == expected.to_dict()


def test_the_text_model_is_of_the_type_that_the_whole_names() -> None:
    text = {"model_type": "qwen3", "hidden_size": 8}
    assert text_config({"model_type": "internvl", "text_config": text})["model_type"] == "qwen3"
    assert text_config({"model_type": "gemma3", "text_config": text})["model_type"] == "gemma3_text"
    kimi = {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}}
    assert text_config(kimi)["model_type"] == "deepseek_v3"


def test_values_of_the_whole_go_before_those_of_the_text_model() -> None:
    quantized = {"quant_method": "fp8"}
    found = text_config(
        {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "torch_dtype": "bfloat16",
            "eos_token_id": [1, 2],
            "pad_token_id": 99,
            "quantization_config": quantized,
            "text_config": {"dtype": "float32", "eos_token_id": 3, "vocab_size": 8},
            "vision_config": {"hidden_size": 5},
        }
    )
    assert found["architectures"] == ["LlavaForConditionalGeneration"]
    assert found["torch_dtype"] == "bfloat16"
    assert "dtype" not in found
    assert found["eos_token_id"] == [1, 2]
    assert "pad_token_id" not in found  # of the processor; the text model may not have it
    assert found["quantization_config"] == quantized
    assert found["hidden_size"] == 4096


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "gemma3"}, True),
        ({"model_type": "gemma3", "tie_word_embeddings": False}, False),
        ({"model_type": "llava"}, False),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_whether_the_head_is_the_embedding(config: dict[str, Any], tied: bool) -> None:
    assert text_config({"text_config": {}, **config})["tie_word_embeddings"] == tied


def test_all_in_one() -> None:
    """As in files of Qwen2-VL; and as in those of Phi-4-multimodal, whose text model is a Phi-3."""
    whole = {"vision_config": {}, "audio_config": {}, "hidden_size": 64}
    found = text_config({"model_type": "qwen2_vl", **whole})
    assert (found["model_type"], found["hidden_size"]) == ("qwen2_vl_text", 64)
    assert "vision_config" not in found
    assert found["intermediate_size"] == 29568
    assert text_config({"model_type": "phi4_multimodal", **whole})["model_type"] == "phi3"


@pytest.mark.parametrize("model_type", ["llama", "vit", "nonesuch", "../../llama"])
def test_what_has_one_part_stays_as_it_is(model_type: str) -> None:
    config = {"model_type": model_type, "hidden_size": 64}
    assert text_config(config) == config
    assert text_config({**config, "vision_config": {}}) == {**config, "vision_config": {}}


def test_a_text_model_under_another_name() -> None:
    config = {"auto_map": {}, "hidden_size": 64}
    found = text_config({**config, "model_type": "kimi_k2"})
    assert found == {**config, "model_type": "deepseek_v3"}


def test_a_whole_that_nobody_knows() -> None:
    with pytest.raises(UnsupportedModel, match=r"'nonesuch' is not supported: .* no model_type"):
        text_config({"model_type": "nonesuch", "text_config": {"hidden_size": 64}})


def test_another_name_of_a_value_is_no_second_value() -> None:
    """GPT-2 calls its hidden size n_embd, and also understands hidden_size."""
    assert config_defaults("gpt2").aliases["hidden_size"] == "n_embd"
    text = {"model_type": "gpt2", "hidden_size": 64}
    found = text_config({"model_type": "llava", "text_config": text})
    assert found["hidden_size"] == 64
    assert "n_embd" not in found
    assert found["n_head"] == 12
