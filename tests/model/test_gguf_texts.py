"""What is written of GGUF files: configuration, tokenizer, defaults of generation."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.gguf_files import open_gguf
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from distributed_llm.gguf_texts.families import model_type_of, of_family
from distributed_llm.gguf_texts.header import Header
from distributed_llm.gguf_texts.texts import write_texts
from distributed_llm.gguf_texts.tokenizer import _cut_text
from distributed_llm.worker.model.empty_model import model_config
from tests.checkpoints import build_model, make_tokenizer
from tests.gguf_cases import CASES
from tests.gguf_models import open_here, write_gguf

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}},
    "qwen3": {"max_position_embeddings": 512},
    "mixtral": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"layer_types": None, "query_pre_attn_scalar": 16},
    "qwen2_moe": {},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "stablelm": {"partial_rotary_factor": 0.25},
    "phi3": {},
}
KEPT = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    *(
        "num_local_experts",
        "shared_expert_intermediate_size",
        "norm_topk_prob",
        "layer_types",
        "layer_norm_eps",
    ),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("max_position_embeddings", "vocab_size", "tie_word_embeddings"),
)


def texts(tmp_path: Path, model: Any, **fields: Any) -> Path:
    """Return the folder with what is written of a model."""
    file = write_gguf(tmp_path / "tiny.gguf", model, **fields)
    (tmp_path / "texts").mkdir()
    write_texts([file], tmp_path / "texts")
    return tmp_path / "texts"


def json_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_that_of_the_model(tmp_path: Path, family: str) -> None:
    settings = {name: value for name, value in FAMILIES[family].items() if value is not None}
    fields: dict[str, Any] = {}
    if family == "gemma3_text":
        settings["layer_types"] = ["sliding_attention"] * 2
    if family == "llama":
        fields = {"arch__rope__scaling__type": "yarn", "arch__rope__scaling__factor": 4.0}
        settings["rope_parameters"] |= {"original_max_position_embeddings": 64}
    model = build_model(family, num_layers=2, vocab_size=320, **settings)
    config = model_config(json_of(texts(tmp_path, model, **fields)))
    for name in KEPT:
        expected = getattr(model.config, name, None)
        if name != "head_dim" or expected is not None:
            assert getattr(config, name, None) == expected, name
    assert config.rope_parameters == model.config.rope_parameters


def frequencies(config: Any) -> torch.Tensor:
    kind = config.rope_parameters["rope_type"]
    found: torch.Tensor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0]
    return found


@pytest.mark.parametrize("is_known", [True, False])
def test_scaled_rotary_frequencies_are_read_from_their_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """transformers' own reader leaves them out, and Llama 3 then forgets what is far away."""
    rope = {
        **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    model = build_model("llama", num_layers=1, vocab_size=320, head_dim=64, rope_parameters=rope)
    scaled = frequencies(model.config)
    plain = 1 / 500_000 ** (torch.arange(0, 64, 2) / 64)
    if not is_known:
        scaled = scaled * torch.linspace(1, 0.9, 32)
    write = gguf.GGUFWriter.write_header_to_file

    def write_with_factors(writer: gguf.GGUFWriter, *args: Any) -> None:
        factors = (plain / scaled).numpy().astype(np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
        write(writer, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", write_with_factors)
    folder = texts(tmp_path, model, arch__rope__dimension_count_swa=64)
    config = model_config(json_of(folder))
    torch.testing.assert_close(frequencies(config), scaled)
    assert "rope_freqs.weight" not in json_of(folder, "tensors.json")
    if is_known:
        assert config.rope_parameters == rope


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "ministral3"])
def test_frequencies_that_grow_with_the_context(tmp_path: Path, family: str) -> None:
    """gpt-oss does not round where they begin to, which files do not say."""
    settings = {"rope_parameters": CASES["deepseek3, scaled positions"][1]["rope_parameters"]}
    model = build_model(
        family, num_layers=2, vocab_size=320, **(settings if family == "deepseek_v3" else {})
    )
    config = model_config(json_of(texts(tmp_path, model)))
    expected = model.config
    read, wanted = (ROPE_INIT_FUNCTIONS["yarn"](one, "cpu") for one in (config, expected))
    torch.testing.assert_close(read[0], wanted[0])
    assert read[1] == pytest.approx(wanted[1])
    for name in ("mscale_all_dim", "llama_4_scaling_beta"):
        assert config.rope_parameters.get(name) == expected.rope_parameters.get(name)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"expert_count": 256, "expert_gating_func": 2}, ("deepseek_v3", 8, 4)),
        ({"expert_count": 384, "expert_gating_func": 2}, ("deepseek_v3", 1, 1)),
        ({"expert_count": 160}, ("deepseek_v2", 8, 3)),
        ({"expert_count": 64}, ("deepseek_v2", 1, 1)),
        (
            {"expert_count": 64, "expert_group_count": 4, "expert_group_used_count": 2},
            ("deepseek_v2", 4, 2),
        ),
    ],
)
def test_groups_of_experts_that_old_files_do_not_tell(
    sizes: dict[str, int], expected: tuple[str, int, int]
) -> None:
    said = {
        **{"attention.head_count": 8, "attention.key_length": 12, "attention.value_length": 8},
        **{"embedding_length": 64, "rope.dimension_count": 4, **sizes},
    }
    metadata = {f"deepseek2.{name}": value for name, value in said.items()}
    header = Header([], {"general.architecture": "deepseek2", **metadata}, {})
    kind = model_type_of(header, "deepseek_v3")
    found = of_family(header, {"model_type": kind})
    assert (kind, found["n_group"], found["topk_group"]) == expected


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    model = build_model("glm4_moe", num_layers=3, vocab_size=320)
    file = write_gguf(tmp_path / "m.gguf", model, arch__nextn_predict_layers=1)
    checkpoint = open_here(file, tmp_path / "texts")
    assert checkpoint.num_layers == 2
    assert not [name for name in checkpoint.tensors if name.startswith("blk.2.")]


