"""Linear layers for the device they run on.

On a CPU that multiplies their dtype well, oneDNN is given each weight once, when the model is
loaded, in the order in which its kernels read it. `nn.Linear` keeps a weight row after row, and
oneDNN reorders it again for every product, or torch calls another library: when few rows are
multiplied, as in decoding, that costs as much as the product itself or more. The weight exists only
in the new order, so memory stays the same. `python -m benchmarks.kernels` shows what is gained.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SMALLEST_PACKED = 256 * 256
"""Elements of a weight; below this the 11 µs that any call of oneDNN takes are most of its time."""

_TYPICAL_ROWS = 16
"""Rows that oneDNN chooses the order for. It suits other numbers too; that for one row does not."""


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN reads it. Give it rows in the weight's dtype.

    Args:
        linear: what it computes; holds its own weight still.

    Attributes:
        weight: [out_features, in_features], opaque: it has a shape and a dtype, but no strides. Not
            a parameter, because nothing can be loaded into it.
        bias: [out_features], or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), _TYPICAL_ROWS
        )
        self.bias = linear.bias

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weight takes; rows and columns are filled up to whole blocks."""
        return int(torch.ops.mkldnn._nbytes(self.weight))

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out_features] for states [..., in_features]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            states, self.weight, self.bias, "none", [], ""
        )
        return output


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of `model` by packed ones where that is faster.

    Each weight is let go as soon as it is packed. A weight that another module reads too (the
    embedding, where the head is tied to it) stays as it is: packed it would exist twice.
    """
    shared = _shared_weights(model)
    names = [name for name, _ in model.named_modules()]  # a list of modules would hold them all
    for name in names:
        module = model.get_submodule(name)
        if type(module) is nn.Linear and _is_packable(module.weight, shared):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, PackedLinear(module))


def packed_nbytes(model: nn.Module) -> int:
    """Return the bytes of memory of all packed weights of `model`; they are no parameters."""
    return sum(m.weight_bytes for m in model.modules() if isinstance(m, PackedLinear))


@contextmanager
def kernels_for(num_tokens: int) -> Iterator[None]:
    """Choose, for weights that are not packed, the kernels for a step of `num_tokens` tokens.

    oneDNN multiplies one row in bfloat16 at half the speed of memory; torch's own kernel reads the
    weights as fast as memory gives them (0.6 against 1.2 ms for [5632, 2048] on two cores) but is
    slower from two rows on. Packed layers are not affected. The switch is the process's: a stage
    that runs in another thread at that moment gets the other kernel, which is slower or faster, not
    wrong.
    """
    onednn = torch.backends.mkldnn
    if num_tokens > 1 or not onednn.enabled:
        yield
        return
    onednn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        onednn.enabled = True  # type: ignore[assignment]


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        shared |= seen & own
        seen |= own
    return shared


def _is_packable(weight: Tensor, shared: set[int]) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.numel() >= _SMALLEST_PACKED
        and id(weight) not in shared
        and _packing_helps(weight.dtype)
    )


@functools.cache
def _packing_helps(dtype: torch.dtype) -> bool:
    """Say whether oneDNN is faster than what torch does by itself, on this machine, in this dtype.

    By what the processor can do, not by a measurement: a machine shall not choose differently from
    one start to the next. Measured faster were float32 with AVX2 and AVX-512, for any number of
    rows, and bfloat16 with AVX512-BF16. A processor that must emulate bfloat16 loses with one row
    what it gains with many.
    """
    onednn_here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if platform.machine() not in {"x86_64", "AMD64"} or not onednn_here:
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32 and torch.cpu._is_avx2_supported()
