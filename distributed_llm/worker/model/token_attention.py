"""Attention of one token of each of many sequences, together.

What a token attends to is read segment by segment. A segment that several sequences share is read
once for all of them. Segments that lie in one slab are read by one product, with those between
them if these are few; what a sequence does not hold is hidden. Where a sequence has several
segments, the results are merged. What is kept in 8 bits is decoded in pieces that fit into the
caches of a processor. Where the C library was built it does all this in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.segments import KVBuffers
from distributed_llm.worker.model.decoded_rows import CodedRows
from distributed_llm.worker.model.kernels.native.attention import (
    Part,
    attend,
    can_attend,
    places_of,
    read,
)
from distributed_llm.worker.model.kernels.native.calls import Places, unrecorded
from distributed_llm.worker.model.packed_step import PackedStep, Scoring
from distributed_llm.worker.model.page_attention import attend_pages, reads_pages
from distributed_llm.worker.model.partial_attention import (
    Partial,
    fused,
    merged,
    products_are_faster,
    rounds_too_much,
    scores_of,
    weighted,
    with_sinks,
)
from distributed_llm.worker.model.token_schedule import (
    Hidden,
    Reading,
    Run,
    readings_of,
    schedule_of,
)


def attend_tokens(
    step: PackedStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Append the keys and values of the step's single tokens, and compute their attention.

    Args:
        step: that runs.
        layer: within the stage.
        query: [heads, tokens, head_dim], of the single tokens only; or as `row_scores` takes them.
        key: [kv_heads, tokens, head_dim].
        value: [kv_heads, tokens, value_dim].
        scoring: how.

    Returns:
        [tokens, heads, value_dim].
    """
    if reads_pages(step, scoring, query, value):
        return attend_pages(step, layer, query, key, value, scoring)
    coding, in_buffers = step.cache.coding, step.cache.pages is None
    if in_buffers and can_attend(query, key.shape[-1], value.shape[-1]):
        with unrecorded():
            places = make_places(step, layer, key, value, scoring)
            rotation = coding.rotation(key.shape[-1], query.device) if coding else None
        return attend(
            *(query, key, value, places),
            kept=step.cache.kv_dtype,
            rotation=rotation,
            scale=scoring.scale,
            softcap=scoring.softcap,
            sinks=scoring.sinks,
            biases=scoring.biases,
        )
    own = [(part.sequence_id, part.start) for part in step.single]
    step.cache.append_tokens(layer, own, key, value)
    return read_tokens(step, layer, query, scoring, key.shape[-1], value.shape[-1])


