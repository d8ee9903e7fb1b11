"""The tokenizer: prompts are encoded, and tokens decoded, as transformers does it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.errors import CheckpointError, InvalidRequest
from distributed_llm.common.messages import Chat, ChatMessage, Spelling
from distributed_llm.coordinator.events import TextRules
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


# ------------------------------------------------------------------ spelling


@every_kind
@given(text=st.text(st.sampled_from("hel ostw")))
@settings(max_examples=100, deadline=None)
def test_spellings_join_to_the_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    first, *ids = tokenizer.encode("h" + text)
    name, *spelled = tokenizer.spell([first, *ids])
    assert name == Spelling(written=b"<s>", is_text=False)
    joined = b"".join(one.written for one in spelled if one and one.is_text).decode()
    assert joined.removeprefix(" ") == tokenizer.decode(ids)


@given(text=texts)
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_the_bytes_of_tokens_join_to_any_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    spelled = tokenizer.spell(tokenizer.encode("h" + text)[1:])
    joined = b"".join(one.written for one in spelled if one)
    assert joined.removeprefix(b" ") == ("h" + text).encode()


def test_how_single_tokens_are_written() -> None:
    levels, fallback = tokenizer_of("byte-level"), tokenizer_of("byte-fallback")
    start, end, added = (levels.encode(text)[1] for text in ("<s>", "</s>", "<tool call>"))
    assert levels.spell([start, end, added]) == (
        Spelling(written=b"<s>", is_text=False),
        Spelling(written=b"</s>", is_text=False),
        Spelling(written=b"<tool call>"),
    )
    assert levels.spell(levels.encode("\xe9")[1:]) == spelled(b"\xc3", b"\xa9")
    assert fallback.spell(fallback.encode("h \xe9")[1:]) == spelled(b" h", b" ", b"\xc3", b"\xa9")
    assert tokenizer_of("unigram").spell([2, 999_999]) == (*spelled(b" he"), None)


def spelled(*texts: bytes) -> tuple[Spelling, ...]:
    return tuple(Spelling(written=text) for text in texts)


def test_a_piece_longer_than_is_reported_is_cut(tmp_path: Path) -> None:
    backend = byte_level()
    fits, longer = "x" + "你" * 85, "xx" + "你" * 85
    backend.add_tokens([fits, longer])
    tokenizer = Tokenizer.load(save(tmp_path, backend))
    assert tokenizer.spell(tokenizer.encode(fits)[1:]) == spelled(fits.encode())
    assert tokenizer.spell(tokenizer.encode(longer)[1:]) == (
        Spelling(written=longer.encode()[:256], is_text=False),
    )


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
        Detokenizer(tokenizer, TextRules(("x",)))
    assert tokenizer.spell([1, 2]) == ()
    detokenizer = Detokenizer(tokenizer)
    piece = detokenizer.feed([1, 2, 3])
    assert (piece.text, piece.token_count, piece.stop_string) == ("", 3, None)
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
