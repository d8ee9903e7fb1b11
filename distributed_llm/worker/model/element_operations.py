"""Operations of torch on single numbers of bfloat16, as the C library carries them out."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native.replay import DIMENSIONS, Kind, Operation
from distributed_llm.worker.model.recording import TorchCall

_ATEN = torch.ops.aten

_NUMBERS = 1 << 16
"""How many numbers of bfloat16 there are."""


class Elements(NamedTuple):
    """Elements of a tensor that are computed from those of others.

    Attributes:
        kind: how.
        output: what is computed.
        first: operand of the output's shape.
        second: likewise; or a number for all; None if there is none.
        table: bfloat16 [65536], of what each number becomes, by its bits; None if there is none.
    """

    kind: Kind
    output: Tensor
    first: Tensor
    second: Tensor | float | None = None
    table: Tensor | None = None


def elements_of(call: TorchCall) -> list[Elements] | None:
    """Return what a call computes; None if the C library does not compute it."""
    convert = _CONVERTERS.get(call.function)
    return None if convert is None else convert(call)


def new_operation(
    kind: Kind, output: Tensor, first: Tensor, second: Tensor | float | None
) -> Operation:
    """Return an operation on elements without its addresses."""
    operation = Operation(kind=kind)
    tensors = [output, first, *([second] if isinstance(second, Tensor) else [])]
    sizes, strides = _collapsed(output.shape, [tensor.stride() for tensor in tensors])
    operation.sizes[:DIMENSIONS] = sizes
    for number, of_one in enumerate(strides):
        operation.strides[number][:] = of_one
    if isinstance(second, float):
        operation.number = second
    return operation


def _collapsed(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """Return shape and strides in as few dimensions as can be, at the end of `DIMENSIONS`."""
    sizes: list[int] = []
    steps: list[list[int]] = []  # of each dimension, the last one first
    for dimension in reversed(range(len(shape))):
        size, step = shape[dimension], [each[dimension] for each in strides]
        if size == 1:
            continue
        if sizes and step == [inner * sizes[-1] for inner in steps[-1]]:
            sizes[-1] *= size
        else:
            sizes.append(size)
            steps.append(step)
    missing = DIMENSIONS - len(sizes)
    whole = [1] * missing + sizes[::-1]
    ordered = [[0] * len(strides)] * missing + steps[::-1]
    return whole, [[step[number] for step in ordered] for number in range(len(strides))]


def _fits(*tensors: Tensor) -> bool:
    """Return whether these are tensors that the C library takes."""
    return all(
        each.dtype == torch.bfloat16
        and each.layout == torch.strided
        and each.dim() <= DIMENSIONS
        and each.numel() > 0
        for each in tensors
    )


def _copies(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Elements] | None:
    if not all(_fits(output, first) for output, first in pairs):
        return None
    return [Elements(Kind.COPY, output, first) for output, first in pairs]


def _combined(kind: Kind) -> Callable[[TorchCall], list[Elements] | None]:
    def convert(call: TorchCall) -> list[Elements] | None:
        first, second = call.args
        if call.kwargs or not _fits(call.output):
            return None
        operands = [each for each in (first, second) if isinstance(each, Tensor)]
        if not all(each.dtype == torch.bfloat16 for each in operands):
            return None
        whole = [each.expand(call.output.shape) for each in operands]
        if len(whole) == 1:
            number = float(second)
            if kind is Kind.ADD:  # torch rounds what it adds, not what it multiplies by
                number = float(torch.tensor(number).to(torch.bfloat16))
            return [Elements(kind, call.output, whole[0], number)]
        whole.sort(key=lambda tensor: tensor.stride()[-1:] == (0,))  # a row, and what it is with
        return [Elements(kind, call.output, *whole)]

    return convert


def _negated(call: TorchCall) -> list[Elements] | None:
    if not _fits(call.output):
        return None
    return [Elements(Kind.MULTIPLY, call.output, call.args[0], -1.0)]


def _looked_up(call: TorchCall) -> list[Elements] | None:
    first, *others = call.args
    if not _fits(call.output, first):
        return None
    how = call.function, tuple(others), tuple(call.kwargs.items())
    table = _table(*how, bool(torch.backends.mkldnn.enabled))
    return [Elements(Kind.LOOK_UP, call.output, first, table=table)]


@functools.cache
def _table(
    function: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], onednn: bool
) -> Tensor:
    """Return what a function makes of all numbers, in the order of their bits.

    With oneDNN, which `kernels_for` switches, some functions differ in a few numbers.
    """
    numbers = torch.arange(_NUMBERS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    table: Tensor = function(numbers, *args, **dict(kwargs))
    return table


def _joined(call: TorchCall) -> list[Elements] | None:
    parts, dimension = call.args[0], call.args[1] if len(call.args) > 1 else 0
    sizes = [part.shape[dimension] for part in parts]
    pairs = zip(torch.split_with_sizes(call.output, sizes, dimension), parts, strict=True)
    return _copies([(output, part) for output, part in pairs if part.numel()])


def _copied(call: TorchCall) -> list[Elements] | None:
    first = call.args[0]
    if not call.output.is_contiguous():
        return None
    return _copies([(call.output.view(first.shape), first)])


def _repeated(call: TorchCall) -> list[Elements] | None:
    first, times = call.args
    if first.dim() != 2 or len(times) != 2 or times[1] != 1:
        return None
    whole = first.expand(times[0], *first.shape)
    return _copies([(call.output.view(whole.shape), whole)])


_CONVERTERS: Mapping[Any, Callable[[TorchCall], list[Elements] | None]] = {
    _ATEN.add.Tensor: _combined(Kind.ADD),
    _ATEN.mul.Tensor: _combined(Kind.MULTIPLY),
    _ATEN.neg.default: _negated,
    _ATEN.cat.default: _joined,
    _ATEN.concatenate.default: _joined,
    **dict.fromkeys(
        (_ATEN.clone.default, _ATEN.contiguous.default, _ATEN.reshape.default), _copied
    ),
    _ATEN.repeat.default: _repeated,
    **dict.fromkeys(
        (
            *(_ATEN.silu.default, _ATEN.gelu.default, _ATEN.relu.default),
            *(_ATEN.sigmoid.default, _ATEN.tanh.default, _ATEN.square.default),
            _ATEN.pow.Tensor_Scalar,
        ),
        _looked_up,
    ),
}
