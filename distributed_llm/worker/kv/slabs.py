"""Slabs: memory for the keys and values of many sequences, in rows at equal distances.

Attention of one token of each of many sequences is one matrix product where what they hold lies at
equal distances. A slab reserves addresses for rows of equal length, far more than are ever filled;
the operating system gives memory for the pages that are written, and takes back those of a row that
is left. So a row takes memory for the positions that it holds, and grows in place.

What was never written of a row is zero: products over several rows read it, and a number that is
not finite would spoil them even with a weight of zero.

Only a CPU's memory comes page by page; elsewhere, and on systems that count addresses as memory,
there are no slabs.
"""

import heapq
import math
import mmap
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from distributed_llm.worker.kv.segments import KVBuffers, KVLayout

MIN_ROOM = 256
"""Positions of the shortest rows; longer ones double them."""

_MAX_ROWS = 64
_MAX_SLAB_BYTES = 256 * 1024 * 1024  # of addresses, keys or values
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_STRICT = "2"  # addresses count as memory


class Slab:
    """Rows of `room` positions each, for keys and values of one layout.

    Args:
        layout: of the layer.
        room: positions of a row.

    Attributes:
        room: as given.
        row_positions: from one row to the next, of one head after the other; rows begin with pages.
        keys: [rows, heads, room, key_dim].
        values: [rows, heads, room, value_dim].
        flat_keys: the same memory, [rows * row_positions, key_dim].
        flat_values: [rows * row_positions, value_dim].

    Raises:
        OSError: the system does not give that many addresses.
    """

    def __init__(self, layout: KVLayout, room: int) -> None:
        self.room = room
        sizes = [dim * layout.dtype.itemsize for dim in (layout.key_dim, layout.value_dim)]
        whole = max(mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, size) for size in sizes)
        self.row_positions = -(-layout.heads * room // whole) * whole
        row_bytes = self.row_positions * max(sizes)
        rows = min(_MAX_ROWS, max(1, _MAX_SLAB_BYTES // row_bytes))
        self._memory = (
            _Pages(layout, room, rows, self.row_positions, layout.key_dim),
            _Pages(layout, room, rows, self.row_positions, layout.value_dim),
        )
        self.keys, self.values = (pages.rows for pages in self._memory)
        self.flat_keys, self.flat_values = (pages.flat for pages in self._memory)
        self._free = list(range(rows))
        self._left: list[int] = []  # by whichever thread; appending to a list is atomic

    def take(self) -> "Row | None":
        """Return the first free row, or None if there is none."""
        while self._left:
            heapq.heappush(self._free, self._left.pop())
        return Row(self, heapq.heappop(self._free)) if self._free else None

    def buffers(self, row: "Row") -> KVBuffers:
        """Return the keys and values of a row."""
        return KVBuffers(self.keys[row.index], self.values[row.index], row)

    def drop(self, row: "Row", start: int, stop: int) -> bool:
        """Give the memory of positions of a row back, which are zero then; return whether it can.

        Pages that have other positions too stay.
        """
        return all(pages.drop(row.index, start, stop) for pages in self._memory)

    def give_back(self, index: int) -> None:
        """Clear a row that nobody reads any more, and let others take it."""
        for pages in self._memory:
            pages.clear(index)
        self._left.append(index)


class Row:
    """A row of a slab. It is given back when nothing refers to it any more."""

    __slots__ = ("index", "slab")

    def __init__(self, slab: Slab, index: int) -> None:
        self.slab = slab
        self.index = index

    def __del__(self) -> None:
        """Give the row back."""
        if not sys.is_finalizing():
            self.slab.give_back(self.index)


class SlabPool:
    """The slabs of one layer, and the buffers in them.

    Args:
        layout: of the layer.
    """

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._slabs: dict[int, list[Slab]] = {}  # by the length of their rows
        self._usable = layout.device.type == "cpu" and _pages_come_when_written()

    def take(self, capacity: int, first: int = 0) -> KVBuffers:
        """Return buffers with room for at least `capacity` positions, in a slab where possible.

        Elsewhere they have none for those before `first`.
        """
        room = MIN_ROOM
        while room < capacity:
            room *= 2
        if self._usable:
            slabs = self._slabs.setdefault(room, [])
            for slab in slabs:
                if (row := slab.take()) is not None:
                    return slab.buffers(row)
            try:
                slabs.append(Slab(self._layout, room))
            except (OSError, OverflowError):
                self._usable = False
            else:
                return self.take(capacity)
        return self._layout.allocate(capacity, first)

    def adopt(self, held: KVBuffers) -> None:
        """Give out free rows of the slab in which these buffers are, too."""
        if held.row is not None:
            slabs = self._slabs.setdefault(held.row.slab.room, [])
            if held.row.slab not in slabs:
                slabs.append(held.row.slab)


class _Pages:
    """The keys or the values of a slab."""

    def __init__(
        self, layout: KVLayout, room: int, rows: int, row_positions: int, dim: int
    ) -> None:
        self._row_bytes = row_positions * dim * layout.dtype.itemsize
        # Private, for dropped pages of shared memory keep their content.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, rows * self._row_bytes, flags=private)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            # A large page would be given for the first position of a row.
            with suppress(OSError):  # the system has none
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.flat: Tensor = torch.frombuffer(self._memory, dtype=layout.dtype).view(-1, dim)
        each = self.flat.view(rows, row_positions, dim)[:, : layout.heads * room]
        self.rows = each.view(rows, layout.heads, room, dim)
        self._drops = sys.platform == "linux"

    def drop(self, index: int, start: int, stop: int) -> bool:
        """Give the memory of positions of a row back; return whether that can be asked for."""
        if self._drops:
            heads, room, dim = self.rows.shape[1:]
            position_bytes = dim * self.rows.element_size()
            for head in range(heads):
                before = index * self._row_bytes + head * room * position_bytes
                first = -(-(before + start * position_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (before + stop * position_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last:
                    self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
        return self._drops

    def clear(self, index: int) -> None:
        """Make a row zero; its memory goes back to the system where that can be asked for."""
        if self._drops:
            self._memory.madvise(mmap.MADV_DONTNEED, index * self._row_bytes, self._row_bytes)
        else:
            with torch.inference_mode():
                self.rows[index].zero_()


def _pages_come_when_written() -> bool:
    """Return whether reserved addresses take no memory before they are written."""
    if sys.platform == "win32":
        return False
    try:
        return _OVERCOMMIT.read_text().strip() != _STRICT
    except OSError:  # not Linux
        return True
