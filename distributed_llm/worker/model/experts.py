"""Mixtures of experts whose matrices are packed one by one, like those of other layers.

transformers keeps the experts of a layer as two stacks of matrices, and multiplies by them as they
lie in memory. Here each matrix is a linear layer of its own, packed or of integers, so that an
expert costs what a dense layer of its size costs. The model's own router and its weights stay, and
so does what the module computes between its two products.

Only modules that transformers lets other functions compute (`use_experts_implementation`) are
replaced, because these say how their stacks lie. All others stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.kernels import fastest_linear
from distributed_llm.worker.model.kernels.native.experts import (
    MOST_ROWS,
    ExpertWeights,
    NativeWeight,
    experts_of,
)
from distributed_llm.worker.model.kernels.packed import CopiedLinear
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.linear import QuantLinear

_TOLD = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")
"""What a module says of itself if other functions may compute for it."""

PACKED_AS = "packed_as"
"""Attribute of a module that a subclass of `PackedExperts` always replaces: that class."""


_Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertStacks:
    """The stacks of matrices of a module of experts.

    Attributes:
        up: name of the parameter that multiplies the input of the experts.
        down: name of the parameter whose products are their output.
        transposed: the matrices are [in_features, out_features].
    """

    up: str
    down: str
    transposed: bool


def expert_stacks(module: nn.Module) -> ExpertStacks | None:
    """Return the stacks of a module of experts that `PackedExperts` can replace; else None."""
    if not all(hasattr(module, name) for name in _TOLD):
        return None
    told: Any = module
    up, down = "gate_up_proj" if told.has_gate else "up_proj", "down_proj"
    expected = {up: 3, down: 3}
    if told.has_bias:
        expected |= {f"{up}_bias": 2, f"{down}_bias": 2}
    if expected != {name: p.dim() for name, p in module.named_parameters(recurse=False)}:
        return None
    return ExpertStacks(up, down, bool(told.is_transposed))


class PackedExperts(nn.Module):
    """The experts of a layer, each with linear layers of its own.

    Args:
        gating: the module to replace, without its weights.
        up: by expert, the layer for the input.
        down: by expert, the layer for what `gating` makes of the products with `up`.

    Layers may have a `fewest_rows`: with fewer they are not faster, or even slower.
    """

    def __init__(
        self, gating: nn.Module, up: Sequence[nn.Module], down: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.gating: Any = gating
        self.up = nn.ModuleList(up)
        self.down = nn.ModuleList(down)
        # Called by themselves, without hooks: that and the lookup take as long as small products.
        self._up = [layer.forward for layer in up]
        self._down = [layer.forward for layer in down]
        self._library: tuple[ExpertWeights, ExpertWeights] | None = None
        self._asked_library = False
        self._fewest_rows = max(getattr(layer, "fewest_rows", 1) for layer in (up[0], down[0]))

    @classmethod
    def of(
        cls,
        experts: nn.Module,
        dtype: torch.dtype,
        *,
        up: AffineWeight | None = None,
        down: AffineWeight | None = None,
    ) -> "PackedExperts":
        """Return packed experts for a module that has `expert_stacks`; it loses its weights.

        Args:
            experts: the module to replace.
            dtype: of input and output.
            up: integers [experts, out_features, in_features] that stand for the module's stack, or
                None to pack that. An `input_order` may be of the stack or [experts, in_features].
            down: likewise.

        Raises:
            ValueError: no kernel has integers of this form.
        """
        stacks = expert_stacks(experts)
        assert stacks is not None
        layers = [
            _take_layers(experts, stacks.up, stacks.transposed, up, dtype),
            _take_layers(experts, stacks.down, stacks.transposed, down, dtype),
        ]
        kind: type[PackedExperts] = getattr(experts, PACKED_AS, cls)
        return kind(experts, *layers)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [tokens, hidden_size]: for each token, the weighted sum of its experts' outputs.

        Args:
            hidden_states: [tokens, hidden_size].
            top_k_index: [tokens, k], the experts of each token.
            top_k_weights: [tokens, k].
        """
        tokens, k = top_k_index.shape
        if tokens <= MOST_ROWS and hidden_states.dtype == torch.bfloat16:
            library = self._of_library()
            if library is not None:
                outputs = self._by_library(*library, hidden_states, top_k_index)
                outputs = outputs.view(tokens, k, -1)
                return (outputs * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)
        groups = self.groups(top_k_index.reshape(-1).tolist())
        device = hidden_states.device
        rows, places = (sent(torch.tensor(each), device) for each in (groups.rows, groups.places))
        outputs = self.computed(groups, hidden_states[rows // k])[places].view(tokens, k, -1)
        return (outputs * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)

    def groups(self, chosen: Sequence[int]) -> "RowGroups":
        """Return choices, sorted by expert.

        Args:
            chosen: by choice, the expert.
        """
        return grouped_rows(chosen, self._fewest_rows)

    def computed(self, groups: "RowGroups", states: Tensor) -> Tensor:
        """Return what experts make of the rows of `groups`, [rows, hidden_size]."""
        states = self._activated(_products(self._up, groups, states))
        return self._normed(_products(self._down, groups, states))

    def _of_library(self) -> "tuple[ExpertWeights, ExpertWeights] | None":
        """Return the weights, if the C library multiplies by those that rows choose.

        It is asked when the experts compute for the first time: before, weights may be moved.
        """
        if not self._asked_library:
            self._asked_library = True
            up, down = (
                experts_of([_native_weight(layer) for layer in layers])
                for layers in (self.up, self.down)
            )
            self._library = None if up is None or down is None else (up, down)
        return self._library

    def _by_library(
        self, up: ExpertWeights, down: ExpertWeights, states: Tensor, index: Tensor
    ) -> Tensor:
        """Return what the experts [tokens, k] of `index` make of states, [tokens * k, hidden_size].

        To the last bit what their layers make one by one; nothing depends on what was chosen but
        the numbers, so a step may be recorded.
        """
        chosen = index.reshape(-1)
        states = self._activated(up.products(states, chosen))
        return self._normed(down.products(states, chosen))

    def _activated(self, states: Tensor) -> Tensor:
        gating = self.gating
        made: Tensor = gating._apply_gate(states) if gating.has_gate else gating.act_fn(states)
        return made

    def _normed(self, states: Tensor) -> Tensor:
        gating = self.gating
        made: Tensor = gating.post_expert_norm(states) if gating.has_post_expert_norm else states
        return made


@dataclass(frozen=True)
class RowGroups:
    """Rows of input, sorted by expert.

    Attributes:
        experts: that have rows, in ascending order.
        sizes: the numbers of their rows.
        rows: the indices of these rows among all choices.
        places: of each choice, the index of its row in `rows`.
    """

    experts: list[int]
    sizes: list[int]
    rows: list[int]
    places: list[int]


def grouped_rows(chosen: Sequence[int], fewest: int) -> RowGroups:
    """Return the choices of all tokens, sorted by expert.

    Args:
        chosen: by choice, the expert.
        fewest: rows that an expert is given at least; it gets its first one again until it has as
            many. If the experts have more on average, only their own are given.
    """
    by_expert: dict[int, list[int]] = {}
    for choice, expert in enumerate(chosen):
        by_expert.setdefault(expert, []).append(choice)
    if len(chosen) >= fewest * len(by_expert):
        fewest = 1
    groups = RowGroups(sorted(by_expert), [], [], [0] * len(chosen))
    for expert in groups.experts:
        own = by_expert[expert]
        for place, choice in enumerate(own, start=len(groups.rows)):
            groups.places[choice] = place
        again = [own[0]] * (fewest - len(own))
        groups.rows.extend(own + again)
        groups.sizes.append(len(own) + len(again))
    return groups


def _native_weight(layer: nn.Module) -> NativeWeight | None:
    return layer.native_weight if isinstance(layer, QuantLinear | CopiedLinear) else None


def _products(layers: Sequence[_Product], groups: RowGroups, states: Tensor) -> Tensor:
    parts = zip(groups.experts, states.split_with_sizes(groups.sizes), strict=True)
    return torch.cat([layers[expert](own) for expert, own in parts])


def pack_experts(model: nn.Module) -> None:
    """Replace the modules of experts in `model` by packed ones where that is faster.

    A stack is freed as soon as its matrices are packed.
    """
    found = {name: expert_stacks(module) for name, module in model.named_modules()}
    for name, stacks in found.items():
        if stacks is None:
            continue
        module = model.get_submodule(name)
        matrices = [module.get_parameter(stack)[0] for stack in (stacks.up, stacks.down)]
        is_faster = not any(type(_linear(matrix, None)) is nn.Linear for matrix in matrices)
        if is_faster or hasattr(module, PACKED_AS):
            dtype = matrices[0].dtype
            del matrices
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, PackedExperts.of(module, dtype))


def _take_layers(
    experts: nn.Module,
    name: str,
    transposed: bool,
    integers: AffineWeight | None,
    dtype: torch.dtype,
) -> list[nn.Module]:
    """Return the linear layers that a stack consists of; the module loses stack and biases."""
    stack = experts.get_parameter(name).detach()
    biases = getattr(experts, f"{name}_bias", None)
    for attribute in (name, f"{name}_bias"):
        if hasattr(experts, attribute):
            delattr(experts, attribute)
    own: Iterator[Tensor | None] = iter([None] * len(stack) if biases is None else biases.detach())
    if integers is not None:
        return [QuantLinear.of(matrix, next(own), dtype) for matrix in _matrices(integers)]
    return [_linear(matrix.T if transposed else matrix, next(own)) for matrix in stack]


def _matrices(stack: AffineWeight) -> Iterator[AffineWeight]:
    order = stack.input_order
    for expert in range(len(stack.codes)):
        yield AffineWeight(
            stack.codes[expert],
            stack.scales[expert],
            stack.offsets[expert],
            stack.bits,
            order[expert] if order is not None and order.dim() == 2 else order,
        )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return fastest_linear(linear)
