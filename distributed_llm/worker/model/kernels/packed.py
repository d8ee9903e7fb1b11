"""Linear layers with weights prepacked for the CPU.

On a CPU whose oneDNN kernels are fast in the weights' dtype, each weight is reordered once, when
the model is loaded, into the order in which those kernels read it. `nn.Linear` keeps weights row by
row: oneDNN reorders them for every product, or torch calls another library. With few input rows, as
in decoding, reordering takes as long as the product or longer. The weight is kept only in the new
order, so it takes no more memory. `python -m benchmarks.kernels` measures the gain.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.kernels.opaque import OpaqueWeights

_SMALLEST_PACKED = 256 * 256
"""Elements of the smallest packed weight; with fewer, the 11 µs of any oneDNN call dominate."""

_TYPICAL_ROWS = 16
"""Number of input rows (tokens) that the packed order is made for.

It is fast for other numbers too. The order that oneDNN makes for 1 row is slow for more.
"""


class PackedLinear(OpaqueWeights):
    """A linear layer with a weight in oneDNN's order; its input has to be of the weight's dtype.

    Args:
        linear: the layer to replace; it keeps its own weight.

    Attributes:
        weight: [out_features, in_features], an opaque tensor without strides.
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
        """Bytes of memory that the weight takes, including padding to whole blocks."""
        return int(torch.ops.mkldnn._nbytes(self.weight))

    def tensors(self) -> list[Tensor]:
        """Return the weight."""
        return [self.weight]

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out_features] for states [..., in_features]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            states, self.weight, self.bias, "none", [], ""
        )
        return output


def fastest_linear(linear: nn.Linear) -> nn.Module:
    """Return a layer that computes what `linear` does, the fastest one on this machine.

    That may be `linear` itself; if not, its weight is not needed any more.
    """
    weight = linear.weight
    worth_it = weight.device.type == "cpu" and weight.numel() >= _SMALLEST_PACKED
    return PackedLinear(linear) if worth_it and _packing_helps(weight.dtype) else linear


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of `model` by packed ones where that is faster.

    Each weight is freed as soon as it is packed. A weight that another module reads too, such as a
    head that is tied to the embedding, stays as it is: packed, it would be in memory twice.
    """
    shared = _shared_weights(model)
    names = [
        name for name, _ in model.named_modules()
    ]  # a list of the modules themselves would keep all of them in memory
    for name in names:
        module = model.get_submodule(name)
        if type(module) is nn.Linear and id(module.weight) not in shared:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, fastest_linear(module))


@contextmanager
def kernels_for(num_tokens: int) -> Iterator[None]:
    """Choose the kernels of unpacked weights for a step of `num_tokens` tokens.

    With one row in bfloat16, oneDNN uses half of the memory bandwidth, and torch's own kernel all
    of it (1.2 ms against 0.6 ms for [5632, 2048] on two cores). From two rows on torch's kernel is
    slower. Packed layers are not affected. The switch is global to the process, so a stage that
    runs in another thread may get the slower kernel meanwhile, but never a wrong one.
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
    """Return the `id` of each parameter that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        shared |= seen & own
        seen |= own
    return shared


@functools.cache
def _packing_helps(dtype: torch.dtype) -> bool:
    """Return whether packed weights are faster on this machine in `dtype`.

    Decided by the processor's instruction set, so that a machine decides the same at every start.
    Packing was measured to be faster for any number of rows in float32 with AVX2 or AVX-512, and in
    bfloat16 with AVX512-BF16. A processor that emulates bfloat16 loses with one row what it gains
    with many.
    """
    onednn_here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if platform.machine() not in {"x86_64", "AMD64"} or not onednn_here:
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32 and torch.cpu._is_avx2_supported()
