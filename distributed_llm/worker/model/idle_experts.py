"""Mixtures in which some experts pass states on as they are, as in LongCat-Flash.

transformers computes their experts in code of its own, and has room for half of the weights that
the idle ones would have. Here they have none, and the others are packed like those of all mixtures.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.experts import PACKED_AS, PackedExperts


class WorkingExperts(PackedExperts):
    """The experts that compute; all with higher numbers are idle."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [tokens, hidden_size]; see `PackedExperts.forward`."""
        k, device = top_k_index.shape[1], hidden_states.device
        idle = top_k_index >= len(self.up)
        total = hidden_states * (top_k_weights * idle).sum(dim=1, keepdim=True)
        choices = (~idle).flatten().nonzero()[:, 0]
        if len(choices):
            groups = self.groups(top_k_index.flatten()[choices].tolist())
            rows, places = (
                sent(torch.tensor(each), device) for each in (groups.rows, groups.places)
            )
            outputs = self.computed(groups, hidden_states[choices[rows] // k])[places]
            weighted = outputs * top_k_weights.flatten()[choices, None]
            total.index_add_(0, choices // k, weighted.to(total.dtype))
        return total.to(hidden_states.dtype)


def leave_out_idle_experts(model: nn.Module) -> None:
    """Have the stacks of experts in a model, on the meta device, end with those that compute."""
    for module in model.modules():
        if getattr(module, "zero_expert_num", 0) and hasattr(module, "num_routed_experts"):
            _leave_out_idle(module)


def _leave_out_idle(experts: Any) -> None:
    working = experts.gate_up_proj.detach()[: experts.num_routed_experts].clone()
    experts.gate_up_proj = nn.Parameter(working, requires_grad=False)
    experts.has_gate = True
    experts.has_bias = experts.has_post_expert_norm = experts.is_transposed = False
    experts._apply_gate = MethodType(_apply_gate, experts)
    setattr(experts, PACKED_AS, WorkingExperts)


def _apply_gate(experts: Any, states: Tensor) -> Tensor:
    gate, up = states.chunk(2, dim=-1)
    gated: Tensor = experts.act_fn(gate) * up
    return gated
