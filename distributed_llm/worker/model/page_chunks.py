"""Attention of the chunks of a step over pages of KV cache, by a kernel that takes many at once.

What a chunk sees, from the first position in the window of its first token on, is one run of
positions; of a text that is cut into sections, there is one for each section. Chunks whose runs lie
in one piece each are computed by one call. What others see is gathered, some chunks at a time,
which is little beside their products.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_llm.common.workspace import EXPANDED_AT_ONCE
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.pages import Run
from distributed_llm.worker.model.kernels import varlen
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, Scoring
from distributed_llm.worker.model.partial_attention import Partial, with_sinks


class _Tables(NamedTuple):
    """Where some chunks of a step write and read, on the device.

    Attributes:
        rows: int64 [tokens], of the packed row.
        slots: int64 [tokens], where their keys and values are written.
        gathered: int64 [positions], what is gathered of a layer's tensors; None: nothing.
        ends: int32 [runs + 1], where the queries of each run begin, and the last end.
        starts: int32 [runs + 1], where its positions begin; the last number says nothing.
        lengths: int32 [runs], how many they are.
        most_queries: of a run.
        most_positions: of a run.
    """

    rows: Tensor
    slots: Tensor
    gathered: Tensor | None
    ends: Tensor
    starts: Tensor
    lengths: Tensor
    most_queries: int
    most_positions: int


class _Chunk(NamedTuple):
    """One chunk: the run of its rows, those of its own positions, and what its sections see.

    Attributes:
        rows: of the packed row.
        slots: where its keys and values are written.
        counts: tokens of each section.
        seen: by section, the runs of positions that its tokens see.
    """

    rows: Run
    slots: list[Run]
    counts: list[int]
    seen: list[list[Run]]

    @property
    def positions(self) -> int:
        """How many positions would be gathered; 0 if each section sees one run."""
        if all(len(runs) == 1 for runs in self.seen):
            return 0
        return sum(count for runs in self.seen for _, count in runs)


def attend_chunks_of_pages(
    step: PackedStep,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    into: Tensor,
) -> None:
    """Write the keys and values of the step's chunks, and compute their attention.

    Args:
        step: that runs.
        layer: within the stage.
        query: [heads, tokens, dim], of all tokens of the step.
        key: [kv_heads, tokens, dim].
        value: [kv_heads, tokens, dim].
        scoring: how; one for which `reads_pages`.
        into: [tokens, heads, dim], where the attention of the chunks is put.
    """
    pages = step.cache.pages
    assert pages is not None
    for tables in _tables(step, layer, key, scoring):
        rows = tables.rows
        own = (states.index_select(1, rows) for states in (key, value))
        pages.write_slots(layer, tables.slots, *own)
        keys, values = pages.tensors_of(layer)
        if tables.gathered is not None:
            keys, values = (states.index_select(0, tables.gathered) for states in (keys, values))
        attended, lse = varlen.attend(
            query.index_select(1, rows).transpose(0, 1),
            keys,
            values,
            tables.ends,
            tables.starts,
            tables.most_queries,
            tables.most_positions,
            scale=scoring.scale,
            lengths=tables.lengths,
            window=varlen.last_tokens(scoring.window),
        )
        if scoring.sinks is not None:
            attended = with_sinks(Partial(attended, lse.T), scoring.sinks)
        into.index_copy_(0, rows, attended)


def _tables(step: PackedStep, layer: int, key: Tensor, scoring: Scoring) -> tuple[_Tables, ...]:
    """Return the tables of layers that are alike, which one step makes and sends once."""
    windowed = bool(step.cache.windows[layer])
    made_from = "chunks", windowed, scoring.window, scoring.section
    made = step.made.get(made_from)
    if made is None:
        at_once = EXPANDED_AT_ONCE // (2 * key.shape[0] * key.shape[-1])
        chunks = [_chunk(step, part, scoring, windowed=windowed) for part in step.chunks]
        made = step.made[made_from] = tuple(
            _made(group, key.device) for group in _groups(chunks, at_once)
        )
    return made  # type: ignore[return-value]


def _chunk(step: PackedStep, part: PackedSlice, scoring: Scoring, *, windowed: bool) -> _Chunk:
    pages, stop = step.cache.pages, part.start + part.num_tokens
    assert pages is not None
    segments, counts, seen = step.cache.segments(part.sequence_id), [], []
    for first, end in _cuts(part, scoring.section):
        counts.append(end - first)
        lowest = scoring.first_seen(first)
        seen.append(pages.runs_of_chain(segments, lowest, end, windowed=windowed))
    slots = pages.runs_of_chain(segments, part.start, stop, windowed=windowed)
    return _Chunk((part.row, part.num_tokens), slots, counts, seen)


def _groups(chunks: Sequence[_Chunk], at_once: int) -> list[list[_Chunk]]:
    """Return chunks as they are computed together, those of which nothing is gathered first.

    Args:
        chunks: of a step.
        at_once: positions to gather at once, unless one chunk sees more.
    """
    groups = [[chunk for chunk in chunks if not chunk.positions]]
    room = 0
    for chunk in chunks:
        if chunk.positions > room:
            groups.append([])
            room = max(at_once, chunk.positions)
        if chunk.positions:
            groups[-1].append(chunk)
            room -= chunk.positions
    return [group for group in groups if group]


def _made(chunks: Sequence[_Chunk], device: torch.device) -> _Tables:
    """Return the tables of chunks that are computed together."""
    seen = [runs for chunk in chunks for runs in chunk.seen]
    counts = [count for chunk in chunks for count in chunk.counts]
    lengths = [sum(count for _, count in runs) for runs in seen]
    gathered = None
    starts = [0, *itertools.accumulate(lengths)]
    if any(chunk.positions for chunk in chunks):
        gathered = sent(_positions([run for runs in seen for run in runs]), device)
    else:
        starts = [*(start for ((start, _),) in seen), 0]
    ends = [0, *itertools.accumulate(counts)]
    told = sent(torch.tensor([*ends, *starts, *lengths], dtype=torch.int32), device)
    of_queries, of_positions, of_lengths = torch.split(told, [len(ends), len(starts), len(lengths)])
    return _Tables(
        sent(_positions([chunk.rows for chunk in chunks]), device),
        sent(_positions([run for chunk in chunks for run in chunk.slots]), device),
        gathered,
        of_queries,
        of_positions,
        of_lengths,
        max(counts),
        max(lengths),
    )


def _cuts(part: PackedSlice, section: int) -> list[tuple[int, int]]:
    """Return the positions [first, stop) of a chunk, section by section if there are any."""
    stop = part.start + part.num_tokens
    if not section:
        return [(part.start, stop)]
    begins = [part.start, *range((part.start // section + 1) * section, stop, section)]
    return list(zip(begins, [*begins[1:], stop], strict=True))


def _positions(runs: list[Run]) -> Tensor:
    """Return all positions of runs, int64."""
    return torch.cat([torch.arange(start, start + count) for start, count in runs])
