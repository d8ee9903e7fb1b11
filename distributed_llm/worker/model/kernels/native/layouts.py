"""Weights of integers in the orders that the C library reads; products.h describes them."""

import itertools
import math
from array import array
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.worker.model.kernels.layout import Kernel
from distributed_llm.worker.model.kernels.memory import new_memory
from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.calls import ProductsCall, tell
from distributed_llm.worker.model.kernels.native.experts import NativeWeight

_LANES = 16
"""Output channels of a block."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Blocks:
    """A weight in blocks of 16 output channels; see its kinds below.

    Args:
        function: of the library.
        shape: [out_features, in_features].
        group: what `function` is told beside the shape.
        kept: codes, and numbers of theirs, as the library reads them.

    Attributes:
        alike: equal for weights that one call can multiply by the same states.
        channels: output channels.
    """

    def __init__(
        self,
        function: library.Product,
        shape: tuple[int, int],
        group: tuple[int, ...],
        kept: tuple[Tensor, Tensor],
    ) -> None:
        self.channels, inputs = shape
        self.alike = (function, inputs, group)
        self._codes, self._scales = self._kept = kept

    @property
    def described(self) -> tuple[int, int, int]:
        """The weight, as the library reads it; where it lies now, for tensors may be moved."""
        return self._codes.data_ptr(), self._scales.data_ptr(), self.channels

    @property
    def native_weight(self) -> NativeWeight | None:
        """The weight where it lies now; None if states have to be longer than its inputs."""
        function, inputs, group = self.alike
        if inputs % 4:
            return None
        return NativeWeight(
            function, (self.channels, inputs), max(group, default=0), self.described
        )

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel that reads this order."""
        return {"native": self._product}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(tensor.nbytes for tensor in self._kept)

    def tensors(self) -> list[object]:
        """Return what holds codes, scales and offsets."""
        return list(self._kept)

    def _product(self, states: Tensor) -> Tensor:
        return _multiply(states, self.alike, [self.described], self.channels)


class Int8Blocks(Blocks):
    """Codes of 8 bits with a scale for each channel, in blocks of 16 channels.

    States are rounded to 8 bits, 64 of them at a time by their largest magnitude.

    Args:
        codes: int8 [out_features, in_features].
        scales: float32 [out_features].
        instructions: of the processor, see `library.NAMES`; None: the best it has.

    Raises:
        library.Missing: this machine cannot compute so.
    """

    def __init__(self, codes: Tensor, scales: Tensor, instructions: str | None = None) -> None:
        function = library.function("int8_products", instructions or library.instructions())
        channels, inputs = codes.shape
        fours = F.pad(codes, (0, -inputs % 4)) if inputs % 4 else codes.contiguous()
        ordered = _new_blocks(channels, fours.shape[1] // 4)
        library.loaded().pack_int8(
            *(fours.data_ptr(), ordered.data_ptr(), channels, fours.shape[1] // 4),
            torch.get_num_threads(),
        )
        super().__init__(function, (channels, inputs), (), (ordered, scales.contiguous()))


class Int4Blocks(Blocks):
    """Codes of 4 bits with scale and offset for each group of inputs, in blocks of 16 channels.

    States are rounded to 8 bits, a group at a time by their largest magnitude. Scales and offsets
    are float16, times one power of two for the whole weight that brings them into its range.

    Args:
        codes: uint8 [out_features, in_features], from 0 to 15.
        scales: [out_features, groups]; groups are of 8 inputs or a multiple.
        offsets: [out_features, groups].
        instructions: of the processor, see `library.NAMES`; None: the best it has.

    Raises:
        library.Missing: this machine cannot compute so.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, offsets: Tensor, instructions: str | None = None
    ) -> None:
        function = library.function("int4_products", instructions or library.instructions())
        channels, inputs = codes.shape
        groups = scales.shape[1]
        group = inputs // groups
        codes = codes.contiguous()
        scales, offsets = scales.float().contiguous(), offsets.float().contiguous()
        factor = _power_of_two(scales, offsets)
        ordered = _new_blocks(channels, groups * (1 + group // 8))
        library.loaded().pack_int4(
            *(codes.data_ptr(), scales.data_ptr(), offsets.data_ptr(), ordered.data_ptr()),
            *(channels, groups, group, factor, torch.get_num_threads()),
        )
        kept = ordered, torch.tensor([factor])
        super().__init__(function, (channels, inputs), (group,), kept)


class JointProduct:
    """The products of some states with several weights, in one call.

    Args:
        weights: not empty, of which `alike` is the same.
    """

    def __init__(self, weights: Sequence[Blocks]) -> None:
        self._alike = weights[0].alike
        self._channels = [weight.channels for weight in weights]
        self._all_channels = sum(self._channels)
        self._weights = weights

    def __call__(self, states: Tensor) -> list[Tensor]:
        """Return the product with each weight, [rows, out_features], to the last bit as alone.

        Args:
            states: [rows, in_features].
        """
        described = [weight.described for weight in self._weights]
        output = _multiply(states, self._alike, described, self._all_channels)
        if states.shape[0] == 1:
            return list(torch.split_with_sizes(output, self._channels, 1))
        sizes = [states.shape[0] * channels for channels in self._channels]
        parts = torch.split_with_sizes(output.view(-1), sizes)
        return [part.view(states.shape[0], -1) for part in parts]


def _new_blocks(channels: int, units: int) -> Tensor:
    """Return memory for blocks, int32 [blocks, 16 * units]; a channel has `units` of 4 bytes."""
    blocks = (channels + _LANES - 1) // _LANES
    return new_memory(blocks * _LANES * units * 4).view(torch.int32).view(blocks, -1)


def _multiply(
    states: Tensor,
    alike: tuple[library.Product, int, tuple[int, ...]],
    weights: Sequence[tuple[int, int, int]],
    channels: int,
) -> Tensor:
    """Return the products [rows, channels] with weights that have so many channels in all.

    With several weights, the product with the first one comes first, whole.
    """
    function, inputs, group = alike
    library.check_width(states, inputs)
    if states.dtype not in _DTYPES:
        states = states.float()
    if inputs % 4:
        states = F.pad(states, (0, -inputs % 4))
    states = states.contiguous()
    output = states.new_empty(states.shape[0], channels)
    table = array("q", itertools.chain.from_iterable(weights))
    function(
        *(states.data_ptr(), output.data_ptr(), table.buffer_info()[0], len(weights)),
        *(*states.shape, *group, _DTYPES[states.dtype], torch.get_num_threads()),
    )
    kind = function.name, function.instructions
    tell(ProductsCall(*kind, states, output, table, len(weights), group))
    return output


def _power_of_two(scales: Tensor, offsets: Tensor) -> float:
    """Return 2**n such that float16 has room for both, divided by it, with bits to spare."""
    most = library.loaded().largest_magnitude
    largest = max(1e-30, *(most(each.data_ptr(), each.numel()) for each in (scales, offsets)))
    _, exponent = math.frexp(largest)
    return float(2.0**exponent) / 2**12
