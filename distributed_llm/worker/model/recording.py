"""Records what a layer computes in a step: torch's operations, and calls of the C library.

Only operations are recorded that give the same for the same tensors, whatever else has happened. If
a layer does anything else (looks at numbers, or changes tensors), the recording says so and is of
no use.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_llm.worker.model.kernels.native.calls import (
    ConvolutionCall,
    NativeCall,
    RecurrenceCall,
)

_ATEN = torch.ops.aten

_MAKE_ROOM = frozenset(
    {_ATEN.new_empty.default, _ATEN.empty_like.default, _ATEN.empty.memory_format}
)
"""Give memory whose numbers do not count until something is written there."""

_PURE = frozenset(
    {
        *(
            _ATEN.add.Tensor,
            _ATEN.sub.Tensor,
            _ATEN.mul.Tensor,
            _ATEN.div.Tensor,
            _ATEN.neg.default,
        ),
        *(_ATEN.pow.Tensor_Scalar, _ATEN.rsqrt.default, _ATEN.mean.dim, _ATEN.square.default),
        *(_ATEN.silu.default, _ATEN.gelu.default, _ATEN.relu.default, _ATEN.sigmoid.default),
        *(_ATEN.tanh.default, _ATEN.layer_norm.default, _ATEN.rms_norm.default),
        *(_ATEN.cat.default, _ATEN.stack.default, _ATEN.repeat.default, _ATEN.clone.default),
        *(_ATEN.repeat_interleave.self_int, _ATEN.type_as.default),
        *(_ATEN.reshape.default, _ATEN.contiguous.default, _ATEN.to.dtype),
        *(_ATEN.linear.default, _ATEN.mm.default, _ATEN.addmm.default, _ATEN.matmul.default),
        *(_ATEN.softmax.int, _ATEN.topk.default, _ATEN.sum.dim_IntList, _ATEN.gather.default),
        *(_ATEN.zeros_like.default, _ATEN.masked_fill.Scalar, _ATEN.bitwise_not.default),
        *(_ATEN.clamp.default, _ATEN.exp.default, _ATEN.softplus.default, _ATEN.log.default),
        *(_ATEN.sin.default, _ATEN.cos.default, _ATEN.sqrt.default, _ATEN.rsub.Scalar),
        *(_ATEN.concatenate.default, _ATEN.where.self, _ATEN.gt.Scalar, _ATEN.maximum.default),
        *(_ATEN.baddbmm.default, _ATEN.max.dim),
    }
)

_CHANGES = frozenset(
    {
        *(_ATEN.div_.Tensor, _ATEN.mul_.Tensor, _ATEN.add_.Tensor, _ATEN.scatter_.value),
        *(_ATEN.copy_.default, _ATEN.addcmul_.default, _ATEN.sigmoid_.default),
    }
)
"""Change their first argument, and nothing else."""


@dataclass(frozen=True, slots=True)
class TorchCall:
    """A call of one of torch's operations, which made a tensor, or several."""

    function: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Tensor
    others: Sequence[Tensor] = ()


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What happens while this is entered, and whoever calls the C library tells it.

    Attributes:
        calls: that made a tensor, in order. They hold all tensors, so none takes the memory of
            another one.
        paused: what happens now is no part of what is recorded.
        failure: why the recording is of no use; None if it is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[TorchCall | NativeCall] = []
        self._rooms: list[Tensor] = []
        self.paused = False
        self.failure: str | None = None

    def called(self, call: NativeCall) -> None:
        """Record a call of the C library."""
        self.calls.append(call)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Carry out one of torch's operations, and record it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _MAKE_ROOM:
            self._rooms.append(output)
        elif not self.paused and not _is_view(func, args, output):
            made = list(tensors_in(output))
            if made and (_is_pure(func) or (func in _CHANGES and self._made(args[0]))):
                self.calls.append(TorchCall(func, args, kwargs, made[0], made[1:]))
            else:
                self.failure = f"it calls {func}"
        return output

    def _made(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies in memory that was made in what is recorded."""
        place = tensor.untyped_storage().data_ptr()
        made = itertools.chain(self._rooms, *map(made_by, self.calls))
        return any(each.untyped_storage().data_ptr() == place for each in made)


def made_by(call: TorchCall | NativeCall) -> Sequence[Tensor]:
    """Return the tensors that a call has made."""
    match call:
        case TorchCall():
            return (call.output, *call.others)
        case RecurrenceCall():
            return (call.output, call.made)
    return (call.output,)


def changed_by(call: TorchCall | NativeCall) -> Sequence[Tensor]:
    """Return the tensors that a call has changed."""
    if isinstance(call, ConvolutionCall):
        return (call.window,)
    is_change = isinstance(call, TorchCall) and call.function in _CHANGES
    return (call.output,) if is_change else ()


def _is_pure(func: Any) -> bool:
    return func in _PURE or func is torch.ops.mkldnn._linear_pointwise.default


def _is_view(func: Any, args: Sequence[Any], output: Any) -> bool:
    """Return whether an operation only looks at the memory of its first argument otherwise."""
    if func._schema.is_mutable or not args or not isinstance(args[0], Tensor):
        return False
    made = list(tensors_in(output))
    if not made or any(each.layout != torch.strided for each in (args[0], *made)):
        return False
    place = args[0].untyped_storage().data_ptr()
    return all(each.untyped_storage().data_ptr() == place for each in made)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
