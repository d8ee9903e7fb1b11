"""Writes the tokenizer of a model in GGUF files, chat template included."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.gguf_texts.header import Header

_AS_GPT2 = frozenset(
    {None, "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jais", "mpt", "olmo", "default"}
)
"""How text is cut before merges, where it is cut as for GPT-2: transformers' own way here."""

_DIGITS = frozenset({"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"})
"""Where it is cut so, too, but each digit stands for itself."""


def write_tokenizer(header: Header, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; nothing if the files have no vocabulary.

    Raises:
        UnsupportedModel: it is of a kind that transformers does not read.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return
    try:
        architecture, content, config = get_gguf_tokenizer(str(header.files[0]))
        backend, more = convert_gguf_tokenizer(architecture, content)
    except Exception as exc:
        raise UnsupportedModel(
            f"has a tokenizer ({kind}) that cannot be read: {str(exc)[:300]}. Use a folder with "
            "the original model."
        ) from exc
    if kind == "gpt2":
        _cut_text(backend, content.get("pre_tokenizer_type"))
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=backend, **config, **more).save_pretrained(out)


def _cut_text(backend: Tokenizer, way: str | None) -> None:
    """Make a tokenizer cut text before merges as the file says."""
    if way in _DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif way not in _AS_GPT2 and way not in GGUF_PRE_TOKENIZER_SPLITS:
        raise UnsupportedModel(
            f"has a tokenizer that cuts text in a way that is not known ({way!r}), so that the "
            "model would read other tokens than those that it has learned. Use a folder with the "
            "original model."
        )