def test_the_tokenizer_is_that_of_transformers(tmp_path: Path) -> None:
    made = make_tokenizer()
    model = build_model("llama", num_layers=1, vocab_size=len(made))
    folder = texts(tmp_path, model, tokenizer=made)
    tokenizer = Tokenizer.load(folder)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in ("The quick 123 brown<|end|> fox", "Größe 你好 🙂\n\n  x", ""):
        assert tokenizer.encode(text) == made(text)["input_ids"] == theirs(text)["input_ids"]
    assert tokenizer.facts().chat_template == made.chat_template
    assert tokenizer.end_token == made.eos_token_id
    said = (folder / "tokenizer_config.json").read_text() + (folder / "config.json").read_text()
    assert str(tmp_path) not in said  # nothing of this machine goes to others


def tokenizer_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Any:
    """Return what is written of a tokenizer that is other than the tests' own."""
    for name in ("add_tokenizer_pre", "add_tokenizer_model"):
        if name.replace("add_tokenizer_", "tokenizer__ggml__") in fields:
            monkeypatch.setattr(gguf.GGUFWriter, name, lambda *_: None)
    model = build_model("llama", num_layers=1, vocab_size=320)
    return json_of(texts(tmp_path, model, **fields), "tokenizer.json")


def kinds(sequence: Any, name: str) -> list[str]:
    return [one["type"] for one in sequence[name]]


def test_digits_are_cut_as_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer_json(tmp_path, monkeypatch, tokenizer__ggml__pre="smollm")
    assert kinds(made["pre_tokenizer"], "pretokenizers") == ["Digits", "ByteLevel"]
    assert not made["model"]["ignore_merges"]


