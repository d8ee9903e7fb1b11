"""Writes all texts of a model in GGUF files."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from distributed_llm.common.gguf_files import TENSORS_NAME
from distributed_llm.gguf_texts.config import write_config
from distributed_llm.gguf_texts.generation import write_generation_config
from distributed_llm.gguf_texts.header import read_files
from distributed_llm.gguf_texts.tokenizer import write_tokenizer


def write_texts(files: Sequence[Path], out: Path) -> None:
    """Write configuration, tokenizer and the list of tensors to the folder `out`.

    Args:
        files: of the model; the first has the metadata.

    Raises:
        CheckpointError: they cannot be served; without the file's name.
    """
    header = read_files(files)
    write_config(header, out)
    write_generation_config(header, out)
    write_tokenizer(header, out)
    (out / TENSORS_NAME).write_bytes(msgspec.json.encode(header.weights))
