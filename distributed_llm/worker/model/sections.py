"""Attention of layers that cut the text into sections, and see of it the section of a token.

Within a section it is attention as in all layers. So a chunk of a prompt is attended to section by
section; a single token reads from where its section begins (`token_schedule`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.chunk_attention import attend_chunk
from distributed_llm.worker.model.packed_step import PackedStep, Scoring


def attend_sections(
    step: PackedStep,
    start: int,
    queries: Tensor,
    held: Sequence[KVBuffers],
    scoring: Scoring,
    value_dim: int,
) -> Tensor:
    """Compute attention of the last tokens of a sequence, section by section.

    Args:
        step: that runs.
        start: position of the first of these tokens.
        queries: [heads, tokens, head_dim].
        held: keys and values of all positions that are kept, the chunk's own at the end, in order.
        scoring: how, with a section.
        value_dim: numbers of a value.

    Returns:
        [tokens, heads, value_dim].
    """
    end = start + queries.shape[1]
    within = replace(scoring, section=0)
    attended, first = [], start
    while first < end:
        begin = scoring.first_seen(first)
        stop = min(begin + scoring.section, end)
        rows = queries[:, first - start : stop - start]
        seen = _cut_from_end(held, end - begin, end - stop)
        attended.append(attend_chunk(step, rows, seen, within, value_dim))
        first = stop
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _cut_from_end(held: Sequence[KVBuffers], begin: int, stop: int) -> list[KVBuffers]:
    """Return views of positions that are counted back from the end of all of them."""
    found = []
    after = sum(one.keys.shape[1] for one in held)
    for one in held:
        count = one.keys.shape[1]
        after -= count  # positions behind this one
        low, high = max(0, count + after - begin), min(count, count + after - stop)
        if low < high:
            found.append(one.cut(one.first + low, one.first + high))
    return found
