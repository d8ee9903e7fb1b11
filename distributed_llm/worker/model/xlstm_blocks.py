"""Blocks of xLSTM, with their state in a cache, and its head for some of the tokens.

transformers hands the state of each block, three tensors, from one call to the next, in a cache of
its own. Here each block takes it from a cache and returns it there, as other mixers do
(`state_layers`). And the model makes logits of all tokens, where only some are sampled.

What recurrences compute is float32 in models of any dtype. transformers' functions for chunks mix
dtypes, which fails unless the state is of the model's, and that would round the sum of the text.
"""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

_BLOCK, _MODEL = "xLSTMBlock", "xLSTMForCausalLM"

_PARTS = 3
"""Tensors of a state: a matrix, a vector and a number for each head."""

_ANY_LENGTH = 2**31 - 1
"""Tokens up to which the model computes all at once; more than any step has."""


class XLSTMLayer(nn.Module):
    """A block that keeps no state; transformers' own become such (`use_xlstm_with_caches`).

    Attributes:
        layer_idx: number of the block in the whole model.
    """

    layer_idx: int

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: object
    ) -> tuple[Tensor, None]:
        """Return what the block makes of hidden states [sequences, tokens, hidden_size].

        Args:
            hidden_states: of tokens that follow one another.
            past_key_values: the cache, with the state of the sequences if they have begun.
            kwargs: for transformers' own blocks; ignored.
        """
        own: Any = self
        cache, layer = past_key_values, self.layer_idx
        given = [cache.get_recurrent_state(layer, part) for part in range(_PARTS)]
        begun = cache.has_previous_state(layer)
        mixed, made = _mixed(own, hidden_states, initial_state=tuple(given) if begun else None)
        for part, tensor in enumerate(made):
            cache.update_recurrent_state(tensor, layer, part)
        hidden_states = hidden_states + mixed
        return hidden_states + own.ffn(own.norm_ffn(hidden_states)), None


def _mixed(block: Any, states: Tensor, *, initial_state: tuple[Tensor, ...] | None) -> Any:
    return block.mlstm_layer(block.norm_mlstm(states), initial_state)


def use_xlstm_with_caches(model: nn.Module) -> None:
    """Have the blocks of a model, if it is xLSTM, keep their states in caches.

    Args:
        model: of transformers, whole.
    """
    if type(model).__name__ != _MODEL:
        return
    whole: Any = model
    whole.config.max_inference_chunksize = _ANY_LENGTH
    whole.forward = MethodType(_forward, whole)
    for number, block in enumerate(whole.backbone.blocks):
        backend = block.mlstm_layer.mlstm_backend
        backend.forward = MethodType(_in_float32, backend)
        block.__class__ = XLSTMLayer
        block.layer_idx = number


def _in_float32(
    backend: Any, *, query: Tensor, key: Tensor, value: Tensor, **others: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute what transformers' recurrence does, in float32; return the states as they are.

    Args:
        backend: of transformers.
        query: [sequences, heads, tokens, key_dim].
        key: likewise.
        value: [sequences, heads, tokens, value_dim].
        others: gates, and the states before.
    """
    floats = {name: None if one is None else one.float() for name, one in others.items()}
    own = {"query": query.float(), "key": key.float(), "value": value.float()}
    outputs, states = type(backend).forward(backend, **own, **floats)
    return outputs.to(query.dtype), states


def _forward(model: Any, logits_to_keep: Tensor, **inputs: Any) -> CausalLMOutputWithPast:
    """Return the logits of some tokens, float32 [1, tokens kept, vocab_size].

    Args:
        model: whole, or a stage that ends it.
        logits_to_keep: the tokens' rows.
        inputs: of the layers.
    """
    states = model.backbone(**inputs).last_hidden_state[:, logits_to_keep]
    logits, cap = model.lm_head(states).float(), model.config.output_logit_soft_cap
    return CausalLMOutputWithPast(logits=cap * (logits / cap).tanh())
