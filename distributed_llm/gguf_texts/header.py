"""Reads what GGUF files say of themselves: metadata and tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers.integrations.gguf.reader import read_gguf_metadata

from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.gguf_texts.tensors import broken, read_tensors

_TOKENS = "tokenizer.ggml.tokens"
_VISION_NAMES = ("v.", "mm.", "a.")
"""How names of tensors begin that turn pictures or sound into what a model reads."""

_ROTARY_NAMES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are no weights: they divide rotary frequencies, and config.json says the same."""


@dataclass(frozen=True)
class Header:
    """What GGUF files say of themselves.

    Attributes:
        files: of the model; the first has the metadata.
        metadata: by llama.cpp's names; arrays of text are not there, but for the tokens.
        tensors: all that the files hold, by name.
    """

    files: Sequence[Path]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """The architecture's name in llama.cpp."""
        return str(self.metadata["general.architecture"])

    @property
    def tokens(self) -> Sequence[str]:
        """The vocabulary; empty if the files have none."""
        tokens = self.metadata.get(_TOKENS)
        return tokens if isinstance(tokens, list) else ()

    def get(self, name: str) -> Any:
        """Return what the metadata say under "ARCHITECTURE.name", or None."""
        return self.metadata.get(f"{self.architecture}.{name}")

    @cached_property
    def weights(self) -> Mapping[str, TensorInfo]:
        """The tensors that are weights of the language model."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.endswith(_ROTARY_NAMES) and not name.startswith(_VISION_NAMES)
        }

    def numbers(self, name: str) -> list[float] | None:
        """Return the numbers of a small tensor, or None if there is no such one.

        Raises:
            UnsupportedModel: they are not plain numbers.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.dtype != "F32":
            raise UnsupportedModel(
                f"has {name} as {tensor.dtype}, where F32 is expected. Use another file of the "
                "model."
            )
        path = next(path for path in self.files if path.name == tensor.file)
        count = math.prod(tensor.shape)
        return [float(n) for n in np.fromfile(path, "<f4", count, offset=tensor.offset)]


def read_files(files: Sequence[Path]) -> Header:
    """Return what the files of a model say.

    Raises:
        CheckpointError: they are not whole, or contradict one another; without the file's name.
        UnsupportedModel: their numbers are of types that are not read.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"holds {name}, as {tensors[name].file} does. They are not the parts of one "
                    "model; copy those of one."
                )
            tensors[name] = tensor
    try:
        metadata, _ = read_gguf_metadata(str(files[0]), (_TOKENS,))
    except Exception as exc:  # of many types, for what is not as it should be
        raise broken(files[0], "its metadata make no sense") from exc
    metadata = {name: decimal(value) for name, value in metadata.items()}
    count = metadata.get("split.tensors.count", len(tensors))
    if count != len(tensors):
        raise CheckpointError(
            f"speaks of {count} tensors, but the files have {len(tensors)}. Copy all parts of the "
            "model into its folder."
        )
    return Header(files, metadata, tensors)


def decimal(value: Any) -> Any:
    """Return a float32 as the decimal that it was made of: 1e-06, not 9.999999974752427e-07."""
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
