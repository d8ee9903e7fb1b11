"""Writes all texts of a model in GGUF files."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.gguf_files import REFUSAL_NAME, TENSORS_NAME, Refusal
from distributed_llm.gguf_texts.config import write_config
from distributed_llm.gguf_texts.generation import write_generation_config
from distributed_llm.gguf_texts.header import read_files
from distributed_llm.gguf_texts.tokenizer import write_tokenizer


def write_texts_or_refusal(files: Sequence[Path], out: Path) -> None:
    """Write the texts of files to the folder `out`, or why they cannot be served."""
    try:
        write_texts(files, out)
    except CheckpointError as exc:
        refusal = Refusal(str(exc), unsupported=isinstance(exc, UnsupportedModel))
        (out / REFUSAL_NAME).write_bytes(msgspec.json.encode(refusal))


def write_texts(files: Sequence[Path], out: Path) -> None:
    """Write configuration, tokenizer and the list of tensors to the folder `out`.

    Args:
        files: of the model; the first has the metadata.

    Raises:
        CheckpointError: they cannot be served; without the file's name.
    """
    header = read_files(files)
    try:
        write_config(header, out)
        write_generation_config(header, out)
        write_tokenizer(header, out)
    except CheckpointError:
        raise
    except Exception as exc:  # transformers checks values by errors of many types
        raise CheckpointError(
            f"says of its {header.architecture!r} model what no model of that kind has, so that "
            "transformers makes no configuration or tokenizer of it. It is damaged, or newer than "
            "the installed transformers: download it again, or use another file of the model."
        ) from exc
    (out / TENSORS_NAME).write_bytes(msgspec.json.encode(header.weights))