def test_words_that_no_merge_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3 has them, and texts that begin with a special token."""
    made = tokenizer_json(tmp_path, monkeypatch, tokenizer__ggml__pre="llama-bpe")
    assert made["model"]["ignore_merges"]
    assert Tokenizer.load(tmp_path / "texts").encode("x")[0] == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_texts_that_begin_with_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    made = tokenizer_json(
        tmp_path,
        monkeypatch,
        tokenizer__ggml__model="llama",
        tokenizer__ggml__add_space_prefix=wanted,
    )
    expected = ["Prepend", "Replace"] if wanted else ["Replace"]
    assert kinds(made["normalizer"], "normalizers") == expected
    assert (made["decoder"]["decoders"][-1]["type"] == "Strip") == wanted
    assert made["pre_tokenizer"] is None


def test_how_it_wants_to_generate(tmp_path: Path) -> None:
    model = build_model("llama", num_layers=1, vocab_size=320)
    folder = texts(
        tmp_path,
        model,
        tokenizer__ggml__eot_token_id=7,
        general__sampling__temp=0.6,
        general__sampling__top_k=20,
    )
    said = json_of(folder, "generation_config.json")
    assert said["eos_token_id"] == [1, 7]
    assert (said["do_sample"], said["temperature"], said["top_k"]) == (True, 0.6, 20)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")]
)
def test_the_dtype_to_compute_in(tmp_path: Path, kind: str, dtype: str) -> None:
    model = build_model("llama", num_layers=1, vocab_size=320)
    assert json_of(texts(tmp_path, model, kind=kind))["dtype"] == dtype


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"arch__rope__scaling__type": "spiral"}, "scales rotary positions.*'spiral'"),
        ({"tokenizer__ggml__pre": "haiku"}, "cuts text in a way that is not known.*'haiku'"),
        ({"tokenizer__ggml__pre": "default"}, "does not say how its tokenizer cuts text"),
        ({"tokenizer__ggml__model": "rwkv"}, "a tokenizer .rwkv. that transformers cannot"),
        ({"general__architecture": "plamo2"}, "architecture 'plamo2', which is not read"),
        ({"general__architecture": "mamba9"}, "architecture 'mamba9', which is not read"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], words: str
) -> None:
    for name, method in (
        ("tokenizer__ggml__pre", "add_tokenizer_pre"),
        ("tokenizer__ggml__model", "add_tokenizer_model"),
        ("general__architecture", "add_architecture"),
    ):
        if name in fields:
            monkeypatch.setattr(gguf.GGUFWriter, method, lambda *_: None)
    with pytest.raises(UnsupportedModel, match=words):
        texts(tmp_path, build_model("llama", num_layers=1, vocab_size=320), **fields)


def test_broken_files(tmp_path: Path) -> None:
    model = build_model("llama", num_layers=1, vocab_size=320)
    whole = write_gguf(tmp_path / "tiny.gguf", model).read_bytes()
    unknown = whole.replace(b"token_embd.weight\x02", b"token_embd.weight\x02", 1)
    at = unknown.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    other = unknown[:at] + (9).to_bytes(4, "little") + unknown[at + 4 :]
    never = unknown[:at] + (999).to_bytes(4, "little") + unknown[at + 4 :]
    for content, words in (
        (whole[:-50], "is not a whole GGUF file"),
        (whole[:500], "is not a whole GGUF file"),
        (b"GGUF" + b"\xff" * 100, "of version 4294967295 of GGUF"),
        (other, r"type Q8_1 \(token_embd\.weight\), which are not read.*Q4_K"),
        (never, "a type that is not known"),
    ):
        (tmp_path / "tiny.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            write_texts([tmp_path / "tiny.gguf"], tmp_path)


def test_a_process_of_its_own_reads_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path / "cache"))
    model = build_model("llama", num_layers=3, vocab_size=320)
    file = write_gguf(tmp_path / "tiny.gguf", model, parts=2)
    checkpoint = open_gguf(file)
    assert checkpoint.num_parameters == sum(p.numel() for p in model.parameters())
    assert (checkpoint.num_layers, checkpoint.layer_prefix) == (3, "blk")
    assert Tokenizer.load(checkpoint.folder).available
    assert {tensor.file for tensor in checkpoint.tensors.values()} == {
        "tiny-00001-of-00002.gguf",
        "tiny-00002-of-00002.gguf",
    }


@pytest.mark.parametrize(
    ("way", "pieces"),
    [
        ("glm4", "I|'ll| buy| |123|45| C|++| books|!NN|Größe| 你好ABC|?| | x"),
        ("hunyuan", "I|'ll| buy| |1|2|3|4|5| C|++| books|!NN|Größe| 你好ABC|?| | x"),
        ("bailingmoe", "I|'ll| buy| |1|2|3|4|5| C|++| books|!NN|Größe| 你好ABC|?| | x"),
        ("deepseek-coder", "I|'|ll| buy| |1|2|3|4|5| C|++| books|!|N|N|Größe| |你好|ABC|?| | x"),
        ("deepseek-llm", "I|'|ll| buy| |12345| C|++| books|!|N|N|Gr|öß|e| |你好|ABC|?| | x"),
        ("deepseek-v3", "I|'ll| buy| |123|45| C|++| books|!NN|Größe| |你好|ABC|?| | x"),
        ("falcon", "I|'|ll| buy| |123|45| C|++| books|!|N|N|Größe| 你好ABC|?| | x"),
        ("kimi-k2", "I'll| buy| |123|45| C|++| books|!NN|Größe| |你好|ABC|?| | x"),
        ("seed-coder", "I|'ll| buy| |1|2|3|4|5| C|++| books|!|NN|Größe| 你好ABC|?| | x"),
    ],
)
def test_how_text_is_cut(way: str, pieces: str) -> None:
    """Each line break is written N; the pieces are those that llama.cpp makes tokens of."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    _cut_text(backend, way)
    text = pieces.replace("|", "").replace("N", "\n")
    assert backend.pre_tokenizer is not None
    found = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[slice(*place)] for _, place in found] == pieces.replace("N", "\n").split("|")
