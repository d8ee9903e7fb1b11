"""What `transformers` itself generates: the answers that a cluster is held against."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@lru_cache(maxsize=4)
def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def tokenizer(folder: Path) -> Any:
    """Return the checkpoint's tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def reference_ids(folder: Path, prompt: list[int], new_tokens: int, **options: Any) -> list[int]:
    """Return the greedy answer to `prompt`, without the prompt."""
    ids = torch.tensor([prompt])
    options = {"eos_token_id": None, **options}
    made = _model(folder).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    answer: list[int] = made[0, len(prompt) :].tolist()
    return answer


def reference_text(folder: Path, prompt: str, new_tokens: int) -> str:
    """Return the greedy answer to a text."""
    words = tokenizer(folder)
    ids = reference_ids(folder, words(prompt)["input_ids"], new_tokens)
    text: str = words.decode(ids, skip_special_tokens=True)
    return text


def check_varied(token_ids: list[int]) -> None:
    """Fail if an answer is so dull that a broken split could give it too."""
    if len(set(token_ids)) < 5:
        pytest.fail(f"the reference says nothing: {token_ids}")
