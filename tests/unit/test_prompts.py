"""What a prompt may be."""

from typing import Any

import pytest

from distributed_llm.client import prompts
from distributed_llm.client.prompts import encode_prompt
from distributed_llm.common.errors import InvalidRequest


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
