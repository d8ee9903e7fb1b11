"""Attention of older models, whose code does not go through transformers' attention interface.

Some compute attention in a method of its own, `_attn`, which is replaced. Others compute it in the
middle of `forward`, which is replaced as a whole: it uses the module's own layers, and calls
`packed_attention` in between. Bloom, MPT and some Falcons add a bias to the scores that grows with
the position of the key (ALiBi).
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.attention import ATTENTION_NAME, packed_attention

_Method = Callable[..., Any]


def use_packed_attention(model: PreTrainedModel) -> None:
    """Replace the attention of a model of `OWN_ATTENTION` by that of packed sequences."""
    replaced = [module for module in model.modules() if type(module).__name__ in _METHODS]
    for number, module in enumerate(replaced):
        name, function = _METHODS[type(module).__name__]
        setattr(module, "layer_idx", number)  # noqa: B010 - some call it otherwise, or lack it
        setattr(module, name, MethodType(function, module))
    if model.config.model_type not in _NEEDS_A_MASK:
        model.config._attn_implementation = ATTENTION_NAME  # so that no mask is made


# ------------------------------------------------------------------ methods `_attn`


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, **settings: Any
) -> tuple[Tensor, None]:
    """Return packed attention, [1, heads, tokens, head_dim], as the methods `_attn` do."""
    # Rotary positions are float32 in some, and make keys of bfloat16 models so.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attended, weights = packed_attention(module, query, key, value, None, **settings)
    return attended.transpose(1, 2), weights


def _attn_scaled(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object) -> Any:
    """Compute what GPT-J and CodeGen do, which divide the scores by `scale_attn`."""
    return _attend(module, query, key, value, scaling=1 / float(module.scale_attn))


def _attn_japanese(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object) -> Any:
    """Compute what GPT-NeoX Japanese does, which divides the scores by `norm_factor`."""
    return _attend(module, query, key, value, scaling=1 / float(module.norm_factor))


def _attn_gpt_neo(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object) -> Any:
    """Compute what GPT-Neo does: scores are not scaled, and every other layer has a window."""
    window = module.config.window_size if module.attention_type == "local" else None
    return _attend(module, query, key, value, scaling=1.0, sliding_window=window)


def _attn_openai(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object, with_weights: object
) -> Any:
    """Compute what the first GPT does; its keys come as [1, heads, head_dim, tokens]."""
    scaling = query.shape[-1] ** -0.5 if module.scale else 1.0
    return [_attend(module, query, key.transpose(2, 3), value, scaling=scaling)[0]]


# ------------------------------------------------------------------ methods `forward`


def _forward_falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: object,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Compute Falcon's attention, with heads of keys and values as they are, not repeated."""
    from transformers.models.falcon import modeling_falcon

    rotated: Any = modeling_falcon.apply_rotary_pos_emb
    fused = module.query_key_value(hidden_states)
    if module.new_decoder_architecture:
        group = module.num_heads // module.num_kv_heads
        grouped = fused.unflatten(-1, (module.num_kv_heads, group + 2, module.head_dim))
        query = grouped[..., :group, :].flatten(2, 3)
        key, value = grouped[..., group, :], grouped[..., group + 1, :]
    else:
        query, key, value = module._split_heads(fused)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    slopes = None
    if alibi is None:
        assert position_embeddings is not None
        query, key = rotated(query, key, *position_embeddings)
    else:  # added before the scores are scaled; rounded to bfloat16 in a model of any dtype
        slopes = _rounded_slopes(module.num_heads, module.inv_norm_factor, query.device)
    attended, weights = packed_attention(
        module, query, key, value, None, scaling=module.inv_norm_factor, slopes=slopes
    )
    return module.dense(attended.flatten(2)), weights


def _forward_bloom(
    module: Any, hidden_states: Tensor, residual: Tensor, **kwargs: object
) -> tuple[Tensor, None]:
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    slopes = _slopes(module.num_heads, query.device)
    attended, weights = packed_attention(
        module, query, key, value, None, scaling=module.inv_norm_factor, slopes=slopes
    )
    return module.dense(attended.flatten(2)) + residual, weights


def _forward_mpt(
    module: Any, hidden_states: Tensor, position_bias: Tensor, **kwargs: object
) -> tuple[Tensor, None]:
    """Compute MPT's attention; `position_bias` is [heads, 1, positions], and ends with 0."""
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        each.unflatten(-1, (module.n_heads, module.head_dim)).transpose(1, 2)
        for each in fused.chunk(3, dim=-1)
    )
    slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
    attended, weights = packed_attention(
        module, query, key, value, None, scaling=module.softmax_scale, slopes=slopes
    )
    return module.out_proj(attended.flatten(2)), weights


