"""Slabs: memory comes as rows are written, and goes when they are left."""

import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distributed_llm.worker.kv import slabs
from distributed_llm.worker.kv.segments import KVLayout
from distributed_llm.worker.kv.slabs import MIN_ROOM, SlabPool

MIB = 1024 * 1024
WIDE = KVLayout(8, 128, 128, torch.float32, torch.device("cpu"))  # 8 KiB a position
SMALL = KVLayout(2, 4, 6, torch.float32, torch.device("cpu"))  # heads are no whole pages
CODES = KVLayout(
    4, 66, 66, torch.uint8, torch.device("cpu")
)  # nor are rows, but for what is between
NO_PAGES = pytest.mark.skipif(sys.platform != "linux", reason="memory is counted for Linux")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@NO_PAGES
def test_rows_take_memory_for_what_was_written_of_them() -> None:
    pool = SlabPool(WIDE)
    before = resident_bytes()
    rows = [pool.take(16384) for _ in range(8)]  # a GiB of addresses
    for held in rows:
        held.keys[:, :512] = 1.0
        held.values[:, :512] = 1.0
    assert 32 * MIB <= resident_bytes() - before < 48 * MIB
    del rows, held
    assert resident_bytes() - before < 16 * MIB


@NO_PAGES
def test_positions_that_are_dropped_take_no_memory_and_the_others_stay() -> None:
    held = SlabPool(WIDE).take(16384)
    before = resident_bytes()
    held.keys[:, :8192] = 1.0
    held.values[:, :8192] = 2.0
    assert held.row is not None
    assert held.row.slab.drop(held.row, 0, 8000)
    assert resident_bytes() - before < 8 * MIB  # of 64
    assert not held.keys[:, :8000].any()
    assert bool((held.keys[:, 8000:8192] == 1.0).all())
    assert bool((held.values[:, 8000:8192] == 2.0).all())


def test_positions_of_a_page_that_has_others_too_stay() -> None:
    held = SlabPool(SMALL).take(256)
    held.keys.fill_(1.0)
    assert held.row is not None
    held.row.slab.drop(held.row, 0, 64)
    assert bool((held.keys[:, 64:] == 1.0).all())


@NO_PAGES
def test_rows_that_are_no_whole_pages_give_their_memory_back() -> None:
    pool = SlabPool(CODES)
    before = resident_bytes()
    for _ in range(4):
        rows = [pool.take(1) for _ in range(64)]  # 256 KiB of addresses each
        for held in rows:
            held.keys[:, 0] = 1
        del rows, held
    assert resident_bytes() - before < 4 * MIB


@pytest.mark.parametrize("layout", [WIDE, SMALL])
def test_a_row_that_was_left_is_the_next_one_and_zero(layout: KVLayout) -> None:
    pool = SlabPool(layout)
    first, second = pool.take(1), pool.take(MIN_ROOM)
    assert first.row is not None
    assert second.row is not None
    assert (first.row.index, second.row.index) == (0, 1)
    assert first.row.slab is second.row.slab
    first.keys.fill_(float("nan"))
    first.values.fill_(float("inf"))
    del first
    again = pool.take(MIN_ROOM)
    assert again.row is not None
    assert again.row.index == 0
    assert not again.keys.any()
    assert not again.values.any()


def test_rows_have_room_for_what_is_asked() -> None:
    pool = SlabPool(SMALL)
    for capacity, room in ((1, 256), (256, 256), (257, 512), (5000, 8192)):
        assert pool.take(capacity).room == room


def test_more_rows_than_a_slab_has_are_in_another_one() -> None:
    pool = SlabPool(SMALL)
    held = [pool.take(1) for _ in range(65)]
    assert len({id(one.row.slab) for one in held if one.row}) == 2


def no_addresses(*_: object, **__: object) -> mmap.mmap:
    raise OSError("no")


@pytest.mark.parametrize(
    "take_away",
    [
        lambda patch, folder: patch.setattr(mmap, "mmap", no_addresses),
        lambda patch, folder: patch.setattr(slabs, "_OVERCOMMIT", folder / "strict"),
    ],
)
def test_without_slabs_buffers_have_exactly_the_room_that_is_asked(
    take_away: Callable[[pytest.MonkeyPatch, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "strict").write_text("2\n")
    take_away(monkeypatch, tmp_path)
    held = SlabPool(SMALL).take(192)
    assert held.row is None
    assert held.room == 192
