"""Convolutions of each channel with a few of its latest columns, as mixers of hybrids call them.

On CPUs torch computes such a convolution channel by channel, which takes longer than all the rest
of a small layer. As a sum of as many products as the window has columns, it is as quick as reading.
The C library computes a single column of bfloat16.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.activations import ACT2FN

from distributed_llm.worker.model.kernels.native.recurrences import can_convolve, convolve

_BY_LIBRARY = (None, "silu", "swish")
"""Activations that the C library has."""


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Return the convolution of new columns behind those of a window, which moves on.

    Args:
        hidden_states: [sequences, channels, tokens].
        conv_state: [sequences, channels, columns]; written.
        weight: [channels, width].
        bias: [channels].
        activation: transformers' name of what is applied to the result.
    """
    if activation in _BY_LIBRARY and can_convolve(hidden_states, conv_state, weight, bias):
        silu = activation is not None
        return convolve(hidden_states, conv_state, weight, bias, silu=silu)
    columns = torch.cat([conv_state, hidden_states], dim=-1)
    conv_state.copy_(columns[..., -conv_state.shape[-1] :])
    tokens = hidden_states.shape[-1]
    needed = columns[..., -(tokens + weight.shape[-1] - 1) :]
    return convolved(needed, weight, bias, activation)


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: object,
) -> Tensor:
    """Return the convolution of columns [sequences, channels, tokens] that nothing precedes."""
    return convolved(pad(hidden_states, (weight.shape[-1] - 1, 0)), weight, bias, activation)


class DilatedConvolution(nn.Module):
    """A convolution of each channel with columns that are some way apart, as `nn.Conv1d`.

    Args:
        convolution: without a bias, and without padding of its own.
    """

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        given: Any = convolution
        self.weight: nn.Parameter = given.weight
        (self._apart,) = given.dilation

    def forward(self, columns: Tensor) -> Tensor:
        """Return a column for each but the first of columns [sequences, channels, tokens]."""
        return convolved(columns, self.weight[:, 0], None, None, apart=self._apart)


def convolved(
    columns: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, apart: int = 1
) -> Tensor:
    """Return a column for each but the first (width - 1) * apart; sums are made in float32."""
    width = weight.shape[-1]
    tokens = columns.shape[-1] - (width - 1) * apart
    by_column = weight.float()[:, :, None]
    total = columns[..., :tokens].float() * by_column[:, 0]
    for number in range(1, width):
        total.addcmul_(
            columns[..., number * apart : number * apart + tokens].float(), by_column[:, number]
        )
    if bias is not None:
        total += bias[:, None]
    rounded = total.to(columns.dtype)
    return rounded if activation is None else ACT2FN[activation](rounded)
