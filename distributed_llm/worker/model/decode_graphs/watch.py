"""Tells whether what a step computes can be a graph: a GPU does not say what is wrong with it.

Some of it would even go unnoticed: numbers that are copied from the CPU's memory come from the same
place whenever a graph is launched, whatever lies there by then.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_llm.worker.model.recording import tensors_in

_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Of operations that give the CPU numbers, or a shape that depends on numbers."""

_BY_INDEX = frozenset(
    {
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put.default,
        torch.ops.aten.index_put_.default,
    }
)
"""Operations that count what is true if they are given truths for numbers of rows."""


class NotAGraph(Exception):
    """What was computed cannot be a graph; says which operation is to blame."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises `NotAGraph` at the first operation that a graph cannot have, while it is entered.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Carry out one of torch's operations, if a graph can have it."""
        kwargs = kwargs or {}
        given = list(tensors_in([*args, *kwargs.values()]))
        here = any(self._is_here(tensor) for tensor in given)
        if here and _reads(func, given):
            raise NotAGraph(f"{func} has the CPU wait for numbers")
        target = kwargs.get("device")
        devices = {tensor.device.type for tensor in given if tensor.dim()}
        if given and target is not None:
            devices.add(torch.device(target).type)
        if len(devices) > 1:  # a single number of the CPU's is part of a kernel's launch
            raise NotAGraph(f"{func} copies between {self._device} and the CPU")
        return func(*args, **kwargs)

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device.type


def _reads(func: Any, given: Sequence[Tensor]) -> bool:
    """Return whether the CPU takes from numbers what an operation gives, or how many there are."""
    if func in _BY_INDEX:
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
    return any(tag in func.tags for tag in _READS)
