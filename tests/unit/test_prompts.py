"""What a prompt may be."""

from typing import Any

import pytest

from distributed_llm.client import prompts
from distributed_llm.client.prompts import encode_prompt
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.grammar import Grammar


@pytest.mark.parametrize("prompt", [b"hi", b"", bytearray(b"hi"), memoryview(b"hi")])
def test_bytes_are_neither_text_nor_token_ids(prompt: Any) -> None:
    kind = type(prompt).__name__
    with pytest.raises(InvalidRequest, match=rf"not {kind}\. Decode it, .* or give list\(prompt\)"):
        encode_prompt(prompt)


def test_a_prompt_is_too_long_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_FRAME_BYTES", 4 * 1000)
    assert encode_prompt([1] * 1000).specs[0].shape == (1000,)
    with pytest.raises(InvalidRequest, match="1,001 tokens are too many; 1,000 are allowed"):
        encode_prompt([1] * 1001)


def test_the_text_of_a_grammar_follows_on_the_prompt() -> None:
    both = encode_prompt("Hi", Grammar("regex", "é"))
    assert (both.grammar, both.frames) == ("regex", (b"Hi", "é".encode()))
    assert [spec.shape for spec in both.specs] == [(2,), (2,)]
    alone = encode_prompt("", Grammar("lark", "start: x"))
    assert alone.frames == (b"start: x",)
    assert encode_prompt([1], Grammar("json_object")).grammar == "json_object"
    assert len(encode_prompt([1], Grammar("json_object")).frames) == 1
    assert encode_prompt("Hi").grammar is None


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("a regex", "no grammar"),
        (Grammar("yaml", "x"), "one of the kinds"),  # type: ignore[arg-type]
        (Grammar("regex", 5), "no grammar"),  # type: ignore[arg-type]
        (Grammar("json_object", "{}"), "has no text"),
        (Grammar("regex"), "needs a text"),
        (Grammar("regex", "\ud83d"), "Unicode"),
        (Grammar("regex", "é" * (1 << 19) + "x"), "1,048,577 bytes"),
    ],
)
def test_what_is_no_grammar_is_refused(wrong: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        encode_prompt("Hi", wrong)
