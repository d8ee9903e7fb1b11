"""What the single tokens of a step read, and what of it is computed together."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_llm.worker.kv.segments import KVBuffers, Segment
from distributed_llm.worker.model.packed_step import PackedStep, Scoring

_CALL_BYTES = 1024 * 1024
"""Keys and values that are read in the time that one more call takes, bytes."""


class Reading(NamedTuple):
    """Positions `[first, stop)` of a segment, counted from its start, and the tokens that see them.

    The tokens are given by their numbers among the step's single tokens.
    """

    segment: Segment
    first: int
    stop: int
    readers: tuple[int, ...]


class Hidden(NamedTuple):
    """What does not count of each row, bool [rows, positions], at the positions from `start` on."""

    start: int
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Run:
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
    hidden: Hidden | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which readings are computed together, and where their results are.

    Attributes:
        runs: in order.
        places: int64 [parts, tokens], of each token's parts in the results of all runs; the number
            of results where a token has fewer parts. None if the results are those of the tokens.
    """

    runs: tuple[Run, ...]
    places: Tensor | None


def readings_of(step: PackedStep, scoring: Scoring) -> list[Reading]:
    """Return what the single tokens of a step read in layers that see what these do."""
    made_from = "readings", scoring.window, scoring.section, scoring.source
    made = step.made.get(made_from)
    if made is None:
        readers: dict[tuple[int, int, int], list[int]] = {}
        segments: dict[int, Segment] = {}
        for number, part in enumerate(step.single):
            chain = step.cache.segments(part.sequence_id)
            for lowest, end in scoring.seen_by(part):
                for segment, following in itertools.pairwise((*chain, None)):
                    assert segment is not None
                    stop = min(following.start if following else end, end) - segment.start
                    first = max(0, lowest - segment.start)
                    if first < stop:
                        readers.setdefault((segment.number, first, stop), []).append(number)
                        segments[segment.number] = segment
        made = step.made[made_from] = [
            Reading(segments[number], first, stop, tuple(read_by))
            for (number, first, stop), read_by in readers.items()
        ]
    return made  # type: ignore[return-value]


def schedule_of(
    step: PackedStep,
    readings: Sequence[Reading],
    held: Sequence[KVBuffers],
    scoring: Scoring,
) -> Schedule:
    """Return which readings of a layer are computed together; layers that are alike share it."""
    slabs: dict[int, int] = {}  # numbered as they appear, for each layer has its own
    signature: list[object] = [scoring.window, scoring.section, scoring.source]
    for buffers in held:
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


def _new_schedule(readings: Sequence[Reading], held: Sequence[KVBuffers], tokens: int) -> Schedule:
    alone: list[int] = []
    in_slabs: dict[int, list[int]] = {}
    for number, (reading, buffers) in enumerate(zip(readings, held, strict=True)):
        if len(reading.readers) > 1 or buffers.row is None:
            alone.append(number)
        else:
            in_slabs.setdefault(id(buffers.row.slab), []).append(number)
    runs: list[Run] = []
    places: list[list[int]] = [[] for _ in range(tokens)]
    results = 0
    for number in alone:
        reading = readings[number]
        runs.append(Run(None, number, reading.first, reading.stop, torch.tensor(reading.readers)))
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
        return Schedule(tuple(runs), None)
    parts = max(map(len, places))
    table = [[*of_one, *[results] * (parts - len(of_one))] for of_one in places]
    return Schedule(tuple(runs), torch.tensor(table).T.contiguous())


def _row_of(buffers: KVBuffers) -> int:
    assert buffers.row is not None
    return buffers.row.index


def _neighbours(
    numbers: list[int], readings: Sequence[Reading], held: Sequence[KVBuffers]
) -> list[list[int]]:
    """Divide readings of one slab into those that are read together, each in the order of rows.

    Rows are read in one go where that costs no more than one more call: it reads those between
    them, and of all of them as many positions as of the longest. A row is read twice where two
    sequences share different lengths of it.
    """
    numbers = sorted(numbers, key=lambda number: _row_of(held[number]))
    one = held[numbers[0]]
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


def _slab_run(numbers: list[int], rows: list[int], readings: Sequence[Reading]) -> Run:
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
        hidden = Hidden(shown - first, of_each)
    return Run((rows[0], rows[-1] + 1), numbers[0], first, stop, queries, hidden)
