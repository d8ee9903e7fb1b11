"""Attention over packed sequences, called from within Hugging Face models.

Importing this module registers `packed_attention` with transformers under `ATTENTION_NAME`. A model
with this attention gets the tokens of all sequences of a step in one row, [1, tokens]. Attention is
computed for one sequence at a time, so no mask has to keep sequences apart; transformers builds
none, because no mask function is registered under that name.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.segments import KVBuffers

ATTENTION_NAME = "distributed_llm"


@dataclass(frozen=True, slots=True)
class PackedSlice:
    """Tokens `[row, row + num_tokens)` of the packed row: positions of a sequence from `start`."""

    sequence_id: SequenceId
    start: int
    row: int
    num_tokens: int


@dataclass(slots=True)
class PackedStep:
    """One step, as the attention of each layer needs it.

    Attributes:
        cache: the KV cache of the stage.
        first_layer: number of the stage's first layer in the whole model.
        slices: of the sequences, in the order of the packed row.
        appended: how many times each layer of the stage has appended keys and values.
        masks: of this step, by (tokens, positions, window); its layers share them.
        sizes: number of tokens of each slice.
    """

    cache: KVCache
    first_layer: int
    slices: tuple[PackedSlice, ...]
    appended: list[int]
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [part.num_tokens for part in self.slices]


# The step that runs in this context; a context variable, for stages may run in several threads.
_step: ContextVar[PackedStep] = ContextVar("packed_step")


@contextmanager
def running(step: PackedStep) -> Iterator[None]:
    """Have models that run in this context compute `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of each packed sequence over its cached positions and its new tokens.

    Args:
        module: the model's attention module; `layer_idx` is the layer's number in the whole model.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim]; appended to the cache.
        value: [1, kv_heads, tokens, value_dim]; appended to the cache.
        attention_mask: has to be None.
        scaling: factor of the scores; default 1 / sqrt(head_dim).
        sliding_window: number of positions that a token attends to, itself included; default all.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [heads], logits of attention sinks, which take part in softmax without a value.
        kwargs: for other attention implementations; ignored, except for `position_bias`.

    Returns:
        [1, tokens, heads, value_dim], and None for the attention weights.

    Raises:
        NotImplementedError: the model has a mask or a position bias of its own.
    """
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__} brings its own mask or position bias")
    step = _step.get()
    layer = int(module.layer_idx) - step.first_layer  # type: ignore[arg-type]
    step.appended[layer] += 1
    window = sliding_window or 0
    sizes = step.sizes
    outputs = []
    for part, queries, new_keys, new_values in zip(
        step.slices,
        query[0].split_with_sizes(sizes, dim=1),
        key[0].split_with_sizes(sizes, dim=1),
        value[0].split_with_sizes(sizes, dim=1),
        strict=True,
    ):
        segments = step.cache.append(layer, part.sequence_id, part.start, new_keys, new_values)
        keys, values = segments[0] if len(segments) == 1 else _joined(segments)
        if window:  # earlier positions are outside every token's window
            first = max(0, part.start - window + 1)
            keys, values = keys[:, first:], values[:, first:]
        if softcap is None and s_aux is None:
            outputs.append(_attend(step, queries, keys, values, scaling, window))
        else:
            scale = scaling if scaling is not None else queries.shape[-1] ** -0.5
            outputs.append(
                _attend_by_hand(step, queries, keys, values, scale, window, softcap, s_aux)
            )
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed[None], None


AttentionInterface.register(ATTENTION_NAME, packed_attention)


def _joined(segments: Sequence[KVBuffers]) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of consecutive segments, each concatenated to one tensor.

    The copy takes about as long as attention of one token. Computing attention for each segment and
    merging the results by their log-sum-exp was slower on a CPU.
    """
    keys, values = zip(*segments, strict=True)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def _attend(
    step: PackedStep,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    window: int,
) -> Tensor:
    """Compute attention of one sequence with torch's fused kernels.

    Args:
        step: keeps the masks.
        queries: [heads, tokens, head_dim], of the last `tokens` positions.
        keys: [kv_heads, positions, head_dim].
        values: [kv_heads, positions, value_dim].
        scale: factor of the scores, or None for the default.
        window: positions that a token attends to; 0 is all.

    Returns:
        [tokens, heads, value_dim].
    """
    heads, tokens, head_dim = queries.shape
    kv_heads, positions, _ = keys.shape
    if tokens == 1:
        # Heads that share keys become the rows of one small matrix. This takes a tenth of the time
        # of `enable_gqa` for one token in bfloat16 (0.31 ms against 3.7 ms at 1000 positions).
        grouped = queries.reshape(1, kv_heads, heads // kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
        return attended.reshape(1, heads, -1)
    plain = positions == tokens and (not window or tokens <= window)
    attended = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=None if plain else _mask(step, tokens, positions, window, queries.device),
        is_causal=plain,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return attended[0].transpose(0, 1)


def _attend_by_hand(
    step: PackedStep,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention as `_attend` does, with a soft cap and sinks, which fused kernels lack."""
    heads, tokens, head_dim = queries.shape
    kv_heads, positions, _ = keys.shape
    groups = heads // kv_heads
    rows = queries.reshape(kv_heads, groups * tokens, head_dim)
    scores = torch.matmul(rows, keys.transpose(1, 2)).mul_(scale)
    scores = scores.view(kv_heads, groups, tokens, positions)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if tokens > 1:
        scores = scores.masked_fill(
            ~_mask(step, tokens, positions, window, queries.device), float("-inf")
        )
    if sinks is not None:
        columns = sinks.to(scores.dtype).view(kv_heads, groups, 1, 1).expand(-1, -1, tokens, 1)
        scores = torch.cat([scores, columns], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
    weights = weights[..., :positions].reshape(kv_heads, groups * tokens, positions)
    attended = torch.matmul(weights, values)
    return attended.view(heads, tokens, -1).transpose(0, 1)


def _mask(
    step: PackedStep, tokens: int, positions: int, window: int, device: torch.device
) -> Tensor:
    """Return the positions that each of the last tokens attends to, bool [tokens, positions]."""
    made_from = (tokens, positions, window)
    mask = step.masks.get(made_from)
    if mask is None:
        mask = torch.ones((tokens, positions), dtype=torch.bool, device=device)
        mask = mask.tril_(positions - tokens)
        if window:
            mask = mask.triu_(positions - tokens - window + 1)
        step.masks[made_from] = mask
    return mask
