"""The memory that a step takes beside weights and KV cache, from a model's config.json.

It is bounded by what one layer holds at its largest, and by the logits of rows that are sampled.
Layers come one after another, and none keeps anything but its output.
"""

from collections.abc import Iterator
from typing import Any

from distributed_llm.common.block_indexers import block_sizes
from distributed_llm.common.encoder_decoders import as_decoder, is_encoder_decoder, of_decoder
from distributed_llm.common.indexers import index_key_dims
from distributed_llm.common.key_blocks import choosing_layers, key_block_sizes
from distributed_llm.common.latents import keeps_latents, most_absorbed
from distributed_llm.common.layer_states import keeps_kv
from distributed_llm.common.mixer_workspace import mixer_bytes
from distributed_llm.common.model_sizes import (
    Config,
    context_length,
    head_sizes,
    hidden_size,
    latent_sizes,
    num_layers,
    positive,
    streams,
)
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName

LOGITS_AT_ONCE = 2**22
"""Logits that are sampled at once; those of more rows are sampled block by block."""

SCORES_AT_ONCE = 2**22
"""Scores of attention that are computed at once where no fused kernel takes them."""

QUERIES_AT_ONCE = 128
"""Queries of a chunk that are computed at once by fused kernels, or over latents."""

EXPANDED_AT_ONCE = 2**23
"""Numbers of keys and values that are made of latents at once."""

_GRAPHS_BYTES = 256 << 20
"""Of a GPU's memory that recorded decode steps may take: what they compute with, and the driver."""

_COPIES_OF_SCORES = 4
"""The scores themselves, what the softmax makes of them, and what it is made with, in float32."""

_COPIES_OF_LATENT_SCORES = 2
"""Two terms, or their sum and the weights, in float32 at most; beside what they were before."""

_COPIES_OF_INDEX_SCORES = 3
"""The scores of all positions, the pieces that they are put together from, and what is hidden."""

_COPIES_OF_LOGITS = 4
"""Likewise of the logits that are sampled at once: scaled, processed, sorted, log-probabilities."""

_CANDIDATE_BYTES = 64
"""Number and probability of one candidate for a token; one row is drawn at a time."""

_SUMS = 2
"""Sums of attended values in float32: of all pieces, and put together from blocks of queries."""

_STATES = 6
"""Hidden states that exist at once: the residual, its norm, and what is computed in between."""

_STREAM_COPIES = 4
"""Copies in float32 of all residual streams, where there are several: their norm makes them."""

_PROJECTED = 3
"""Copies of queries, keys and values: as computed, with positions, and with heads in order."""

_MLP = 4
"""What an MLP holds of its width at once: gate, up, the activation and the product."""

_MLP_IN_STEPS = 6
"""The same where the activation is made of several operations."""

_IN_STEPS = ("gelu_new", "gelu_fast", "quick_gelu")
"""Activations that are."""

_LEAST_BYTES = 8 << 20
"""Blocks of weights that are converted, states that are rounded, and other small things."""


def graphs_bytes(device: str) -> int:
    """Return the bytes that recorded decode steps may take on a device; 0 if it records none.

    Args:
        device: torch's name of it ("cuda:0").
    """
    return _GRAPHS_BYTES if device.partition(":")[0] == "cuda" else 0


def workspace_bytes(
    config: Config, dtype: DtypeName, *, vocab_size: int, tokens: int, rows: int
) -> int:
    """Return the bytes that a stage takes at most while it computes a step.

    Args:
        config: of the model.
        dtype: of the computation.
        vocab_size: of the model.
        tokens: of a step at most.
        rows: of them that are sampled at most.
    """
    stacks = [config, as_decoder(config)] if is_encoder_decoder(config) else [config]
    sizes = {"vocab_size": vocab_size, "tokens": tokens, "rows": rows}
    return max(_bytes_in_stack(of_decoder(stack), dtype, **sizes) for stack in stacks)


