"""How a model in GGUF files wants to generate: where it ends, and how it samples."""

import json
from pathlib import Path

from distributed_llm.common.model_folder import GENERATION_NAME
from distributed_llm.gguf_texts.header import Header

_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "<|end_of_turn|>", "<|return|>", "<|call|>", "<EOT>", "[EOT]"),
        *("<end_of_utterance>", "<turn|>", "<|eot|>"),
    }
)
"""Tokens that end an answer wherever they stand, as in llama.cpp: old files name only one."""

_SPECIAL_TYPES = frozenset({3, 4})
"""Types of tokens that are no text: control tokens, and those that a user has added."""

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Names of settings, in llama.cpp's metadata and in generation_config.json."""


def end_tokens(header: Header) -> list[int]:
    """Return the tokens that end an answer, the file's own first."""
    named = [header.metadata.get(f"tokenizer.ggml.{name}") for name in _END_IDS]
    types = header.metadata.get("tokenizer.ggml.token_type") or []
    found = [
        number
        for number, (token, kind) in enumerate(zip(header.tokens, types, strict=False))
        if token in _END_TEXTS and kind in _SPECIAL_TYPES
    ]
    return list(dict.fromkeys(n for n in (*named, *found) if n is not None))


def write_generation_config(header: Header, out: Path) -> None:
    """Write generation_config.json."""
    content = {
        name: header.metadata[key]
        for name, key in (
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("pad_token_id", "tokenizer.ggml.padding_token_id"),
        )
        if key in header.metadata
    }
    if ends := end_tokens(header):
        content["eos_token_id"] = ends
    sampling = {
        name: header.metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in header.metadata
    }
    if sampling:
        content |= {"do_sample": True, **sampling}
    (out / GENERATION_NAME).write_text(json.dumps(content, indent=2))
