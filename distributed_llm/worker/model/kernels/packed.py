"""Linear layers with floating-point weights in the order that is the fastest on this machine.

`nn.Linear` keeps weights row by row. oneDNN reorders them for every product, or torch calls another
library: with few input rows, as in decoding, reordering takes as long as the product or longer. So
a weight may be reordered once, when the model is loaded. In bfloat16 it stays row by row: the C
library reads it so as fast as memory gives it, and with many input rows reordering hardly counts.
Without the library, and where oneDNN has no fast kernel for the weight's dtype, it is converted to
float32 block by block. Either way it is held once, so it takes no more memory.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_llm.worker.model.kernels.choice import ROWS, class_of
from distributed_llm.worker.model.kernels.layout import Kernel, product_in_blocks
from distributed_llm.worker.model.kernels.memory import in_own_mapping, new_memory
from distributed_llm.worker.model.kernels.native.experts import MOST_ROWS, NativeWeight
from distributed_llm.worker.model.kernels.native.rows import native_rows, row_product
from distributed_llm.worker.model.kernels.opaque import OpaqueWeights

_TYPICAL_ROWS = 16
"""Number of input rows (tokens) that the packed order is made for.

It is fast for other numbers too. The order that oneDNN makes for 1 row is slow for more.
"""

_FEWEST_ROWS = 4
"""From so many rows on oneDNN uses its fast kernels, which need no more time than for one row."""


# Whether `kernels_for` has switched oneDNN off in this context.
_switched_off: ContextVar[bool] = ContextVar("switched_off", default=False)


class FloatLinear(OpaqueWeights):
    """A linear layer with a floating-point weight, and kernels for each class of rows."""

    _METHODS: ClassVar[Mapping[str, str]]
    """For each kernel the name of its method; the first one is always right.

    Names, because a layer that held methods of its own would be freed by the garbage collector
    only.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight: Tensor = self._ordered(linear.weight.detach())
        self.bias = linear.bias
        self.use([next(iter(self._METHODS))] * len(ROWS))

    def use(self, names: Sequence[str]) -> None:
        """Set which kernel is used for each class of `ROWS`; the first for a name that none has."""
        first = next(iter(self._METHODS.values()))
        self._chosen = [self._METHODS.get(name, first) for name in names]

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernels that read this order, by name."""
        return {name: getattr(self, method) for name, method in self._METHODS.items()}

    def _ordered(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self.weight.nbytes

    def tensors(self) -> list[object]:
        """Return the weight."""
        return [self.weight]

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out_features] for states [..., in_features]."""
        rows = states.numel() // self.in_features
        if not rows:
            return states.new_empty(*states.shape[:-1], self.out_features)
        kernel: Kernel = getattr(self, self._chosen[class_of(rows)])
        if states.dim() == 2:  # experts call often, with few rows: the rest takes as long as these
            return kernel(states)
        output = kernel(states.reshape(rows, self.in_features))
        return output.view(*states.shape[:-1], self.out_features)


class PackedLinear(FloatLinear):
    """A linear layer with a weight in oneDNN's order; its input has to be of the weight's dtype.

    Args:
        linear: the layer to replace; it keeps its own weight.

    Attributes:
        weight: [out_features, in_features], an opaque tensor without strides.
        bias: [out_features], or None.
    """

    _METHODS = MappingProxyType({"onednn": "_product", "padded": "_padded"})

    @property
    def fewest_rows(self) -> int:
        """Rows below which they are repeated, so that who calls often had better repeat them."""
        return _FEWEST_ROWS if self._chosen[0] == self._METHODS["padded"] else 1

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes, including padding to whole blocks."""
        return int(torch.ops.mkldnn._nbytes(self.weight))

    def _ordered(self, weight: Tensor) -> Tensor:
        ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        return ordered

    def _product(self, states: Tensor) -> Tensor:
        output: Tensor = _onednn_product()(states, self.weight, self.bias, "none", [], "")
        return output

    def _padded(self, states: Tensor) -> Tensor:
        rows = len(states)
        if rows >= _FEWEST_ROWS:
            return self._product(states)
        return self._product(states.repeat(_FEWEST_ROWS, 1))[:rows]


@functools.cache
def _onednn_product() -> Callable[..., Any]:
    """Return oneDNN's product; finding it by its names takes as long as it with a small weight."""
    product: Callable[..., Any] = torch.ops.mkldnn._linear_pointwise.default
    return product


class RowLinear(FloatLinear):
    """A linear layer with a weight row by row, as `nn.Linear` holds it.

    Args:
        linear: the layer to replace; both have the same weight.

    Attributes:
        weight: [out_features, in_features].
        bias: [out_features], or None.
    """

    _METHODS = MappingProxyType({"linear": "_linear", "upcast": "_upcast"})

    def _ordered(self, weight: Tensor) -> Tensor:
        return weight

    def _linear(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight, self.bias)

    def _upcast(self, states: Tensor) -> Tensor:
        output = product_in_blocks(
            states.float(),
            (self.out_features, self.in_features),
            lambda start, stop: self.weight[start:stop],
        )
        return (output if self.bias is None else output + self.bias).to(states.dtype)


class CopiedLinear(RowLinear):
    """A linear layer with a weight row by row in memory of its own, not in that of a file.

    Memory in large pages is read faster, and who changes a file does not change the weight. What
    was read into such memory stays there: making room for a copy takes longer than reading.

    Args:
        linear: the layer to replace; it keeps its own weight.

    Attributes:
        weight: [out_features, in_features].
        bias: [out_features], or None.
    """

    _METHODS = MappingProxyType({"linear": "_linear", "upcast": "_upcast", "native": "_native"})

    def _ordered(self, weight: Tensor) -> Tensor:
        if in_own_mapping(weight) and weight.is_contiguous():
            return weight
        memory = new_memory(weight.nbytes)
        return memory.view(weight.dtype).view(weight.shape).copy_(weight)

    def _native(self, states: Tensor) -> Tensor:
        return row_product(states, self.weight, self.bias)

    @property
    def native_weight(self) -> NativeWeight | None:
        """The weight, if the C library multiplies a step's few rows of states by it."""
        few = self._chosen[: class_of(MOST_ROWS) + 1]
        return native_rows(self.weight, self.bias) if set(few) == {"_native"} else None


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
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)
        onednn.enabled = True  # type: ignore[assignment]


@contextmanager
def kernels_for_many_rows() -> Iterator[None]:
    """Choose, within a step of one token, the kernels that products of many rows need.

    Such are those of latent attention, where the queries of all heads are rows of one matrix:
    torch's own kernel takes a hundred times as long for them as oneDNN.
    """
    if not _switched_off.get():
        yield
        return
    onednn = torch.backends.mkldnn
    onednn.enabled = True  # type: ignore[assignment]
    try:
        yield
    finally:
        onednn.enabled = False  # type: ignore[assignment]
