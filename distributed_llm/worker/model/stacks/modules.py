"""Replaces forward passes of modules in encoder-decoders that would not do for packed steps."""

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from distributed_llm.worker.model.stacks.attention import packed_stack_attention
from distributed_llm.worker.model.stacks.routers import replace_router


def replace_forwards(model: PreTrainedModel) -> None:
    """Replace the forward passes of modules that would not do for packed steps.

    That of T5 and its kin makes biases for one text alone; across, any makes keys and values again.
    The MLPs of T5 ask their matrix for its dtype, which one of integers does not have.
    """
    for module in model.modules():
        if type(module).__name__ in _MLPS_OF_T5:
            setattr(module, "forward", MethodType(_forward_mlp, module))  # noqa: B010
        if type(module).__name__ == "SwitchTransformersTop1Router":
            replace_router(module)
        attends = getattr(module, "attends", None)
        if attends == "merged":
            setattr(module, "forward", MethodType(_forward_merged, module))  # noqa: B010
        elif attends == "across":
            setattr(module, "forward", MethodType(_forward_across, module))  # noqa: B010
        elif attends is not None and type(module).__name__ in _OF_T5:
            setattr(module, "forward", MethodType(_forward_t5, module))  # noqa: B010
        elif attends is not None and type(module).__name__ == "MvpAttention":
            setattr(module, "forward", MethodType(_forward_mvp, module))  # noqa: B010


_KINDS = ("MT5", "SwitchTransformers", "T5", "UMT5")
_OF_T5 = frozenset(f"{kind}Attention" for kind in _KINDS)
_MLPS_OF_T5 = frozenset(
    f"{kind}{form}ActDense" for kind in _KINDS for form in ("Dense", "DenseGated")
)


def _forward_mlp(module: Any, hidden_states: Tensor) -> Tensor:
    """Compute the MLP of T5, whose second matrix is float32 in a model of float16."""
    if hasattr(module, "wi"):
        inner = module.act(module.wi(hidden_states))
    else:
        inner = module.act(module.wi_0(hidden_states)) * module.wi_1(hidden_states)
    weight = getattr(module.wo, "weight", None)  # integers have none
    made: Tensor = module.wo(inner if weight is None else inner.to(weight.dtype))
    return made


def _forward_t5(
    module: Any, hidden_states: Tensor, *_: object, **__: object
) -> tuple[Tensor | None, ...]:
    """Compute the attention of T5: without a scale, and with biases of relative positions."""
    query, key, value = (
        _in_heads(projection(hidden_states), module.key_value_proj_dim)
        for projection in (module.q, module.k, module.v)
    )
    attended, _weights = packed_stack_attention(module, query, key, value, None, scaling=1.0)
    return _given(module, module.o(attended.flatten(2)))


def _forward_mvp(module: Any, hidden_states: Tensor, *_: object, **__: object) -> Any:
    """Compute the attention of MVP, which is that of BART where it has no prompts of its own."""
    query, key, value = (
        _in_heads(projection(hidden_states), module.head_dim)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    attended, _weights = packed_stack_attention(module, query, key, value, None)
    return _given(module, module.out_proj(attended.flatten(2)))


def _forward_across(
    module: Any, hidden_states: Tensor, *_: object, **__: object
) -> tuple[Tensor | None, ...]:
    """Compute attention across, of which keys and values are in the cache."""
    if type(module).__name__ in _OF_T5:
        query = _in_heads(module.q(hidden_states), module.key_value_proj_dim)
        leave = module.o
    else:
        query = _in_heads(module.q_proj(hidden_states), module.head_dim)
        leave = module.out_proj if hasattr(module, "out_proj") else module.o_proj
    attended, _weights = packed_stack_attention(
        *(module, query, query, query, None),
        scaling=module.scaling,
        softcap=getattr(module, "attn_logit_softcapping", None),
    )
    return _given(module, leave(attended.flatten(2)))


def _forward_merged(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    *_: object,
    **__: object,
) -> tuple[Tensor, None, None]:
    """Compute attention within an answer and across at once, as T5Gemma 2 does."""
    query, key, value = (
        _in_heads(projection(hidden_states), module.head_dim)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    rotated = sys.modules[type(module).__module__].apply_rotary_pos_emb
    query, key = rotated(module.q_norm(query), module.k_norm(key), *position_embeddings)
    attended, _weights = packed_stack_attention(
        *(module, query, key, value, None),
        scaling=module.scaling,
        sliding_window=module.sliding_window,
    )
    return module.o_proj(attended.flatten(2)), None, None


def _in_heads(states: Tensor, dim: int) -> Tensor:
    """Return [1, tokens, heads * dim] as [1, heads, tokens, dim]."""
    return states.view(*states.shape[:-1], -1, dim).transpose(1, 2)


def _given(module: nn.Module, output: Tensor) -> tuple[Tensor | None, ...]:
    """Return what transformers' own forward pass of an attention module does."""
    beside = 2 if type(module).__name__ in _OF_T5 - {"UMT5Attention"} else 1
    return (output, *(None,) * beside)


def buckets_of(module: Any) -> Callable[[Tensor], Tensor]:
    """Return a function from distances to buckets of T5's biases."""
    if type(module).__name__ == "UMT5Attention":
        return module._relative_position_bucket  # type: ignore[no-any-return]

    def bucket_of(distances: Tensor) -> Tensor:
        buckets: Tensor = module._relative_position_bucket(
            distances,
            bidirectional=not module.is_decoder,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        return buckets

    return bucket_of


def projected_source(module: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values that attention across makes of a source.

    Args:
        module: the attention.
        states: of the encoder, [1, tokens, hidden_size].

    Returns:
        Each [kv_heads, tokens, head_dim].
    """
    if type(module).__name__ in _OF_T5:
        projections, dim = (module.k, module.v), module.key_value_proj_dim
    else:
        projections, dim = (module.k_proj, module.v_proj), module.head_dim
    keys, values = (_in_heads(projection(states), dim)[0] for projection in projections)
    return module.k_norm(keys) if hasattr(module, "k_norm") else keys, values
