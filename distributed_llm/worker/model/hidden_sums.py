"""Sums of the model's last hidden states, as they come out of its final norm."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Spans = Sequence[tuple[int, int]]
"""Rows [start, stop) of a packed batch."""


class HiddenSums:
    """A hook on the part of a model without the head: what that returns is summed up over spans.

    It refers to no module: the cycle would keep their memory until the next garbage collection.

    Args:
        decoder: with the model's final norm; transformers' `AutoModel` of the same checkpoint.

    Attributes:
        spans: to sum up over in the next pass.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.spans: Spans = ()
        self._sums: Tensor | None = None
        decoder.register_forward_hook(self._sum_up)

    def take(self) -> Tensor | None:
        """Return the sums of the latest pass, float32 [spans, width], and forget them."""
        sums, self._sums = self._sums, None
        return sums

    def _sum_up(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if not self.spans:
            return
        hidden = output[0][0]  # [tokens, width]
        parts = [hidden[start:stop].to(torch.float32).sum(dim=0) for start, stop in self.spans]
        self._sums = torch.stack(parts)
