"""Weights of 4 bits in the order of Arm's KleidiAI, which torch is built with on ARM."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.worker.model.kernels.layout import Kernel

_MIDDLE = 8
"""Code that the kernel takes for zero."""


class Int4Kleidi:
    """Codes and scales in one piece of memory, read by `_dyn_quant_matmul_4bit`.

    It rounds states to 8 bits, each row by its own range. What a group's middle code stands for
    apart from zero is multiplied by the sum of the group's states, in a small product beside.

    Args:
        codes: uint8 [out_features, in_features].
        scales: [out_features, groups]; groups are of 32 inputs or a multiple.
        offsets: [out_features, groups].

    Raises:
        NotImplementedError: this torch has no such kernel for this processor.
    """

    def __init__(self, codes: Tensor, scales: Tensor, offsets: Tensor) -> None:
        if not torch.backends.kleidiai.is_available():  # type: ignore[no-untyped-call]
            raise NotImplementedError("this torch was built without KleidiAI")
        self._channels, self._inputs = codes.shape
        self._groups = scales.shape[1]
        self._group = self._inputs // self._groups
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        # Scales of groups have to be bfloat16, those of whole channels float32.
        kept = scales.to(torch.bfloat16 if self._groups > 1 else torch.float32)
        self._packed: Tensor = torch.ops.aten._dyn_quant_pack_4bit_weight(
            *(packed, kept.contiguous(), None, self._group, self._inputs, self._channels)
        )
        if self._packed.dtype != torch.uint8:  # torch's reference, with 32 bits for each code
            raise NotImplementedError("KleidiAI has no kernel for this processor")
        self._middles = (offsets.float() + scales.float() * _MIDDLE).to(torch.bfloat16)

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel that reads this order."""
        return {"kleidi": self._product}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self._packed.nbytes + self._middles.nbytes

    def tensors(self) -> list[object]:
        """Return codes with scales, and what middle codes stand for."""
        return [self._packed, self._middles]

    def _product(self, states: Tensor) -> Tensor:
        states = states.float().contiguous()
        output: Tensor = torch.ops.aten._dyn_quant_matmul_4bit(
            *(states, self._packed, self._group, self._inputs, self._channels)
        )
        sums = states.view(len(states), self._groups, self._group).sum(-1)
        return output.add_(F.linear(sums.to(self._middles.dtype), self._middles))
