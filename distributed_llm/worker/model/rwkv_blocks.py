"""Blocks of RWKV-4, with their state in a cache.

transformers keeps the state of all blocks in tensors that the model is given, as wide as the whole
model, and mixes up the texts of a batch of single tokens. Here each block takes its own state from
a cache and returns it there, as other mixers do (`state_layers`).

Hidden states are halved after every few blocks, so that they stay within float16. For that the
model divides matrices when it first runs, and counts the blocks that it has. Here a block does
both, by its number in the whole model, and divides what is multiplied by such a matrix: the same,
to the last bit, and right for matrices that have become integers, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

_BLOCK = "RwkvBlock"

_BEFORE_ALL = -1e38
"""Exponent of the sums before the first token, in which nothing is."""


class RwkvLayer(nn.Module):
    """A block that keeps no state; transformers' own become such (`use_layers_with_caches`).

    Attributes:
        layer_idx: number of the block in the whole model.
        rescale_every: blocks after which hidden states are halved; none if it is not positive.
    """

    layer_idx: int
    rescale_every: int

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: object
    ) -> tuple[Tensor, None, None]:
        """Return what the block makes of hidden states [sequences, tokens, hidden_size].

        Args:
            hidden_states: of tokens that follow one another.
            past_key_values: the cache, with the state of the sequences if they have begun.
            kwargs: for transformers' own blocks; ignored.
        """
        own: Any = self
        cache, layer = past_key_values, self.layer_idx
        if layer == 0:
            hidden_states = own.pre_ln(hidden_states)
        scale = 0.5 ** (layer // self.rescale_every) if self.rescale_every > 0 else 1.0

        states = own.ln1(hidden_states)
        begins = not cache.has_previous_state(layer)
        columns = cache.update_conv_state(states.transpose(1, 2), layer, 0, conv_kernel_size=1)
        earlier = _before_each(columns, begins=begins)
        weights, key, value = _mixed(own.attention, states, earlier)
        state = cache.get_recurrent_state(layer)
        sums, state = _summed_up(own.attention, key, value, initial_state=state)
        cache.update_recurrent_state(state, layer)
        hidden_states = hidden_states + own.attention.output(weights * sums * scale)

        states = own.ln2(hidden_states)
        columns = cache.update_conv_state(states.transpose(1, 2), layer, 1, conv_kernel_size=1)
        earlier = _before_each(columns, begins=begins)
        hidden_states = hidden_states + _fed_forward(own.feed_forward, states, earlier, scale)

        if self.rescale_every > 0 and (layer + 1) % self.rescale_every == 0:
            hidden_states = hidden_states / 2
        return hidden_states, None, None


def use_layers_with_caches(model: nn.Module) -> None:
    """Have the blocks of a model, if it is RWKV, keep their states in caches, and halve by number.

    Args:
        model: of transformers, whole; its configuration halves nothing afterwards.
    """
    blocks: list[Any] = [m for m in model.modules() if type(m).__name__ == _BLOCK]
    for block in blocks:
        block.__class__ = RwkvLayer
        block.layer_idx = block.layer_id
        block.rescale_every = block.config.rescale_every
    for block in blocks:
        block.config.rescale_every = 0


def _before_each(columns: Tensor, *, begins: bool) -> Tensor:
    """Return the state of the token before each, zeros before the first of all.

    Args:
        columns: [sequences, hidden_size, tokens]; unless the sequences begin, one more, in front.
        begins: whether they do.

    Returns:
        [sequences, tokens, hidden_size].
    """
    return (pad(columns, (1, 0)) if begins else columns)[..., :-1].transpose(1, 2)


def _blend(states: Tensor, earlier: Tensor, share: Tensor) -> Tensor:
    return states * share + earlier * (1 - share)


def _mixed(attention: Any, states: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of attention's outputs, its keys and its values, of one shape."""
    key = attention.key(_blend(states, earlier, attention.time_mix_key))
    value = attention.value(_blend(states, earlier, attention.time_mix_value))
    received = attention.receptance(_blend(states, earlier, attention.time_mix_receptance))
    return torch.sigmoid(received), key, value


def _fed_forward(unit: Any, states: Tensor, earlier: Tensor, scale: float) -> Tensor:
    key = unit.key(_blend(states, earlier, unit.time_mix_key))
    received = unit.receptance(_blend(states, earlier, unit.time_mix_receptance))
    product: Tensor = torch.sigmoid(received) * unit.value(torch.relu(key).square() * scale)
    return product


def _summed_up(
    attention: Any, key: Tensor, value: Tensor, *, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the mean of values so far, weighted by their keys, at each token.

    Sums are kept as multiples of e to a power, which is the largest exponent in them.

    Args:
        attention: transformers' own, with the weights.
        key: [sequences, tokens, width].
        value: likewise.
        initial_state: see below; None: the sequences begin.

    Returns:
        the means, of the shape of values; and the state, float32 [sequences, width, 3]: the sum of
        the weighted values, that of the weights, and the power.
    """
    first, fading = attention.time_first, -torch.exp(attention.time_decay)
    if initial_state is None:
        total = count = torch.zeros_like(key[:, 0], dtype=torch.float32)
        power = torch.full_like(total, _BEFORE_ALL)
    else:
        total, count, power = initial_state.unbind(-1)
    means = torch.empty_like(key)
    for token in range(key.shape[1]):
        added, new = value[:, token], key[:, token].float()
        own = new + first
        largest = torch.maximum(power, own)
        before, at = torch.exp(power - largest), torch.exp(own - largest)
        means[:, token] = (before * total + at * added) / (before * count + at)
        faded = power + fading
        power = torch.maximum(faded, new)
        before, at = torch.exp(faded - power), torch.exp(new - power)
        total, count = before * total + at * added, before * count + at
    return means, torch.stack([total, count, power], dim=-1)
