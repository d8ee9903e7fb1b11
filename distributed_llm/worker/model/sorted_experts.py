"""Experts that get all rows for every expert, with zeros for those that they are not to compute.

So does transformers' Llama 4: each expert multiplies all tokens. What comes of a row of zeros is
zeros, so only the other rows are computed here, by experts that are packed one by one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.experts import PACKED_AS, PackedExperts

_SORTED = frozenset({"Llama4TextExperts"})
"""Names of transformers' classes that get sorted rows."""


class SortedExperts(PackedExperts):
    """Packed experts of a module that gets its rows sorted by expert."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Return what the experts make of rows, zeros of zeros.

        Args:
            hidden_states: [experts * tokens, hidden_size], the rows of each expert together.
        """
        tokens = len(hidden_states) // len(self.up)
        outputs = torch.zeros_like(hidden_states)
        chosen = hidden_states.ne(0).any(dim=-1).nonzero()[:, 0]
        if not len(chosen):
            return outputs
        groups = self.groups((chosen // tokens).tolist())
        device = hidden_states.device
        rows = chosen[sent(torch.tensor(groups.rows), device)]
        states = self.computed(groups, hidden_states[rows])
        outputs[chosen] = states[sent(torch.tensor(groups.places), device)]
        return outputs


def tell_of_sorted_experts(model: nn.Module) -> None:
    """Have experts that get sorted rows say how their stacks lie, as `expert_stacks` asks."""
    for module in model.modules():
        if type(module).__name__ in _SORTED:
            told: Any = module
            told.has_gate, told.has_bias, told.has_post_expert_norm = True, False, False
            told.is_transposed = True
            told._apply_gate = _Gate(told.act_fn)
            setattr(told, PACKED_AS, SortedExperts)


class _Gate:
    """Multiplies the second half of each row by what an activation makes of the first.

    Args:
        activation: of the gates.
    """

    def __init__(self, activation: nn.Module) -> None:
        self._activation = activation

    def __call__(self, states: Tensor) -> Tensor:
        """Return [rows, intermediate_size] of [rows, 2 * intermediate_size]."""
        gates, states = states.chunk(2, dim=-1)
        return self._activation(gates).mul_(states)  # type: ignore[no-any-return]