def read_tokens(
    step: PackedStep, layer: int, query: Tensor, scoring: Scoring, key_dim: int, value_dim: int
) -> Tensor:
    """Compute the attention of the step's single tokens over what is in the KV cache.

    Args:
        step: that runs.
        layer: within the stage.
        query: as for `attend_tokens`.
        scoring: how.
        key_dim: numbers of a key.
        value_dim: numbers of a value.

    Returns:
        [tokens, heads, value_dim].
    """
    coding = step.cache.coding
    readings = readings_of(step, scoring)
    heads, tokens, dim = query.shape
    plain = step.cache.pages is None and scoring.sinks is None and dim == key_dim == value_dim
    if plain and can_attend(query, key_dim, value_dim):
        buffers = readings[0].segment.layers[layer]
        assert buffers is not None
        return read(
            *(query, _places(step, layer, scoring), buffers.keys.shape[0]),
            kept=step.cache.kv_dtype,
            rotation=coding.rotation(dim, query.device) if coding else None,
            scale=scoring.scale,
            softcap=scoring.softcap,
        )
    if can_attend(query, key_dim, value_dim) and query.shape[-1] == value_dim:
        ...
    held = [_held(step, layer, reading) for reading in readings]
    kv_heads = held[0].keys.shape[0]
    rows = None
    if coding is not None:
        rows = CodedRows(coding, key_dim, value_dim, query.dtype)
        query = rows.rotated(query)
    # [tokens, kv_heads, group, head_dim]
    queries = query.transpose(0, 1).reshape(tokens, kv_heads, heads // kv_heads, -1)
    if len(readings) == tokens == 1:
        kernels = _Kernels(scoring, step.coarse, layer, scoring.sinks is not None, rows)
        part = kernels.attend_one(readings[0], held[0], queries)
    else:
        schedule = schedule_of(step, readings, held, scoring)
        merges = schedule.places is not None and len(schedule.places) > 1
        with_lse = merges or scoring.sinks is not None
        kernels = _Kernels(scoring, step.coarse, layer, with_lse, rows)
        parts = [kernels.attend_run(run, held[run.reading], queries) for run in schedule.runs]
        part = _in_order(parts, schedule.places)
    attended = part.attended
    if scoring.sinks is not None:
        attended = with_sinks(part, scoring.sinks.view(kv_heads, -1))
    return attended.reshape(tokens, heads, -1)


def _held(step: PackedStep, layer: int, reading: Reading) -> KVBuffers:
    """Return buffers with what a reading reads in a layer, and perhaps more."""
    buffers = reading.segment.layers[layer]
    if buffers is None:  # it is in pages
        return step.cache.read(layer, reading.segment, reading.first, reading.stop)
    return buffers


def make_places(
    step: PackedStep, layer: int, key: Tensor, value: Tensor, scoring: Scoring
) -> Places:
    """Make room for the step's single tokens in a layer, and return what they attend to.

    Args:
        step: that runs.
        layer: within the stage.
        key: [kv_heads, tokens, head_dim], like those that will be kept.
        value: [kv_heads, tokens, value_dim], likewise.
        scoring: tells which positions a token attends to.
    """
    own = [(part.sequence_id, part.start) for part in step.single]
    step.cache.make_room(layer, own, key, value)
    return _places(step, layer, scoring)


def _places(step: PackedStep, layer: int, scoring: Scoring) -> Places:
    """Return where single tokens find in a layer what they attend to."""
    parts: list[list[Part]] = [[] for _ in step.single]  # in the order of positions
    for segment, first, stop, readers in readings_of(step, scoring):
        buffers = segment.layers[layer]
        assert buffers is not None
        keys, values = buffers.addresses
        strides = buffers.strides
        ahead = first - buffers.first
        part = Part(keys + ahead * strides[1], values + ahead * strides[3], stop - first, *strides)
        for reader in readers:
            parts[reader].append(part)
    return places_of(parts)


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Computes attention of single tokens in one layer.

    Attributes:
        scoring: how.
        coarse: see `PackedStep`.
        layer: within the stage.
        with_lse: whether lse is needed.
        rows: what keys and values are kept as; None if they are numbers.
    """

    scoring: Scoring
    coarse: set[int]
    layer: int
    with_lse: bool
    rows: CodedRows | None

    def attend_one(self, reading: Reading, held: KVBuffers, queries: Tensor) -> Partial:
        """Compute attention of one token over one segment."""
        there = held.cut(reading.first, reading.stop)
        return self._attend(queries, there.keys[None], there.values[None], None)

    def attend_run(self, run: Run, held: KVBuffers, queries: Tensor) -> Partial:
        """Compute one run: [results, kv_heads, group, value_dim]."""
        count, (_, kv_heads, group, dim) = len(run.queries), queries.shape
        chosen = queries.index_select(0, sent(run.queries, queries.device))
        if run.rows is None:
            there = held.cut(run.first, run.stop)
            keys, values = there.keys[None], there.values[None]
            # Tokens of the same positions become the rows of one matrix, as do heads of one key.
            chosen = chosen.transpose(0, 1).reshape(1, kv_heads, count * group, dim)
        else:
            assert held.row is not None
            rows, slab = slice(*run.rows), held.row.slab
            keys = slab.keys[rows, :, run.first : run.stop]
            values = slab.values[rows, :, run.first : run.stop]
        part = self._attend(chosen, keys, values, run.hidden)
        if run.rows is not None or count == 1:
            return part
        attended = part.attended.reshape(kv_heads, count, group, -1).transpose(0, 1)
        lse = part.lse
        if lse is not None:
            lse = lse.reshape(kv_heads, count, group).transpose(0, 1)
        return Partial(attended, lse)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Hidden | None
    ) -> Partial:
        """Compute attention of one matrix of queries for each of many heads.

        Args:
            queries: [batch, kv_heads, rows, dim].
            keys: [batch, kv_heads, positions, dim], or rows of bytes.
            values: [batch, kv_heads, positions, value_dim], or rows of bytes.
            hidden: what does not count.
        """
        if self.rows is None:
            return self._attend_numbers(queries, keys, values, hidden)
        batch, _, positions, _ = keys.shape
        at_once = self.rows.at_once(keys) // positions
        if batch <= at_once:
            return self._attend_numbers(queries, *self.rows.decoded(keys, values), hidden)
        if not at_once:
            parts = [
                self._attend_row(queries[one : one + 1], keys[one], values[one], shown)
                for one, shown in enumerate(_shown(hidden, batch, positions))
            ]
        else:
            parts = []
            for start in range(0, batch, at_once):
                there = slice(start, start + at_once)
                numbers = self.rows.decoded(keys[there], values[there])
                parts.append(self._attend_numbers(queries[there], *numbers, _rows(hidden, there)))
        return _in_order(parts, None)

    def _attend_row(
        self, queries: Tensor, keys: Tensor, values: Tensor, shown: tuple[int, int]
    ) -> Partial:
        """Compute attention over the positions that are shown of one row, piece by piece."""
        assert self.rows is not None
        merging = replace(self, with_lse=True)
        pieces = []
        for first, stop in self.rows.pieces(keys, *shown):
            numbers = self.rows.decoded(keys[None, :, first:stop], values[None, :, first:stop])
            pieces.append(merging._attend_numbers(queries, *numbers, None))
        if len(pieces) == 1:
            return pieces[0]
        lses = [piece.lse for piece in pieces if piece.lse is not None]
        return merged(torch.stack([piece.attended for piece in pieces]), torch.stack(lses))

    def _attend_numbers(
        self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Hidden | None
    ) -> Partial:
        """Compute what `_attend` is asked for, of keys and values that are numbers."""
        batch, heads, rows, dim = queries.shape
        scoring = self.scoring
        alike = values.shape[-1] == dim and scoring.softcap is None
        if alike and queries.device.type != "cpu" and not self.with_lse and hidden is None:
            whole = F.scaled_dot_product_attention(queries, keys, values, scale=scoring.scale)
            return Partial(whole, None)
        may_fuse = alike and queries.device.type == "cpu"
        added = _added(hidden, keys) if may_fuse else None
        if may_fuse and (
            self.layer in self.coarse or not products_are_faster(keys.dtype, keys.shape, rows)
        ):
            return fused(queries, keys, values, scoring.scale, added)
        flat = (queries * scoring.scale).view(batch * heads, rows, dim)
        scores = scores_of(flat, keys.flatten(0, 1), values.flatten(0, 1))
        if may_fuse and rounds_too_much(scores):
            self.coarse.add(self.layer)
            return fused(queries, keys, values, scoring.scale, added)
        if hidden is not None:
            there = scores.view(batch, heads, -1, rows)[:, :, hidden.start :]
            there.masked_fill_(hidden.positions[:, None, :, None], float("-inf"))
        part = weighted(scores, values.flatten(0, 1), scoring.softcap, with_lse=self.with_lse)
        lse = None if part.lse is None else part.lse.view(batch, heads, rows)
        return Partial(part.attended.view(batch, heads, rows, -1), lse)


def _rows(hidden: Hidden | None, there: slice) -> Hidden | None:
    """Return what does not count of some of the rows."""
    return None if hidden is None else Hidden(hidden.start, hidden.positions[there])


def _shown(hidden: Hidden | None, rows: int, positions: int) -> list[tuple[int, int]]:
    """Return the positions that count of each row: they follow one another."""
    if hidden is None:
        return [(0, positions)] * rows
    of_each = []
    for row in hidden.positions:
        places = hidden.start + (~row).nonzero()
        first = 0 if hidden.start else int(places[0])
        of_each.append((first, int(places[-1]) + 1 if len(places) else hidden.start))
    return of_each


def _added(hidden: Hidden | None, keys: Tensor) -> Tensor | None:
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
    lse = torch.cat(lses) if len(lses) == len(parts) else None  # a kernel may give it unasked
    if places is None:
        return Partial(attended, lse)
    if len(places) == 1:
        chosen = sent(places[0], attended.device)
        return Partial(attended[chosen], None if lse is None else lse[chosen])
    assert lse is not None
    # A token with fewer parts than others is given parts that weigh nothing.
    attended = torch.cat([attended, attended.new_zeros((1, *attended.shape[1:]))])
    lse = torch.cat([lse, lse.new_full((1, *lse.shape[1:]), float("-inf"))])
    chosen = sent(places, attended.device)
    return merged(attended[chosen], lse[chosen])