def _forward_xglm(module: Any, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
    """Compute XGLM's attention over the text alone."""
    layers = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = _in_heads(hidden_states, layers, module.head_dim)
    attended, weights = packed_attention(module, query, key, value, None, scaling=module.scaling)
    return module.out_proj(attended.flatten(2)), weights


def _forward_like_bert(
    module: Any, hidden_states: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, None]:
    """Compute attention of decoders that are made as BERT was first."""
    layers = (module.query, module.key, module.value)
    query, key, value = _in_heads(hidden_states, layers, module.attention_head_size)
    attended, weights = packed_attention(module, query, key, value, None)
    return attended.flatten(2), weights


def _in_heads(
    states: Tensor, layers: Iterable[Callable[[Tensor], Tensor]], dim: int
) -> Iterator[Tensor]:
    """Yield [1, heads, tokens, dim] for each of some linear layers."""
    for layer in layers:
        yield layer(states).view(1, states.shape[1], -1, dim).transpose(1, 2)


def _forward_diffllama(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Compute DiffLlama's attention: the difference of what two heads see of the same values.

    Heads of keys come in pairs, the first half with the second, and all of a pair's queries attend
    to both values. So a pair is kept as one head, with keys and values side by side, and queries
    have zeros where the other one's key is.
    """
    from transformers.models.diffllama import modeling_diffllama

    rotated: Any = modeling_diffllama.apply_rotary_pos_emb
    dim = module.head_dim
    query, key, value = _in_heads(hidden_states, (module.q_proj, module.k_proj, module.v_proj), dim)
    query, key = rotated(query, key, *position_embeddings)
    tokens, pairs = query.shape[2], key.shape[1] // 2
    first, second = query.chunk(2, dim=1)  # those of the first half of the keys, and of the second
    both = torch.stack((F.pad(first, (0, dim)), F.pad(second, (dim, 0))), dim=1)
    by_pair = both.view(1, 2, pairs, -1, tokens, 2 * dim).transpose(1, 2)
    key, value = (torch.cat(states.chunk(2, dim=1), dim=-1) for states in (key, value))
    attended, weights = packed_attention(
        module, by_pair.flatten(1, 3), key, value, None, scaling=module.scaling
    )
    halves = attended.view(1, tokens, pairs, 2, -1, 2 * dim)
    minuend, subtrahend = (halves[:, :, :, half].flatten(2, 3) for half in (0, 1))
    one, other = (
        torch.exp(torch.sum(left * right, dim=-1, dtype=torch.float32)).to(query.dtype)
        for left, right in (
            (module.lambda_q1, module.lambda_k1),
            (module.lambda_q2, module.lambda_k2),
        )
    )
    difference = minuend - (one - other + module.lambda_init) * subtrahend
    normed = (1 - module.lambda_init) * module.groupnorm(difference)
    return module.o_proj(normed.flatten(2)), weights


def _forward_jetmoe(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: object,
) -> tuple[Tensor, None, Tensor]:
    """Compute JetMoe's attention: each expert of a token has a query for each head of keys."""
    from transformers.models.jetmoe import modeling_jetmoe

    rotated: Any = modeling_jetmoe.apply_rotary_pos_emb
    queries, router_logits, topology = module.experts.map(hidden_states)  # [1, tokens, experts, ..]
    key, value = (
        states.view(1, states.shape[1], -1, module.head_dim).transpose(1, 2)
        for states in module.kv_proj(hidden_states).chunk(2, dim=-1)
    )
    by_head = queries.unflatten(-1, (-1, module.head_dim)).permute(0, 3, 2, 1, 4)
    query, key = rotated(by_head.flatten(1, 2), key, *position_embeddings)
    attended, weights = packed_attention(module, query, key, value, None, scaling=module.scaling)
    by_expert = attended.view(1, attended.shape[1], key.shape[1], module.top_k, -1).transpose(2, 3)
    return module.experts.reduce(by_expert.flatten(3), topology), weights, router_logits


@functools.cache
def _slopes(heads: int, device: torch.device) -> Tensor:
    """Return how much the scores of each head grow from one position to the next, float32 [heads].

    For a power of two heads they are a geometric sequence from 2^(-8 / heads); others take from
    the sequence for twice as many what is between.
    """
    power = 1 << (heads.bit_length() - 1)
    exponents = [-8 * number / power for number in range(1, power + 1)]
    between = [-4 * number / power for number in range(1, 2 * (heads - power) + 1, 2)]
    slopes = [2.0**exponent for exponent in (*exponents, *between)]
    return sent(torch.tensor(slopes, dtype=torch.float32), device)


@functools.cache
def _rounded_slopes(heads: int, factor: float, device: torch.device) -> Tensor:
    """Return slopes that are rounded to bfloat16, then scaled by `factor`, bfloat16 [heads]."""
    return _slopes(heads, device).bfloat16() * factor


_METHODS: dict[str, tuple[str, _Method]] = {
    "GPTJAttention": ("_attn", _attn_scaled),
    "CodeGenAttention": ("_attn", _attn_scaled),
    "GPTNeoSelfAttention": ("_attn", _attn_gpt_neo),
    "Attention": ("_attn", _attn_openai),
    "FalconAttention": ("forward", _forward_falcon),
    "BloomAttention": ("forward", _forward_bloom),
    "MptAttention": ("forward", _forward_mpt),
    "GPTNeoXJapaneseAttention": ("_attn", _attn_japanese),
    "XGLMAttention": ("forward", _forward_xglm),
    "MegatronBertSelfAttention": ("forward", _forward_like_bert),
    "RemBertSelfAttention": ("forward", _forward_like_bert),
    "DiffLlamaAttention": ("forward", _forward_diffllama),
    "JetMoeAttention": ("forward", _forward_jetmoe),
}
"""By the name of a class of attention modules: the method that is replaced, and by what."""

OWN_ATTENTION = frozenset(
    {
        *("bloom", "codegen", "diffllama", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj"),
        *("jetmoe", "megatron-bert", "mpt", "openai-gpt", "rembert", "xglm"),
    }
)
"""Types of models with these classes."""

_NEEDS_A_MASK = frozenset({"mpt"})
"""Types of models that look at the mask before they pass it on."""
