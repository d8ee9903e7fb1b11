"""Reads what GGUF files say of themselves: metadata and tensors."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType
from transformers.integrations.gguf.reader import read_gguf_metadata

from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.gguf_types import GGUF_BLOCKS, GGUF_FLOATS
from distributed_llm.common.model_files import TensorInfo, how_to_replace

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
        for name, tensor in _tensors(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"holds {name}, as {tensors[name].file} does. They are not the parts of one "
                    "model; copy those of one."
                )
            tensors[name] = tensor
    try:
        metadata, _ = read_gguf_metadata(str(files[0]), (_TOKENS,))
    except Exception as exc:
        raise _broken(files[0], exc) from exc
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


class _Reader(GGUFReader):
    """Does not look at the elements of arrays: vocabularies have a hundred thousand texts."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, Any, Any, Any]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        content: Any = self.data
        kind, count = struct.unpack_from("<IQ", content, orig_offs)
        size = struct.calcsize("<IQ")
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                size += 8 + struct.unpack_from("<Q", content, orig_offs + size)[0]
        else:
            size += count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
        return size, [], [], [GGUFValueType.ARRAY]


def _tensors(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    try:
        reader = _Reader(file)
    except Exception as exc:
        if "GGMLQuantizationType" in str(exc):
            raise UnsupportedModel(
                f"holds numbers of a type that is not known ({exc}). {_OTHER_FILE}"
            ) from exc
        raise _broken(file, exc) from exc
    if reader.endianess.name != "LITTLE":
        raise UnsupportedModel(f"is for machines of the other byte order. {_OTHER_FILE}")
    tensors = {}
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))
        if kind not in GGUF_FLOATS and kind not in GGUF_BLOCKS:
            raise UnsupportedModel(
                f"holds numbers of type {kind} ({tensor.name}), which are not read. {_OTHER_FILE}"
            )
        offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
        if offset + nbytes > size:
            raise _broken(file, ValueError(f"{tensor.name} would end behind it"))
        tensors[tensor.name] = TensorInfo(tensor.name, file.name, kind, shape, offset, nbytes)
    return tensors


_OTHER_FILE = (
    f"Use another file of the model; those of these types are read: {', '.join(GGUF_BLOCKS)}, "
    "F16, BF16, F32."
)


def _broken(file: Path, exc: Exception) -> CheckpointError:
    return CheckpointError(
        f"is not a whole GGUF file ({type(exc).__name__}: {str(exc)[:200]}). It was not copied to "
        f"its end, or is damaged. {how_to_replace(file)}"
    )
