"""Layers of ZAYA: with states in a cache, and router states that travel beside hidden states.

What makes queries, keys and values looks at earlier tokens. transformers gives its state to a cache
and takes all three out of one call; here it takes the state from a cache and returns it there, as
other mixers do (`state_layers`), and gives the three side by side.

Each layer's router adds what the router of the layer before made of the token. transformers hands
that on as a result of its own. Here it lies behind the hidden states, in one row, so it reaches the
next stage as they do.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

_PROJECTION, _LAYER = "ZayaCCAProjection", "ZayaDecoderLayer"


class ZayaProjection(nn.Module):
    """Makes queries, keys and values; transformers' own become such (`replace_zaya_projections`).

    Attributes:
        layer_idx: number of its layer in the model.
    """

    layer_idx: int

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: object
    ) -> Tensor:
        """Return queries, keys and values side by side, [sequences, tokens, numbers of all].

        Args:
            hidden_states: [sequences, tokens, hidden_size], of tokens that follow one another.
            past_key_values: the cache, with the state of the sequences if they have begun.
            kwargs: for transformers' own; ignored.
        """
        own: Any = self
        cache, layer = past_key_values, self.layer_idx
        begins = not cache.has_previous_state(layer)
        queries, keys = own.q_proj(hidden_states), own.k_proj(hidden_states)
        both, width = torch.cat((queries, keys), dim=-1).transpose(1, 2), own.conv_kernel_size
        columns = cache.update_conv_state(both, layer, 0, conv_kernel_size=width)
        if begins:
            columns = pad(both, (width, 0))
        mixed = own.conv_qk_grouped(own.conv_qk_depthwise(columns)).transpose(1, 2)
        delayed = own.v_proj_delayed(hidden_states).transpose(1, 2)
        columns = cache.update_conv_state(delayed, layer, 1, conv_kernel_size=1)
        if begins:
            nothing = own.v_proj_delayed(torch.zeros_like(hidden_states[:, :1]))
            columns = torch.cat((nothing.transpose(1, 2), delayed), dim=-1)
        earlier = columns[..., :-1].transpose(1, 2)
        added = _averages(queries, keys, own.num_key_value_groups, own.head_dim)
        return torch.cat((mixed + added, own.v_proj_current(hidden_states), earlier), dim=-1)


def _averages(queries: Tensor, keys: Tensor, group: int, dim: int) -> Tensor:
    """Return the mean of each query and its key, and behind these their mean for each key.

    Args:
        queries: [sequences, tokens, numbers of all heads].
        keys: likewise.
        group: queries of a key.
        dim: numbers of a head.
    """
    shape = *queries.shape[:-1], -1, group, dim
    means = (queries.view(shape) + keys.view(*keys.shape[:-1], -1, 1, dim)) * 0.5
    return torch.cat((means.flatten(2), means.mean(dim=-2).flatten(2)), dim=-1)


class _Parts(nn.Module):
    """Gives what a projection made to attention: queries, keys and values.

    Args:
        together: makes all three.
        heads: of queries, of keys and of values.
        dim: numbers of a head.
    """

    def __init__(self, together: nn.Module, heads: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.together = together
        self._heads = heads
        self._dim = dim

    def forward(self, hidden_states: Tensor, *_: object) -> tuple[Tensor, ...]:
        """Return [1, tokens, heads, dim] each, of hidden states [1, tokens, hidden_size]."""
        made: Tensor = self.together(hidden_states)
        heads = made.view(*made.shape[:-1], -1, self._dim)
        return torch.split(heads, list(self._heads), dim=2)


def replace_zaya_projections(layer: nn.Module) -> None:
    """Have what makes queries, keys and values of a loaded layer, if it is ZAYA's, use a cache."""
    for attention in list(layer.modules()):
        projection: Any = getattr(attention, "qkv_proj", None)
        if type(projection).__name__ == _PROJECTION:
            projection.__class__ = ZayaProjection
            heads, kv_heads = projection.num_attention_heads, projection.num_key_value_heads
            sizes = (heads, kv_heads, kv_heads), projection.head_dim
            setattr(attention, "qkv_proj", _Parts(projection, *sizes))  # noqa: B010


class _WithRouterStates:
    """What a class of layers adds to transformers' own, of which it is one.

    Attributes:
        ends_model: whether the layer is the last of the whole model.
    """

    ends_model: bool

    def forward(self, hidden_states: Tensor, *_: object, **kwargs: Any) -> tuple[Tensor, None]:
        """Compute the layer on float32 states, as transformers does.

        Args:
            hidden_states: [1, tokens, hidden_size], behind them router states, but at the first.
            kwargs: for the layer.

        Returns:
            the same of the layer, without router states at the last.
        """
        own: Any = self
        states, routed = hidden_states.float().tensor_split((own.hidden_size,), dim=-1)
        before = routed.to(own.mlp.gate.down_proj.weight.dtype) if routed.shape[-1] else None
        whole: Any = super()
        states, routed = whole.forward(states, before, **kwargs)
        return (states if self.ends_model else torch.cat((states, routed), dim=-1)), None


@functools.cache
def _class_with_router_states(kind: Any) -> type[nn.Module]:
    return type(f"{kind.__name__}WithRouterStates", (_WithRouterStates, kind), {})


def put_router_states_beside(model: nn.Module) -> None:
    """Have the layers of a model, if it is ZAYA, take and give router states in one row.

    Args:
        model: of transformers, whole.
    """
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ == _LAYER]
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _class_with_router_states(kind)
        layer.ends_model = layer is layers[-1]
