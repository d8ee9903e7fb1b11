"""Attention of one token of each of many sequences, together.

What a token attends to is read segment by segment. A segment that several sequences share is read
once for all of them. Segments that lie in one slab are read by one product, with those between
them if these are few; what a sequence does not hold is hidden. Where a sequence has several
segments, the results are merged.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.worker.kv.segments import KVBuffers, Segment
from distributed_llm.worker.kv.slabs import Slab
from distributed_llm.worker.model.packed_step import PackedStep, Scoring
from distributed_llm.worker.model.partial_attention import (
    Partial,
    by_products,
    fused,
    merged,
    products_are_faster,
    with_sinks,
)

_CALL_BYTES = 1024 * 1024
"""Keys and values that are read in the time that one more call takes, bytes."""


class _Reading(NamedTuple):
    """Positions `[first, stop)` of a segment, counted from its start, and the tokens that see them.

    The tokens are given by their numbers among the step's single tokens.
    """

    segment: Segment
    first: int
    stop: int
    readers: tuple[int, ...]


class _Hidden(NamedTuple):
    """What does not count of each row, bool [rows, positions], at the positions from `start` on."""

    start: int
    positions: Tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """Readings that are computed together.

    Attributes:
        rows: of the slab, [start, stop); None if this is one reading.
        reading: the number of one of the readings.
        first: where the positions begin that are read, in each row.
        stop: where they end.
        queries: int64 [rows]: whose token attends to a row; anybody's where nobody's does. Of one
            reading, [readers].
        hidden: what does not count; None if all does.
    """

    rows: tuple[int, int] | None
    reading: int
    first: int
    stop: int
    queries: Tensor
    hidden: _Hidden | None = None


@dataclass(frozen=True, slots=True)
class _Schedule:
    """Which readings are computed together, and where their results are.

    Attributes:
        runs: in order.
        places: int64 [parts, tokens], of each token's parts in the results of all runs; the number
            of results where a token has fewer parts. None if the results are those of the tokens.
    """

    runs: tuple[_Run, ...]
    places: Tensor | None


def attend_tokens(
    step: PackedStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Append the keys and values of the step's single tokens, and compute their attention.

    Args:
        step: that runs.
        layer: within the stage.
        query: [heads, tokens, head_dim], of the single tokens only.
        key: [kv_heads, tokens, head_dim].
        value: [kv_heads, tokens, value_dim].
        scoring: how.

    Returns:
        [tokens, heads, value_dim].
    """
    step.cache.append_tokens(
        layer, [(part.sequence_id, part.start) for part in step.single], key, value
    )
    readings = _readings(step, scoring.window)
    held = [reading.segment.layers[layer] for reading in readings]
    heads, tokens, _ = query.shape
    kv_heads = key.shape[0]
    # [tokens, kv_heads, group, head_dim]
    queries = query.transpose(0, 1).reshape(tokens, kv_heads, heads // kv_heads, -1)
    if len(readings) == tokens == 1:
        part = _attend_alone(readings[0], held[0], queries, scoring)
    else:
        part = _attend_together(step, readings, held, queries, scoring)
    attended = part.attended
    if scoring.sinks is not None:
        attended = with_sinks(part, scoring.sinks.view(kv_heads, -1))
    return attended.reshape(tokens, heads, -1)


def _readings(step: PackedStep, window: int) -> list[_Reading]:
    """Return what the single tokens of a step read in layers of this window."""
    made_from = "readings", window
    made = step.made.get(made_from)
    if made is None:
        readers: dict[tuple[int, int, int], list[int]] = {}
        segments: dict[int, Segment] = {}
        for number, part in enumerate(step.single):
            chain = step.cache.segments(part.sequence_id)
            for segment, following in itertools.pairwise((*chain, None)):
                assert segment is not None
                stop = (following.start if following else part.start + 1) - segment.start
                first = max(0, part.start + 1 - window - segment.start) if window else 0
                if first < stop:
                    readers.setdefault((segment.number, first, stop), []).append(number)
                    segments[segment.number] = segment
        made = step.made[made_from] = [
            _Reading(segments[number], first, stop, tuple(read_by))
            for (number, first, stop), read_by in readers.items()
        ]
    return made  # type: ignore[return-value]


def _attend_alone(
    reading: _Reading, held: KVBuffers | None, queries: Tensor, scoring: Scoring
) -> Partial:
    assert held is not None
    there = slice(reading.first, reading.stop)
    keys, values = held.keys[None, :, there], held.values[None, :, there]
    return _attend(queries, keys, values, None, scoring, with_lse=scoring.sinks is not None)


def _attend_together(
    step: PackedStep,
    readings: Sequence[_Reading],
    held: Sequence[KVBuffers | None],
    queries: Tensor,
    scoring: Scoring,
) -> Partial:
    schedule = _schedule(step, readings, held, scoring.window)
    with_lse = schedule.places is not None and len(schedule.places) > 1
    with_lse = with_lse or scoring.sinks is not None
    parts = [
        _attend_run(run, held[run.reading], queries, scoring, with_lse=with_lse)
        for run in schedule.runs
    ]
    return _in_order(parts, schedule.places)


def _schedule(
    step: PackedStep, readings: Sequence[_Reading], held: Sequence[KVBuffers | None], window: int
) -> _Schedule:
    """Return which readings of a layer are computed together; layers that are alike share it."""
    slabs: dict[int, int] = {}  # numbered as they appear, for each layer has its own
    signature: list[object] = [window]
    for buffers in held:
        assert buffers is not None
        if buffers.row is None:
            signature.append(None)
        else:
            number = slabs.setdefault(id(buffers.row.slab), len(slabs))
            signature.append((number, buffers.row.index, buffers.keys.shape[0]))
    made_from = tuple(signature)
    made = step.made.get(made_from)
    if made is None:
        made = step.made[made_from] = _new_schedule(readings, held, len(step.single))
    return made  # type: ignore[return-value]


def _new_schedule(
    readings: Sequence[_Reading], held: Sequence[KVBuffers | None], tokens: int
) -> _Schedule:
    alone: list[int] = []
    in_slabs: dict[int, list[int]] = {}
    for number, (reading, buffers) in enumerate(zip(readings, held, strict=True)):
        assert buffers is not None
        if len(reading.readers) > 1 or buffers.row is None:
            alone.append(number)
        else:
            in_slabs.setdefault(id(buffers.row.slab), []).append(number)
    runs: list[_Run] = []
    places: list[list[int]] = [[] for _ in range(tokens)]
    results = 0
    for number in alone:
        reading = readings[number]
        runs.append(_Run(None, number, reading.first, reading.stop, torch.tensor(reading.readers)))
        for reader in reading.readers:
            places[reader].append(results)
            results += 1
    for numbers in in_slabs.values():
        for together in _neighbours(numbers, readings, held):
            rows = [_row_of(held[number]) for number in together]
            runs.append(_slab_run(together, rows, readings))
            for number, row in zip(together, rows, strict=True):
                places[readings[number].readers[0]].append(results + row - rows[0])
            results += rows[-1] - rows[0] + 1
    if places == [[number] for number in range(tokens)] and results == tokens:
        return _Schedule(tuple(runs), None)
    parts = max(map(len, places))
    table = [[*of_one, *[results] * (parts - len(of_one))] for of_one in places]
    return _Schedule(tuple(runs), torch.tensor(table).T.contiguous())


def _row_of(buffers: KVBuffers | None) -> int:
    assert buffers is not None
    assert buffers.row is not None
    return buffers.row.index


def _neighbours(
    numbers: list[int], readings: Sequence[_Reading], held: Sequence[KVBuffers | None]
) -> list[list[int]]:
    """Divide readings of one slab into those that are read together, each in the order of rows.

    Rows are read in one go where that costs no more than one more call: it reads those between
    them, and of all of them as many positions as of the longest. A row is read twice where two
    sequences share different lengths of it.
    """
    numbers = sorted(numbers, key=lambda number: _row_of(held[number]))
    one = held[numbers[0]]
    assert one is not None
    position_bytes = one.nbytes // one.room
    call = _CALL_BYTES // position_bytes  # positions
    groups = [[numbers[0]]]
    start = _row_of(one)
    first, stop = readings[numbers[0]].first, readings[numbers[0]].stop
    cost = stop - first
    for number in numbers[1:]:
        row, reading = _row_of(held[number]), readings[number]
        low, high = min(first, reading.first), max(stop, reading.stop)
        together = (row - start + 1) * (high - low)
        apart = cost + call + reading.stop - reading.first
        if row > _row_of(held[groups[-1][-1]]) and together <= apart:
            groups[-1].append(number)
            first, stop, cost = low, high, together
        else:
            groups.append([number])
            start, first, stop = row, reading.first, reading.stop
            cost = stop - first
    return groups


def _slab_run(numbers: list[int], rows: list[int], readings: Sequence[_Reading]) -> _Run:
    count = rows[-1] - rows[0] + 1
    first = min(readings[number].first for number in numbers)
    stop = max(readings[number].stop for number in numbers)
    queries = torch.full((count,), readings[numbers[0]].readers[0])
    starts, stops = torch.full((count,), first), torch.full((count,), stop)
    for number, row in zip(numbers, rows, strict=True):
        reading = readings[number]
        queries[row - rows[0]] = reading.readers[0]
        starts[row - rows[0]], stops[row - rows[0]] = reading.first, reading.stop
    shown = first if int(starts.max()) > first else int(stops.min())  # before it all counts
    hidden = None
    if shown < stop:
        positions = torch.arange(shown, stop)
        of_each = (positions < starts[:, None]) | (positions >= stops[:, None])
        hidden = _Hidden(shown - first, of_each)
    return _Run((rows[0], rows[-1] + 1), numbers[0], first, stop, queries, hidden)


def _attend_run(
    run: _Run, held: KVBuffers | None, queries: Tensor, scoring: Scoring, *, with_lse: bool
) -> Partial:
    """Compute one run: [results, kv_heads, group, value_dim]."""
    assert held is not None
    count, (_, kv_heads, group, dim) = len(run.queries), queries.shape
    chosen = queries.index_select(0, run.queries.to(queries.device))
    if run.rows is None:
        keys, values = held.keys[None], held.values[None]
        # Tokens of the same positions become the rows of one matrix, as heads of the same keys do.
        chosen = chosen.transpose(0, 1).reshape(1, kv_heads, count * group, dim)
    else:
        slab = _slab_of(held)
        keys, values = slab.keys[slice(*run.rows)], slab.values[slice(*run.rows)]
    keys, values = keys[:, :, run.first : run.stop], values[:, :, run.first : run.stop]
    part = _attend(chosen, keys, values, run.hidden, scoring, with_lse=with_lse)
    if run.rows is not None or count == 1:
        return part
    attended = part.attended.reshape(kv_heads, count, group, -1).transpose(0, 1)
    lse = None if part.lse is None else part.lse.reshape(kv_heads, count, group).transpose(0, 1)
    return Partial(attended, lse)


def _slab_of(held: KVBuffers) -> Slab:
    assert held.row is not None
    return held.row.slab


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: _Hidden | None,
    scoring: Scoring,
    *,
    with_lse: bool,
) -> Partial:
    """Compute attention of [batch, kv_heads, rows, dim] over [batch, kv_heads, positions, dim]."""
    batch, heads, rows, dim = queries.shape
    if values.shape[-1] == dim and scoring.softcap is None:
        if queries.device.type != "cpu":
            if not with_lse and hidden is None:
                whole = F.scaled_dot_product_attention(queries, keys, values, scale=scoring.scale)
                return Partial(whole, None)
        elif not products_are_faster(keys.dtype, tuple(keys.shape), rows):
            return fused(queries, keys, values, scoring.scale, _added(hidden, keys))

    def hide(scores: Tensor) -> None:
        if hidden is not None:
            those = scores.view(batch, heads, -1, rows)[:, :, hidden.start :]
            those.masked_fill_(hidden.positions[:, None, :, None], float("-inf"))

    part = by_products(
        (queries * scoring.scale).view(batch * heads, rows, dim),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        scoring.softcap,
        hide,
        with_lse=with_lse,
    )
    lse = None if part.lse is None else part.lse.view(batch, heads, rows)
    return Partial(part.attended.view(batch, heads, rows, -1), lse)


def _added(hidden: _Hidden | None, keys: Tensor) -> Tensor | None:
    """Return what hides positions when it is added to the scores."""
    if hidden is None:
        return None
    added = keys.new_zeros((len(keys), keys.shape[2]))
    added[:, hidden.start :].masked_fill_(hidden.positions, float("-inf"))
    return added[:, None, None]


def _in_order(parts: Sequence[Partial], places: Tensor | None) -> Partial:
    """Return the results of the tokens in their order."""
    if places is None and len(parts) == 1:
        return parts[0]
    attended = torch.cat([part.attended for part in parts])
    lses = [part.lse for part in parts if part.lse is not None]
    lse = torch.cat(lses) if lses else None
    if places is None:
        return Partial(attended, lse)
    if len(places) == 1:
        chosen = places[0].to(attended.device)
        return Partial(attended[chosen], None if lse is None else lse[chosen])
    assert lse is not None
    # A token with fewer parts than others is given parts that weigh nothing.
    attended = torch.cat([attended, attended.new_zeros((1, *attended.shape[1:]))])
    lse = torch.cat([lse, lse.new_full((1, *lse.shape[1:]), float("-inf"))])
    chosen = places.to(attended.device)
    return merged(attended[chosen], lse[chosen])
