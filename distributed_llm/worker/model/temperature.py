"""Tells layers without rotary positions where the tokens of packed sequences stand.

Some such layers scale their queries by the position of the token. transformers' code counts it from
the length of its cache, which packed sequences have none of.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.packed_step import PackedStep, running_step


def tell_positions(model: nn.Module) -> None:
    """Have the attention of a model that scales by position know that of each packed token."""
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
            module.register_forward_pre_hook(_give_positions, with_kwargs=True)


class _Positions:
    """What transformers' attention asks its cache for; it keeps nothing.

    Args:
        device: of the layer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def get_seq_length(self, layer: int) -> Tensor:
        """Return how far each token of the packed row is behind its place in it, int64 [tokens]."""
        return _ahead_of_rows(running_step(), self._device)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return these keys and values."""
        return keys, values


def _give_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "past_key_values": _Positions(states.device)}


def _ahead_of_rows(step: PackedStep, device: torch.device) -> Tensor:
    made = step.made.get("ahead of rows")
    if not isinstance(made, Tensor):
        starts = torch.tensor([part.start - part.row for part in step.slices])
        counts = torch.tensor([part.num_tokens for part in step.slices])
        made = step.made["ahead of rows"] = sent(starts.repeat_interleave(counts), device)
    return made
