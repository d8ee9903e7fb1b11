"""A linear layer whose weight is integers with scales."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm
from distributed_llm.worker.model.kernels import orders
from distributed_llm.worker.model.kernels.choice import Choice, Kind, class_of, size_of
from distributed_llm.worker.model.kernels.chosen import choice_for, is_worth_it
from distributed_llm.worker.model.kernels.gpu_check import facts_of, right_choice
from distributed_llm.worker.model.kernels.gpu_choice import Gpu, Integers
from distributed_llm.worker.model.kernels.gpu_orders import int4_layout, int8_layout
from distributed_llm.worker.model.kernels.layout import Kernel, Layout
from distributed_llm.worker.model.kernels.memory import new_bytes
from distributed_llm.worker.model.kernels.native import Blocks
from distributed_llm.worker.model.kernels.native.experts import NativeWeight
from distributed_llm.worker.model.kernels.opaque import OpaqueWeights
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.shared_states import SharedStates

_PLAIN = Choice("rows", ("upcast",) * 4)
"""What small weights use on a CPU; it is exact."""


class QuantLinear(OpaqueWeights):
    """A linear layer with a weight of 8 bits per channel, or of 4 bits in groups.

    It is held in the order, and computed by the kernels, that are the fastest on this machine. Some
    round the states to 8 bits, each row by itself.

    Args:
        layout: the weight.
        kernels: of `layout`, for each class of rows.
        shape: [out_features, in_features] of the weight.
        bias: [out_features], or None.
        input_order: see `AffineWeight`.
    """

    def __init__(
        self,
        layout: Layout,
        kernels: Sequence[Kernel],
        shape: tuple[int, int],
        bias: Tensor | None,
        input_order: Tensor | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._layout = layout
        self._kernels = kernels
        self._input_order = input_order
        self._shared: SharedStates | None = None
        self._number = 0

    @classmethod
    def of(cls, weight: AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> "QuantLinear":
        """Return the layer that multiplies by `weight`.

        Args:
            weight: a matrix that `INT8` or a form of 4 bits fits.
            bias: [out_features], or None.
            dtype: of input and output.

        Raises:
            ValueError: it fits no form.
        """
        channels, inputs = weight.codes.shape
        device, order = weight.codes.device, weight.input_order
        gpu = facts_of(device)
        choice, layout = _of_cpu(weight, dtype) if gpu is None else _of_gpu(weight, dtype, gpu)
        kernels = layout.kernels()
        first = next(iter(kernels.values()))
        return cls(
            layout,
            [kernels.get(name, first) for name in choice.kernels],
            (channels, inputs),
            None if bias is None else bias.to(dtype),
            None if order is None else order.to(device),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that codes, scales and offsets take."""
        order = self._input_order
        return self._layout.nbytes + (0 if order is None else order.nbytes)

    def tensors(self) -> list[object]:
        """Return what holds codes, scales and offsets."""
        return [*self._layout.tensors(), self._input_order]

    @property
    def blocks(self) -> Blocks | None:
        """The weight, if its products may be computed with those of others."""
        layout = self._layout
        return layout if isinstance(layout, Blocks) and self._input_order is None else None

    @property
    def native_weight(self) -> NativeWeight | None:
        """The weight, if the C library multiplies by it and nothing else is computed."""
        blocks = self.blocks
        return None if blocks is None or self.bias is not None else blocks.native_weight

    def share(self, shared: SharedStates, number: int) -> None:
        """Have products computed with those of others.

        Args:
            shared: has `blocks`, and those of others.
            number: of `blocks` among them.
        """
        self._shared, self._number = shared, number

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out_features] for states [..., in_features]."""
        count = states.numel() // self.in_features
        if not count:
            return states.new_empty(*states.shape[:-1], self.out_features)
        if self._shared is not None:
            output = self._shared.product(self._number, states)
        else:
            rows = states.reshape(count, self.in_features)
            if self._input_order is not None:
                rows = rows.index_select(1, self._input_order)
            output = self._kernels[class_of(count)](rows)
        if self.bias is not None:
            output = output + self.bias
        return output.to(states.dtype).view(*states.shape[:-1], self.out_features)


def _form(weight: AffineWeight) -> Literal["int8", "int4"]:
    if weight.fits(INT8):
        return "int8"
    if any(weight.fits(WeightForm(4, group)) for group in INT4_GROUPS):
        return "int4"
    raise ValueError(f"no kernel has {weight.bits} bits in groups of {weight.group}")


def _of_cpu(weight: AffineWeight, dtype: torch.dtype) -> tuple[Choice, Layout]:
    form, choice = _form(weight), _PLAIN
    if is_worth_it(weight.codes):
        choice = choice_for(Kind(form, "", size_of(weight.codes.numel())))
    if form == "int8":
        return choice, orders.INT8[choice.order](*_of_channels(weight))
    kept = torch.float32 if dtype == torch.float32 else torch.bfloat16
    make = orders.INT4[choice.order]
    return choice, make(weight.codes, weight.scales, weight.offsets, kept)


def _of_gpu(weight: AffineWeight, dtype: torch.dtype, gpu: Gpu) -> tuple[Choice, Layout]:
    form = _form(weight)
    group = weight.group if form == "int4" else 0
    channels, inputs = weight.codes.shape
    facts = Integers(form, channels, inputs, group, str(dtype).removeprefix("torch."))
    choice = right_choice(gpu, facts, weight.codes.device)
    if form == "int8":
        return choice, int8_layout(choice, *_of_channels(weight), dtype)
    parts = weight.codes, weight.scales, weight.offsets
    return choice, int4_layout(choice, gpu, *parts, dtype)


def _of_channels(weight: AffineWeight) -> tuple[Tensor, Tensor]:
    """Return codes of 8 bits, less 128, as int8, and the scales of output channels."""
    codes = new_bytes(weight.codes.shape, weight.codes.device)
    torch.bitwise_xor(weight.codes, 128, out=codes)
    return codes.view(torch.int8), weight.scales[:, 0].contiguous()


def share_states(model: nn.Module) -> None:
    """Let the layers of `model` that have a parent in common share the states they may share."""
    for parent in model.modules():
        alike: dict[object, list[tuple[QuantLinear, Blocks]]] = {}
        for layer in parent.children():
            if isinstance(layer, QuantLinear) and (weight := layer.blocks) is not None:
                alike.setdefault(weight.alike, []).append((layer, weight))
        for found in alike.values():
            if len(found) > 1:
                shared = SharedStates([weight for _, weight in found])
                for number, (layer, _) in enumerate(found):
                    layer.share(shared, number)