def _bytes_in_stack(
    config: Config, dtype: DtypeName, *, vocab_size: int, tokens: int, rows: int
) -> int:
    """Return what `workspace_bytes` does, of one stack of layers."""
    item_bytes = ITEM_BYTES[dtype]
    hidden = hidden_size(config)
    scores = _scores(config, tokens) if _scores_by_hand(config) else 0
    attention_bytes = tokens * _attention_width(config) * item_bytes
    if keeps_latents(config):
        attention_bytes += _latents_bytes(config, tokens, item_bytes)
    attention_bytes += _blocks_bytes(config, tokens, item_bytes)
    attention_bytes += _key_blocks_bytes(config, tokens, item_bytes)
    mlp_bytes = tokens * _mlp_width(config, hidden) * item_bytes
    mixing_bytes = mixer_bytes(config, dtype, tokens=tokens, rows=rows)
    residual = tokens * hidden * (streams(config) if streams(config) > 1 else 0)
    layer_bytes = max(
        attention_bytes, mlp_bytes, mixing_bytes, residual * (_STREAM_COPIES * 4 + item_bytes)
    )
    layer_bytes += (tokens * _STATES * hidden + residual) * item_bytes
    layer_bytes += scores * _COPIES_OF_SCORES * 4
    logits = min(rows, tokens) * vocab_size
    capped = 2 if config.get("final_logit_softcapping") else 1
    sampled = min(logits, max(LOGITS_AT_ONCE, vocab_size))
    logits_bytes = logits * item_bytes * capped + sampled * _COPIES_OF_LOGITS * 4
    logits_bytes += vocab_size * _CANDIDATE_BYTES
    return _LEAST_BYTES + max(layer_bytes, logits_bytes)


def _attention_width(config: Config) -> int:
    """Return the numbers that attention holds of each token; 0 if no layer attends."""
    if not any(keeps_kv(config)):
        return 0
    heads, kv_heads, key_dim, value_dim = head_sizes(config)
    if keeps_latents(config):
        sizes = latent_sizes(config)
        kept = sizes.rank + sizes.shared_dim
        return _PROJECTED * (heads * key_dim + kept) + heads * value_dim
    return _PROJECTED * (heads * key_dim + kv_heads * (key_dim + value_dim))


def _latents_bytes(config: Config, tokens: int, item_bytes: int) -> int:
    """Return what attention over latents takes at once, beside queries and the like.

    Attended values are summed up in float32; of queries that attend to latents as they are, which
    are few, in the width of latents.
    """
    sizes, heads, positions = latent_sizes(config), head_sizes(config).heads, context_length(config)
    few = most_absorbed(sizes, tokens)
    scores = min(SCORES_AT_ONCE, heads * min(few, QUERIES_AT_ONCE) * positions)
    width = sizes.shared_dim + sizes.rank
    absorbed = few * heads * width * (2 * item_bytes + _SUMS * 4)
    absorbed += scores * (item_bytes + _COPIES_OF_LATENT_SCORES * 4)
    one = heads * (2 * sizes.expanded_dim + sizes.key_dim + sizes.value_dim)
    expanded = tokens * heads * sizes.expanded_dim * (item_bytes + _SUMS * 4)
    expanded += min(EXPANDED_AT_ONCE, positions * one) * item_bytes
    return max(absorbed, expanded, _chosen_bytes(config, tokens, item_bytes))


