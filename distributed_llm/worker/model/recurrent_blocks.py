"""Recurrent blocks of RecurrentGemma (Griffin), with their state in a cache.

transformers keeps the state of such a block in attributes of its modules, for one batch of texts.
Here the block takes it from a cache and returns it there, as other mixers do (`state_layers`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_llm.worker.model.convolution import causal_conv1d_fn, convolved

_BLOCK = "RecurrentGemmaRecurrentBlock"


class RecurrentBlock(nn.Module):
    """A recurrent block that keeps no state.

    Args:
        block: of transformers.
        layer_idx: number of its layer in the model.
    """

    def __init__(self, block: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.block: Any = block
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: object
    ) -> tuple[Tensor, None]:
        """Return what the block makes of hidden states [sequences, tokens, hidden_size].

        Args:
            hidden_states: of tokens that follow one another.
            past_key_values: the cache, with the state of the sequences if they have begun.
            kwargs: for transformers' own blocks; ignored.
        """
        own, cache, layer = self.block, past_key_values, self.layer_idx
        begins = not cache.has_previous_state(layer)
        columns = own.linear_x(hidden_states).transpose(1, 2)
        window = cache.update_conv_state(columns, layer, conv_kernel_size=own.conv1d_width - 1)
        weight, bias = own.conv_1d.weight[:, 0], own.conv_1d.bias
        if begins:
            mixed = causal_conv1d_fn(columns, weight, bias)
        else:
            mixed = convolved(window, weight, bias, None)
        inputs, fading = _gated(own.rg_lru, mixed.transpose(1, 2), begins=begins)
        state = cache.get_recurrent_state(layer)
        outputs, state = _summed_up(inputs, fading, initial_state=state)
        cache.update_recurrent_state(state, layer)
        gate = own.act_fn(own.linear_y(hidden_states))
        return own.linear_out(outputs * gate), None


def replace_recurrent_blocks(layer: nn.Module, number: int) -> None:
    """Have the recurrent block of a layer, if it is one, keep its state in a cache.

    Args:
        layer: loaded.
        number: of the layer in the model.
    """
    for name, block in list(layer.named_children()):
        if type(block).__name__ == _BLOCK:
            setattr(layer, name, RecurrentBlock(block, number))


def _gated(unit: Any, states: Tensor, *, begins: bool) -> tuple[Tensor, Tensor]:
    """Return what goes into the recurrence, and by which factor its state fades before.

    Args:
        unit: transformers' recurrent unit, with the weights.
        states: [sequences, tokens, width].
        begins: whether nothing precedes the tokens.

    Returns:
        [sequences, tokens, width] each.
    """
    of_inputs = _gate(states, unit.input_gate_weight, unit.input_gate_bias)
    of_recurrence = _gate(states, unit.recurrent_gate_weight, unit.recurrent_gate_bias)
    logs = -8.0 * of_recurrence * F.softplus(unit.recurrent_param)
    fading, scale = torch.exp(logs), torch.sqrt(1 - torch.exp(2 * logs))
    if begins:
        fading[:, 0], scale[:, 0] = 0, 1
    return states * of_inputs * scale.to(states.dtype), fading


def _gate(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a gate for states; each block of their numbers has a matrix [rows, columns]."""
    blocks = states.reshape(-1, *bias.shape).transpose(0, 1)
    gates = torch.baddbmm(bias[:, None], blocks, weight).sigmoid_()
    return gates.transpose(0, 1).reshape(states.shape)


def _summed_up(
    inputs: Tensor, fading: Tensor, *, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the state after each token, and the last one in float32 [sequences, width]."""
    first = inputs[:, 0].float()
    state = torch.zeros_like(first) if initial_state is None else initial_state
    outputs = torch.empty_like(inputs)
    for token in range(inputs.shape[1]):
        state = fading[:, token].float() * state + inputs[:, token].float()
        outputs[:, token] = state
    return outputs, state
