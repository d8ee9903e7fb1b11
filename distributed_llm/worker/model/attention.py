"""Attention over packed sequences, called from within Hugging Face models.

Importing this module registers `packed_attention` with transformers under `ATTENTION_NAME`. A model
with this attention gets the tokens of all sequences of a step in one row, [1, tokens]. No mask has
to keep sequences apart; transformers builds none, because no mask function is registered under that
name. Sequences of which one token is computed are attended together (`token_attention`), chunks of
prompts one at a time (`chunk_attention`).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.block_attention import BlockChoice, attend_blocks
from distributed_llm.worker.model.block_indexers import BlockMeansChoice
from distributed_llm.worker.model.chunk_attention import attend_chunk
from distributed_llm.worker.model.indexers import Choice
from distributed_llm.worker.model.latent_attention import attend_latents
from distributed_llm.worker.model.latents import expansion_of
from distributed_llm.worker.model.packed_step import PackedStep, Scoring, running_step
from distributed_llm.worker.model.page_attention import reads_pages
from distributed_llm.worker.model.page_chunks import attend_chunks_of_pages
from distributed_llm.worker.model.sections import attend_sections
from distributed_llm.worker.model.sparse_attention import attend_chosen
from distributed_llm.worker.model.token_attention import attend_tokens

ATTENTION_NAME = "distributed_llm"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMeansChoice | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    slopes: Tensor | None = None,
    indices: Choice | None = None,
    block_indices: BlockChoice | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of each packed sequence over its cached positions and its new tokens.

    Args:
        module: the model's attention module; `layer_idx` is the layer's number in the whole model.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim]; appended to the cache. Of latent attention
            (`latents`), the part of all heads' keys, [1, 1, tokens, shared_dim].
        value: [1, kv_heads, tokens, value_dim]; appended to the cache. Of latent attention, the
            latents, [1, 1, tokens, rank].
        attention_mask: has to be None, unless there are indices, which include it; or by what the
            tokens choose blocks of positions.
        scaling: factor of the scores; default 1 / sqrt(head_dim).
        sliding_window: number of positions that a token attends to, itself included; default all.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [heads], logits of attention sinks, which take part in softmax without a value.
        slopes: [heads], as in `Scoring`.
        indices: by what the tokens choose the positions that they attend to, or have chosen them in
            an earlier layer; None: they attend to all.
        block_indices: by what the tokens choose the blocks of positions that they attend to; None:
            they attend to all.
        kwargs: for other attention implementations; ignored, except for `position_bias`.

    Returns:
        [1, tokens, heads, value_dim], and None for the attention weights.

    Raises:
        NotImplementedError: the model has a mask or a position bias of its own.
    """
    masked = attention_mask is not None and indices is None
    if isinstance(attention_mask, BlockMeansChoice):
        block_indices, masked = attention_mask, False
    if masked or kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__} brings its own mask or position bias")
    step = running_step()
    layer = int(module.layer_idx) - step.first_layer  # type: ignore[arg-type]
    step.appended[layer] += 1
    if step.lenders and (lender := step.lenders[layer]) is not None:
        layer = lender  # which is given the same keys and values again
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    section = step.sections[layer] if step.sections else 0
    scoring = Scoring(scale, sliding_window or 0, softcap, s_aux, section, slopes)
    step.windows[layer] = scoring.most_seen
    if block_indices is not None:
        own = (query[0], key[0], value[0])
        return attend_blocks(step, layer, *own, scoring, block_indices)[None], None
    expansion = expansion_of(module)
    if expansion is not None:
        own = (query[0], key[0], value[0])
        if indices is not None:
            chooses = getattr(module, "indexer", None) is not None
            chosen = (indices, chooses)
            return attend_chosen(step, layer, *own, scoring, expansion, *chosen)[None], None
        return attend_latents(step, layer, *own, scoring, expansion)[None], None
    if not step.chunks and slopes is None:
        return attend_tokens(step, layer, query[0], key[0], value[0], scoring)[None], None
    return _attend_both(step, layer, query[0], key[0], value[0], scoring)[None], None


AttentionInterface.register(ATTENTION_NAME, packed_attention)


def _attend_both(
    step: PackedStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Compute attention of a step with chunks, and perhaps single tokens among them.

    With slopes, single tokens are chunks of one: what computes them together has no bias.
    """
    heads, tokens, _ = query.shape
    attended = query.new_empty((tokens, heads, value.shape[-1]))
    in_pages = reads_pages(step, scoring, query, value)
    if in_pages:
        attend_chunks_of_pages(step, layer, query, key, value, scoring, into=attended)
    by_themselves = step.chunks if scoring.slopes is None else step.slices
    for part in () if in_pages else by_themselves:
        rows = slice(part.row, part.row + part.num_tokens)
        held = step.cache.append(layer, part.sequence_id, part.start, key[:, rows], value[:, rows])
        inputs = (query[:, rows], held, scoring, value.shape[-1])
        if scoring.section:
            attended[rows] = attend_sections(step, part.start, *inputs)
        else:
            attended[rows] = attend_chunk(step, *inputs)
    if step.single and scoring.slopes is None:
        chosen = sent(torch.tensor([part.row for part in step.single]), query.device)
        attended[chosen] = attend_tokens(
            step, layer, query[:, chosen], key[:, chosen], value[:, chosen], scoring
        )
    return attended
