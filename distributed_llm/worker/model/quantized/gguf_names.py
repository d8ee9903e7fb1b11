"""Says where the tensors of GGUF files belong in a model of transformers.

llama.cpp's converter gives other names, and to some tensors other values: it orders the rows of
queries and keys otherwise, adds 1 to some norms, and keeps gates and ups of experts apart. Names
and values are led back by transformers' own tables. They work on floating-point numbers; what they
do to integers is found out by giving them numbers of rows.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    Qwen2MoeTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel

_EXPERTS = re.compile(r"(?P<name>blk\.\d+\.ffn_(?P<part>gate|up|down)_exps)\.weight")
_LAYER = re.compile(r"^blk\.\d+\.")
_AS_OTHERS = {"gemma": "gemma2", "granite": "llama"}
"""Architectures whose values are changed like those of others that transformers has a table for."""

_PROBED_COLUMNS = 2


@dataclass(frozen=True)
class Target:
    """What becomes of a tensor of a GGUF file.

    Attributes:
        parameter: of the model that it belongs to, with the layer's number in the whole model.
        piece: which piece of the parameter it is; they follow each other along the rows, the last
            dimension but one.
        pieces: number of pieces.
        rows: int64: row i of the piece is row `rows[i]` of the tensor; None: they are in order.
        convert: returns the numbers of the piece for those of the tensor, float32; None: they are
            the same, but for the order of rows, and integers may stay integers.
    """

    parameter: str
    piece: int = 0
    pieces: int = 1
    rows: Tensor | None = None
    convert: Callable[[Tensor], Tensor] | None = None

    def ordered(self, tensor: Tensor) -> Tensor:
        """Return rows, of whatever they consist, in the order of the model."""
        if self.rows is None:
            return tensor
        return tensor.index_select(max(tensor.dim() - 2, 0), self.rows.to(tensor.device))

    def values(self, tensor: Tensor) -> Tensor:
        """Return the numbers of the piece for those of the tensor, float32."""
        return self.convert(tensor) if self.convert else self.ordered(tensor)


class GgufNames:
    """Where the tensors of one model belong.

    Args:
        model: the whole of it, on the meta device.
        checkpoint: of GGUF files.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._architecture = str(checkpoint.config["quantization_config"]["architecture"])
        known = _AS_OTHERS.get(self._architecture, self._architecture)
        kind: Any = TENSOR_PROCESSORS.get(known, TensorProcessor)
        self._processor = kind(config=model.config.to_dict())
        self._targets: dict[tuple[str, tuple[int, ...]], Target] = {}

    def target(self, name: str) -> Target:
        """Return what becomes of tensor `name`.

        Raises:
            UnsupportedModel: it belongs nowhere: the file holds another model than its metadata
                say, so that answers would be wrong.
        """
        if match := _EXPERTS.fullmatch(name):
            part = match["part"]
            target = Target(self._parameter(match["name"], name))
            if part == "down":
                return target
            return replace(target, piece=0 if part == "gate" else 1, pieces=2)
        parameter = self._parameter(name, name)
        shape = self._checkpoint.tensors[name].shape
        key = (_LAYER.sub("", name), shape)
        if key not in self._targets:
            self._targets[key] = self._probe(name, shape)
        return replace(self._targets[key], parameter=parameter)

    def _parameter(self, known: str, name: str) -> str:
        parameter = self._parameters.get(known)
        if parameter is None:
            raise UnsupportedModel(
                f"{self._checkpoint.place} holds a {self._checkpoint.model_type!r} model with the "
                f"tensor {name}, which transformers' model has no place for: without it, answers "
                "would be wrong. Use a folder with the original model."
            )
        return parameter

    @cached_property
    def _parameters(self) -> Mapping[str, str]:
        """The parameters of the model by the names in GGUF files."""
        has_experts = any(_EXPERTS.fullmatch(name) for name in self._checkpoint.tensors)
        kind: Any = Qwen2MoeTensorProcessor
        namer = kind() if has_experts else self._processor
        found: dict[str, str] = get_gguf_hf_weights_map(self._model, namer, self._architecture)
        return found

    def _probe(self, name: str, shape: tuple[int, ...]) -> Target:
        """Return what the processor does to a tensor, by giving it numbers of rows."""
        narrow = (shape[0], *(min(size, _PROBED_COLUMNS) for size in shape[1:]))
        numbers = np.arange(np.prod(narrow, dtype=np.int64), dtype=np.float64).reshape(narrow)
        try:
            done = self._process(numbers, name)
        except (ValueError, IndexError):  # it wants all columns
            return self._converted(name)
        if done.shape != narrow:
            return self._converted(name)
        rows = done.reshape(shape[0], -1)[:, 0] // (numbers.size // shape[0])
        if not np.array_equal(np.sort(rows), np.arange(shape[0])):
            return self._converted(name)
        order = rows.astype(np.int64)
        if not np.array_equal(numbers[order], done):
            return self._converted(name)
        if np.array_equal(order, np.arange(shape[0])):
            return Target("")
        return Target("", rows=torch.from_numpy(order))

    def _converted(self, name: str) -> Target:
        def convert(tensor: Tensor) -> Tensor:
            try:
                done = self._process(tensor.numpy(), name)
            except (ValueError, IndexError) as exc:
                raise CheckpointError(
                    f"{self._checkpoint.place}: tensor {name} has shape {list(tensor.shape)}, "
                    f"which does not fit what {self._checkpoint.described_by} say of the model. "
                    "The file is damaged: download it again, or use another file of the model."
                ) from exc
            return torch.from_numpy(np.ascontiguousarray(done))

        return Target("", convert=convert)

    def _process(self, numbers: "np.ndarray[Any, Any]", name: str) -> "np.ndarray[Any, Any]":
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        done = self._processor.process(
            numbers, name=name, tensor_key_mapping=self._parameters, parsed_parameters=parsed
        )
        if done.name is None:  # it has put it where it belongs by itself
            return next(iter(parsed["tensors"].values())).numpy()
        return np.asarray(done.weights)
