"""Writes the tokenizer of a model in GGUF files, chat template included."""

import logging
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PretrainedConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.gguf_texts.header import Header

logger = logging.getLogger(__name__)

_AS_GPT2 = frozenset(
    {None, "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jais", "mpt", "olmo", "default"}
)
"""How text is cut before merges, where it is cut as for GPT-2: transformers' own way here."""

_DIGITS = frozenset({"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"})
"""Where it is cut so, too, but each digit stands for itself."""


def write_tokenizer(header: Header, config: PretrainedConfig, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; nothing if the files have no vocabulary.

    Raises:
        UnsupportedModel: it is of a kind that transformers does not read.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return
    first = header.files[0]
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            first.parent, gguf_file=first.name, config=config, local_files_only=True
        )
    except Exception as exc:
        raise UnsupportedModel(
            f"has a tokenizer ({kind}) that cannot be read: {str(exc)[:300]}. Use a folder with "
            "the original model."
        ) from exc
    if kind == "gpt2":
        _cut_text(tokenizer, header.metadata.get("tokenizer.ggml.pre"))
    for name in ("name_or_path", "is_local", "local_files_only"):  # of this machine
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(out)


def _cut_text(tokenizer: Any, way: str | None) -> None:
    """Make the tokenizer cut text before merges as the file says."""
    if way in _DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
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
