"""torch's operations that call Arm's KleidiAI, made up after what its own reference computes."""

import pytest
import torch
from torch import Tensor


def offer(patch: pytest.MonkeyPatch, operations: "Operations") -> None:
    """Let this torch count as one that was built with KleidiAI, for a processor that it knows."""
    patch.setattr(torch.backends.kleidiai, "is_available", lambda: True)
    patch.setattr(torch.ops.aten, "_dyn_quant_pack_4bit_weight", operations.pack)
    patch.setattr(torch.ops.aten, "_dyn_quant_matmul_4bit", operations.product)


class Operations:
    """Codes and scales one after another, as bytes; the real order is another one."""

    def pack(
        self,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        group: int,
        inputs: int,
        channels: int,
    ) -> Tensor:
        """Pack uint8 [channels, inputs / 2] as `_dyn_quant_pack_4bit_weight` does."""
        assert codes.dtype == torch.uint8
        assert codes.is_contiguous()
        assert scales.is_contiguous()
        assert bias is None
        assert codes.shape == (channels, inputs // 2)
        assert scales.shape == (channels, inputs // group)
        assert group % 32 == 0
        assert scales.dtype == (torch.float32 if group == inputs else torch.bfloat16)
        return torch.cat([codes.flatten(), scales.float().flatten().view(torch.uint8)])

    def product(
        self, states: Tensor, packed: Tensor, group: int, inputs: int, channels: int
    ) -> Tensor:
        """Multiply as `_dyn_quant_matmul_4bit` does: a row's states are rounded by its range."""
        assert states.dtype == torch.float32
        assert states.is_contiguous()
        assert packed.dtype == torch.uint8
        size = channels * inputs // 2
        codes = torch.stack((packed[:size] & 15, packed[:size] >> 4), -1).float() - 8
        scales = packed[size:].clone().view(torch.float32).view(channels, -1, 1)
        weight = (codes.view(channels, -1, group) * scales).view(channels, inputs)
        least = states.amin(1, keepdim=True).clamp_max(0)
        most = states.amax(1, keepdim=True).clamp_min(0)
        step = (most - least).clamp_min(1e-30) / 255
        zero = (-128 - least / step).round()
        rounded = ((states / step).round() + zero).clamp(-128, 127) - zero
        return (rounded * step) @ weight.T
