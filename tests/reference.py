"""What `transformers` itself generates: the answers that a cluster is held against.

What was generated once is kept: many tests ask one checkpoint the same.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@lru_cache(maxsize=4)
def _model(folder: Path) -> Any:
    torch.set_num_threads(1)  # more are no quicker with a tiny model, and keep the cluster waiting
    return AutoModelForCausalLM.from_pretrained(folder)


@lru_cache(maxsize=4)
def tokenizer(folder: Path) -> Any:
    """Return the checkpoint's tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def generated(model: Any, prompt: Sequence[int], new_tokens: int, **options: Any) -> list[int]:
    """Return the greedy answer of a model of transformers, without the prompt."""
    ids = torch.tensor([list(prompt)])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        **{"eos_token_id": None, "pad_token_id": 0, **options},
    )
    answer: list[int] = made[0, len(prompt) :].tolist()
    return answer


def reference_ids(folder: Path, prompt: list[int], new_tokens: int, **options: Any) -> list[int]:
    """Return the greedy answer to `prompt`, without the prompt."""
    return [*_generated(folder, tuple(prompt), new_tokens, **options)]


@lru_cache(maxsize=1024)
def _generated(
    folder: Path, prompt: tuple[int, ...], new_tokens: int, **options: Any
) -> tuple[int, ...]:
    return tuple(generated(_model(folder), prompt, new_tokens, **options))


def check_greedy(folder: Path, prompt: Sequence[int], token_ids: Sequence[int]) -> None:
    """Fail unless every token is what the model finds likeliest after those before it.

    That is its greedy answer, as `reference_ids` returns it, but computed in one pass: a long
    answer costs no more than a short one.
    """
    check_varied(token_ids)
    assert list(token_ids) == likeliest(folder, [*prompt, *token_ids])[len(prompt) - 1 : -1]


def likeliest(folder: Path, token_ids: Sequence[int]) -> list[int]:
    """Return what the model finds likeliest after each token of a text."""
    with torch.inference_mode():
        logits = _model(folder)(torch.tensor([list(token_ids)])).logits[0]
    found: list[int] = logits.argmax(-1).tolist()
    return found


def reference_text(folder: Path, prompt: str, new_tokens: int) -> str:
    """Return the greedy answer to a text."""
    words = tokenizer(folder)
    ids = reference_ids(folder, words(prompt)["input_ids"], new_tokens)
    text: str = words.decode(ids, skip_special_tokens=True)
    return text


def check_varied(token_ids: Sequence[int]) -> None:
    """Fail if an answer is so dull that a broken split could give it too."""
    if len(set(token_ids)) < 5:
        pytest.fail(f"the reference says nothing: {token_ids}")
