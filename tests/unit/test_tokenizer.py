"""The tokenizer: prompts are encoded, and tokens decoded, as transformers does it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.errors import CheckpointError, InvalidRequest
from distributed_llm.common.messages import Chat, ChatMessage
from distributed_llm.coordinator.text.detokenizer import Detokenizer
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from tests.unit.made_tokenizers import (
    byte_level,
    every_kind,
    reference_of,
    save,
    texts,
    tokenizer_of,
)

# ------------------------------------------------------------------ encode


@every_kind
@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_encodes_as_transformers_does(kind: str, text: str) -> None:
    assert tokenizer_of(kind).encode(text) == reference_of(kind)(text)["input_ids"]


@every_kind
@given(ids=st.lists(st.integers(0, 400), max_size=40))
@settings(max_examples=100, deadline=None)
def test_decodes_as_transformers_does(kind: str, ids: list[int]) -> None:
    expected = reference_of(kind).decode(ids, skip_special_tokens=True)
    assert tokenizer_of(kind).decode(ids) == expected


def test_a_long_prompt_is_not_cut() -> None:
    assert len(tokenizer_of("byte-level").encode("x" * 1000)) == 1001


def test_half_a_surrogate_pair_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        tokenizer_of("byte-level").encode("\ud83d")


# ------------------------------------------------------------------ files


def test_a_folder_without_tokenizer_serves_ids_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    assert not tokenizer.available
    with pytest.raises(InvalidRequest, match="token ids"):
        tokenizer.encode("hello")
    with pytest.raises(InvalidRequest, match="token ids"):
        tokenizer.encode_chat(Chat(messages=(ChatMessage(role="user", content="hello"),)))
    with pytest.raises(InvalidRequest, match="stop strings"):
        Detokenizer(tokenizer, ["x"])
    detokenizer = Detokenizer(tokenizer)
    piece = detokenizer.feed([1, 2, 3])
    assert (piece.text, piece.token_count, piece.stopped) == ("", 3, False)
    assert detokenizer.finish().text == ""


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', "\ud83d", "[" * 10**5])
def test_a_broken_tokenizer_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["m.Evil", None]}, ["m.Evil", None]])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, auto_map: Any) -> None:
    folder = save(tmp_path / "model", byte_level())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    (folder / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    tokenizer = Tokenizer.open(folder)  # of tokenizer.json, which needs no code
    assert tokenizer.decode(tokenizer.encode("the world")) == "the world"
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match="never run"):
        Tokenizer.open(folder)
    assert not (tmp_path / "ran").exists()


def test_the_older_pair_of_files_is_read_too(tmp_path: Path) -> None:
    model = json.loads(byte_level().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": 400}))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(m) for m in model["merges"]))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the world")) == "the world"
