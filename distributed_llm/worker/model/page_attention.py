"""Attention of single tokens over pages of KV cache, by a kernel that reads them where they are.

What a single token attends to is taken in pieces (`page_tables`): of 256 positions, or of a
sixteenth of what there is, if that is more. So a long sequence keeps many parts of a GPU busy at
once, and its pieces follow from itself and from where it lies; kernels that split a sequence by
themselves do that by who else is served.

Heads of queries that share keys become rows of one matrix, as do tokens that share positions.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from distributed_llm.common.workspace import EXPANDED_AT_ONCE
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.page_tables import HostTables, Piece, TableKey, TokenTables
from distributed_llm.worker.kv.pages import Run
from distributed_llm.worker.model.kernels import varlen
from distributed_llm.worker.model.packed_step import PackedStep, PageLayer, Scoring
from distributed_llm.worker.model.partial_attention import merged, with_sinks
from distributed_llm.worker.model.token_schedule import Reading, readings_of

_LEAST_PIECE = 256
_MOST_PIECES = 16
"""Of a reading, where its blocks follow one another."""


def reads_pages(step: PackedStep, scoring: Scoring, query: Tensor, value: Tensor) -> bool:
    """Return whether the kernel computes attention of a layer over the pages of a step's cache.

    Args:
        step: that runs.
        scoring: of the layer.
        query: [..., head_dim].
        value: [..., value_dim].
    """
    if step.cache.pages is None or step.cache.coding is not None:
        return False
    if scoring.softcap is not None or scoring.slopes is not None or scoring.source != "unseen":
        return False
    dim = query.shape[-1]
    if dim != value.shape[-1] or query.dtype != value.dtype:
        return False
    return varlen.is_right(query.device, query.dtype, dim)


def attend_pages(
    step: PackedStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Write the keys and values of the step's single tokens, and compute their attention.

    Args:
        step: that runs.
        layer: within the stage.
        query: [heads, tokens, dim], of the single tokens only.
        key: [kv_heads, tokens, dim].
        value: [kv_heads, tokens, dim].
        scoring: how; one for which `reads_pages`.

    Returns:
        [tokens, heads, dim].
    """
    pages, (kv_heads, tokens, dim) = step.cache.pages, key.shape
    assert pages is not None
    group = query.shape[0] // kv_heads
    step.page_layers[layer] = PageLayer(scoring.window, scoring.section, group)
    tables = _tables(step, table_key(step, layer), query.device)
    pages.write_slots(layer, tables.slots, key, value)
    by_token = query.view(kv_heads, group, tokens, dim).permute(2, 1, 0, 3)
    rows = by_token.index_select(0, tables.queries)  # [rows, group, kv_heads, dim]
    keys, values = pages.tensors_of(layer)
    attended, lse = varlen.attend(
        rows.flatten(0, 1),
        keys,
        values,
        tables.query_ends,
        tables.starts,
        tables.most_queries,
        tables.most_positions,
        scale=scoring.scale,
        lengths=tables.lengths,
    )
    of_rows = attended.view(-1, group, kv_heads, dim)
    if tables.shape.parts == 1 and scoring.sinks is None:
        found = of_rows.index_select(0, tables.places[0])
    else:
        sinks = None if scoring.sinks is None else scoring.sinks.view(kv_heads, group).T
        # [kv_heads, rows * group] to [rows, group, kv_heads]
        found = _put_together(
            of_rows, lse.view(kv_heads, -1, group).permute(1, 2, 0), tables, sinks
        )
    return found.transpose(1, 2).reshape(tokens, -1, dim)


def _put_together(
    attended: Tensor, lse: Tensor, tables: TokenTables, sinks: Tensor | None
) -> Tensor:
    """Return the attention of tokens, [tokens, group, kv_heads, dim].

    Args:
        attended: of their parts, [rows, group, kv_heads, dim].
        lse: of these, [rows, group, kv_heads].
        tables: of the step.
        sinks: [group, kv_heads]; or None.
    """
    parts, tokens = tables.places.shape
    at_once = max(1, EXPANDED_AT_ONCE // (parts * attended[0].numel()))
    found = []
    for first in range(0, tokens, at_once):
        there = slice(first, first + at_once)
        places, counts = tables.places[:, there], tables.counts[:, there]
        sums = lse[places].masked_fill(~counts[..., None, None], float("-inf"))
        whole = merged(attended[places], sums)
        found.append(whole.attended if sinks is None else with_sinks(whole, sinks))
    return found[0] if len(found) == 1 else torch.cat(found)


def table_key(step: PackedStep, layer: int) -> TableKey:
    """Return by what a layer's tables are found, which has attended to pages before."""
    return TableKey(bool(step.cache.windows[layer]), *step.page_layers[layer])


def host_tables(step: PackedStep) -> Mapping[TableKey, HostTables] | None:
    """Return the tables of a step for all layers; None if some do not attend to pages.

    Which do is known once a step has run.
    """
    cache = step.cache
    layers = [layer for layer in range(len(cache.windows)) if cache.knows(layer)]
    if cache.pages is None or any(layer not in step.page_layers for layer in layers):
        return None
    keys = dict.fromkeys(table_key(step, layer) for layer in layers)
    return {key: _host_tables(step, key) for key in keys}


def _tables(step: PackedStep, key: TableKey, device: torch.device) -> TokenTables:
    """Return the tables of layers that are alike, which one step makes and sends once."""
    tables = step.tables.get(key)
    if tables is None:
        told = _host_tables(step, key)
        packed = sent(told.packed(told.shape), device)
        tables = TokenTables.of(packed, told.shape, told.most_queries, told.most_positions)
        step.tables[key] = tables
    return tables


def _host_tables(step: PackedStep, key: TableKey) -> HostTables:
    made = step.made.get(key)
    if not isinstance(made, HostTables):
        pages = step.cache.pages
        assert pages is not None
        last = [(step.cache.segments(one.sequence_id)[-1], one.start) for one in step.single]
        slots = [
            pages.slot(segment, position - segment.start, windowed=key.windowed)
            for segment, position in last
        ]
        seen = Scoring(1.0, key.window, None, None, key.section)
        readings = readings_of(step, seen)
        pieces = [
            piece
            for one in readings
            for piece in _pieces(
                one, pages.runs(one.segment, one.first, one.stop, windowed=key.windowed)
            )
        ]
        made = step.made[key] = HostTables(slots, pieces, key.group)
    return made


def _pieces(reading: Reading, runs: Iterable[Run]) -> Iterator[Piece]:
    """Yield the pieces of what tokens read of a segment, which lies in these runs."""
    at = reading.first
    size = _LEAST_PIECE
    if reading.stop - at > _MOST_PIECES * size:
        size = 1 << ((reading.stop - at - 1) // _MOST_PIECES).bit_length()
    for start, count in runs:
        end = at + count
        while at < end:
            length = min(end, (at // size + 1) * size) - at
            yield Piece(start + count - (end - at), length, reading.readers)
            at += length