def _chosen_bytes(config: Config, tokens: int, item_bytes: int) -> int:
    """Return what attention over chosen latents takes at once, beside queries and the like."""
    index_dim = max(index_key_dims(config, num_layers(config)))
    if not index_dim:
        return 0
    sizes, heads, positions = latent_sizes(config), head_sizes(config).heads, context_length(config)
    most = min(positive({"index_topk": 2048, **config}, "index_topk"), positions)
    width = sizes.shared_dim + index_dim + sizes.rank
    chosen = tokens * most * 8
    choosing = min(tokens, QUERIES_AT_ONCE) * positions * _COPIES_OF_INDEX_SCORES * 4
    choosing += SCORES_AT_ONCE * 4 + positions * index_dim * item_bytes
    at_once = min(tokens * most, max(most, EXPANDED_AT_ONCE // width, SCORES_AT_ONCE // heads))
    attending = at_once * (width * item_bytes + heads * 4 * _COPIES_OF_SCORES)
    attending += tokens * heads * (2 * width + sizes.rank) * item_bytes
    return chosen + max(choosing, attending)


def _blocks_bytes(config: Config, tokens: int, item_bytes: int) -> int:
    """Return what attention to blocks takes at once that tokens choose by one key of each."""
    sizes = block_sizes(config)
    if sizes is None or not any(keeps_kv(config)):
        return 0
    (heads, kv_heads, key_dim, value_dim), positions = head_sizes(config), context_length(config)
    most = min(sizes.seen, positions)
    width = kv_heads * (key_dim + value_dim) + sizes.key_dim
    blocks = positions // sizes.block
    choosing = min(tokens, QUERIES_AT_ONCE) * blocks * _COPIES_OF_INDEX_SCORES * 4
    of_heads = positive(config, "indexer_n_heads") * min(tokens, QUERIES_AT_ONCE) * blocks
    choosing += min(SCORES_AT_ONCE, of_heads) * 4 + blocks * sizes.key_dim * item_bytes
    scores = min(tokens * most, max(most, min(EXPANDED_AT_ONCE // width, SCORES_AT_ONCE // heads)))
    attending = scores * (width * item_bytes + heads * 4 * _COPIES_OF_SCORES)
    attending += tokens * heads * (2 * (key_dim + sizes.key_dim) + value_dim) * item_bytes
    return 2 * tokens * most * 8 + max(choosing, attending)


def _key_blocks_bytes(config: Config, tokens: int, item_bytes: int) -> int:
    """Return what attention to blocks takes at once that tokens choose by keys of all positions."""
    sizes = key_block_sizes(config)
    if sizes is None or not any(choosing_layers(config, num_layers(config))):
        return 0
    heads, kv_heads, key_dim, value_dim = head_sizes(config)
    positions = context_length(config)
    blocks = -(-positions // sizes.block)
    choosing = (positions + min(sizes.block, positions)) * sizes.key_dim * (2 * item_bytes + 4)
    queries = kv_heads * min(tokens, QUERIES_AT_ONCE)
    at_once = max(sizes.block, min(SCORES_AT_ONCE // queries, positions))
    choosing += queries * (at_once * _COPIES_OF_INDEX_SCORES * 4 + blocks * 8)
    beside = -(-sizes.key_dim // kv_heads)
    width = kv_heads * (key_dim + beside + value_dim)
    most = min(sizes.seen, positions)
    at_once = min(EXPANDED_AT_ONCE // width, SCORES_AT_ONCE // heads)
    at_once = min(tokens * most, max(most, at_once))
    attending = at_once * (width * item_bytes + heads * 4 * _COPIES_OF_SCORES + kv_heads * 24)
    attending += tokens * heads * (2 * (key_dim + beside) + value_dim) * item_bytes
    chosen = kv_heads * tokens * min(sizes.most, blocks) * 8
    return chosen + max(choosing, attending)


def _mlp_width(config: Config, hidden: int) -> int:
    """Return the numbers that the widest MLP holds of each token."""
    if "n_inner" in config:  # GPT-2 and its kin
        dense = _size(config, "n_inner") or 4 * hidden
    else:
        names = ("intermediate_size", "ffn_dim", "ffn_hidden_size")
        dense = max(_size(config, name) for name in names) or 4 * hidden
    activation = config.get("hidden_act", config.get("activation_function"))
    in_steps = activation in _IN_STEPS or config.get("swiglu_limit") is not None
    held = _MLP_IN_STEPS if in_steps else _MLP
    chosen = _size(config, "num_experts_per_tok") or _size(config, "num_experts_per_token")
    chosen = chosen or _size(config, "moe_topk")
    if not chosen:
        return held * dense
    expert = _size(config, "moe_intermediate_size") or _size(config, "expert_ffn_hidden_size")
    expert = expert or dense
    shared = _size(config, "shared_expert_intermediate_size")
    shared = shared or _size(config, "shared_intermediate_size")
    shared_experts = _size(config, "n_shared_experts") or _size(config, "num_shared_experts")
    shared = shared or shared_experts * expert
    return max(held * dense, chosen * (held * expert + 4 * hidden) + held * shared)


def _scores(config: Config, tokens: int) -> int:
    """Return how many scores of a prompt are computed at once."""
    return min(SCORES_AT_ONCE, head_sizes(config).heads * tokens * context_length(config))


def _scores_by_hand(config: Config) -> bool:
    """Return whether no fused kernel computes the attention of prompts."""
    if keeps_latents(config):
        return False  # they are counted with what else attention over latents takes
    return bool(config.get("attn_logit_softcapping")) or config.get("kv_lora_rank") is not None


def _size(config: Config, name: str) -> int:
    """Return a size, the largest one if it differs between layers; 0 if there is none."""
    return max(_numbers(config.get(name)), default=0)


def _numbers(value: Any) -> Iterator[int]:
    for number in value if isinstance(value, list) else [value]:
        if type(number) is int:
            yield number
