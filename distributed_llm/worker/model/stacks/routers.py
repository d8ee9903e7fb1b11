"""Routers of Switch Transformers, which have no room for more tokens of a source than so many."""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_llm.worker.model.packed_step import running_step


class RouterLinear(nn.Linear):
    """Computes in float32 whatever the dtype of its weights, which stay as they are."""

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., experts], float32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(states.float(), self.weight.float(), bias)


def replace_router(router: Any) -> None:
    """Have a router count the tokens of each source of a packed step by themselves.

    Args:
        router: of transformers, without weights.
    """
    old = router.classifier
    new = RouterLinear(old.in_features, old.out_features, old.bias is not None, old.weight.device)
    new.weight, new.bias = old.weight, old.bias
    router.classifier = new
    router.forward = MethodType(_route, router)


def _route(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what transformers' router does.

    Tokens of answers are generated one by one there, so none of them finds its expert full.

    Args:
        router: of transformers.
        hidden_states: [1, tokens, hidden_size].

    Returns:
        Which expert each token goes to, int64 [1, tokens, experts], all 0 if that is full; the
        probability of it, [1, tokens, 1]; and the logits, float32 [1, tokens, experts].
    """
    logits = router.classifier(hidden_states)
    probabilities = torch.softmax(logits, dim=-1).to(hidden_states.dtype)
    chosen = F.one_hot(probabilities.argmax(dim=-1), router.num_experts)
    for part in running_step().slices:
        if part.is_source:
            rows = slice(part.row, part.row + part.num_tokens)
            chosen[:, rows] *= chosen[:, rows].cumsum(dim=-2) <= router.expert_capacity
    return chosen, probabilities.amax(dim=-1, keepdim=True), logits
