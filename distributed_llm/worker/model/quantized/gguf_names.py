"""Says where the tensors of GGUF files belong in a model of transformers.

llama.cpp's converter gives other names, and to some tensors other values: it orders the rows of
queries and keys otherwise, adds 1 to some norms, and keeps gates and ups of experts apart. Names
and values are led back by transformers' own tables. They work on floating-point numbers; what they
do to integers is found out by giving them numbers of rows.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.worker.model.quantized.gguf_changes import CHANGES
from distributed_llm.worker.model.quantized.gguf_layouts import (
    KNOWN_AS,
    more_names,
    parts_of,
    piece_of,
    stack_of,
    usual_name,
)
from distributed_llm.worker.model.quantized.targets import Target

_LAYER = re.compile(r"^blk\.\d+\.")
_AS_OTHERS = {
    "gemma": "gemma2",
    **dict.fromkeys(("arcee", "granite", "granitemoe", "mistral3", "smollm3"), "llama"),
    "lfm2moe": "lfm2",
}
"""Architectures whose values are changed like those of others that transformers has a table for."""

_PROBED_COLUMNS = 2


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

    def targets(self, name: str) -> tuple[Target, ...]:
        """Return what becomes of tensor `name`; several things if it is several parameters.

        Raises:
            UnsupportedModel: it belongs nowhere: the file holds another model than its metadata
                say, so that answers would be wrong.
        """
        parameters = self._parameters.get(usual_name(name, self._architecture))
        if parameters is None:
            raise UnsupportedModel(
                f"{self._checkpoint.place} holds a {self._checkpoint.model_type!r} model with the "
                f"tensor {name}, which transformers' model has no place for: without it, answers "
                "would be wrong. Use a folder with the original model."
            )
        shape = self._checkpoint.tensors[name].shape
        if len(parameters) > 1:
            return parts_of(parameters, [self._shapes[one] for one in parameters], len(shape))
        leaf = _LAYER.sub("", name)
        if (leaf, shape) not in self._targets:
            self._targets[leaf, shape] = self._probe(name, shape)
        target = replace(self._targets[leaf, shape], parameter=parameters[0])
        if (piece := piece_of(leaf, target.parameter, self._architecture)) is not None:
            stack = stack_of(parameters[0], self._checkpoint.config)
            target = replace(target, piece=piece[0], join=piece[1], stack=stack)
        return (target,)

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the parameters of the model."""
        return {name: tuple(one.shape) for name, one in self._model.state_dict().items()}

    @cached_property
    def _known(self) -> Mapping[str, str]:
        """The parameters of the model by the names of tensors that transformers or gguf know."""
        known = KNOWN_AS.get(self._architecture, self._architecture)
        return dict(get_gguf_hf_weights_map(self._model, self._processor, known))

    @cached_property
    def _parameters(self) -> Mapping[str, tuple[str, ...]]:
        """The parameters of the model by the names in GGUF files; several if they are one there."""
        more: dict[str, list[str]] = {}
        for parameter in self._shapes:
            for name in more_names(parameter):
                more.setdefault(name, []).append(parameter)
        return {name: (one,) for name, one in self._known.items()} | {
            name: tuple(several) for name, several in more.items()
        }

    def _probe(self, name: str, shape: tuple[int, ...]) -> Target:
        """Return what the processor does to a tensor, by giving it numbers of rows."""
        narrow = (shape[0], *(min(size, _PROBED_COLUMNS) for size in shape[1:]))
        numbers = np.arange(np.prod(narrow, dtype=np.int64), dtype=np.float64).reshape(narrow)
        try:
            with np.errstate(all="ignore"):  # logarithms, of numbers that are none of theirs
                done = self._process(numbers, name)
        except (ValueError, IndexError):  # it wants all columns
            return self._converted(name)
        if done.shape != narrow or not np.isfinite(done).all():
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
        if (change := CHANGES.get(self._architecture)) is not None:
            return change(numbers, name, self._checkpoint.config)
        if "_exps." in name:
            return numbers  # gates and ups are joined elsewhere
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        done = self._processor.process(
            numbers, name=name, tensor_key_mapping=self._known, parsed_parameters=parsed
        )
        if done.name is None:  # it has put it where it belongs by itself
            return next(iter(parsed["tensors"].values())).numpy()
        return np.asarray(done.weights)
