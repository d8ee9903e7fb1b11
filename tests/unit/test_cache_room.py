"""Room in the cache of weights: what goes first, what stays, and what is told about it."""

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import CheckpointUnavailable, ConfigError
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.cache.contents import Contents, KeptModel
from distributed_llm.weights.cache.eviction import ABANDONED_S, Room
from distributed_llm.weights.cache.partial import Partial
from tests.unit.cache_parts import begun, content, files, name_of, put, refuse

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")
A, B, C, D = (content(100, seed) for seed in range(4))
SIZES = {name_of(data): 100 for data in (A, B, C, D)}


class Clock:
    """A clock that goes on by a second each time that it is read."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a cache, which is not there yet."""
    return tmp_path / "cache"


def cache_of(folder: Path, clock: Clock, limit: int | None = None) -> ContentCache:
    return ContentCache(folder, limit, clock=clock)


def left_in(cache: ContentCache) -> list[bytes]:
    return [data for data in (A, B, C, D) if cache.has(name_of(data), 100)]


def begin_at(cache: ContentCache, data: bytes, nbytes: int, at: float) -> Partial:
    """Begin an entry, and have it look as if that was at `at`."""
    partial = begun(cache, data)
    partial.write(data[:nbytes])
    os.utime(cache.folder / "partial" / name_of(data), (at, at))
    return partial


def sizes(*entries: bytes) -> dict[str, int]:
    return {name_of(data): len(data) for data in entries}


# ------------------------------------------------------------------ room


def test_what_fits_deletes_nothing(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock, 400)
    cache.make_room(400, ())
    assert not folder.exists()
    for data in (A, B, C):
        put(cache, data)
    cache.make_room(100, ())
    assert left_in(cache) == [A, B, C]


def test_least_lately_used_goes_first_and_no_more_than_needed(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock, 400)
    for data in (A, B, C, D):
        put(cache, data)
    assert cache.check(name_of(A), 100)  # is a use
    cache.make_room(1, ())
    assert left_in(cache) == [A, C, D]
    cache.make_room(101, ())
    assert left_in(cache) == [A, D]
    cache.make_room(100, ())
    assert left_in(cache) == [A, D]


def test_what_is_to_be_kept_stays(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock, 400)
    for data in (A, B, C, D):
        put(cache, data)
    cache.make_room(200, sizes(A, C))
    assert left_in(cache) == [A, C]


def test_what_was_abandoned_goes_first(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock, 300)
    begin_at(cache, A, 50, clock.now - ABANDONED_S - 10).close()
    begin_at(cache, D, 50, clock.now - ABANDONED_S + 100).close()
    put(cache, B)
    put(cache, C)
    os.utime(cache.path(name_of(B)), (1.0, 1.0))  # even before what was last used in 1970
    cache.make_room(50, ())
    assert left_in(cache) == [B, C]
    assert [path.name for path in files(folder / "partial")] == [name_of(D)]
    cache.make_room(150, ())  # what was begun lately takes its turn among the others
    assert left_in(cache) == [C]
    assert [path.name for path in files(folder / "partial")] == [name_of(D)]
    cache.make_room(200, ())
    assert left_in(cache) == [C]
    assert files(folder / "partial") == []


def test_what_is_being_written_or_resumed_stays(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock, 200)
    begin_at(cache, A, 50, 1.0).close()
    put(cache, C)
    with begin_at(cache, B, 50, 1.0) as written:
        cache.make_room(100, sizes(A))
        assert left_in(cache) == []
        assert {path.name for path in files(folder / "partial")} == sizes(A, B).keys()
        with pytest.raises(CheckpointUnavailable, match="50 bytes are missing"):
            cache.make_room(200, ())
        written.write(B[50:])
        written.finish()
    assert left_in(cache) == [B]


def test_a_limit_that_is_too_small_is_told_and_nothing_deleted(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock, 4096)
    for data in (A, B):
        put(cache, data)
    with pytest.raises(CheckpointUnavailable) as caught:
        cache.make_room(6000, sizes(A))
    assert str(caught.value) == (
        f"{folder}: 5.9 KiB of weights are to be fetched, and there is room for 3.9 KiB: 2.0 KiB "
        "are missing. What is kept may take 4.0 KiB (cache_limit), and the rest of it is in use. "
        "Raise `--cache-limit` to 6100 (6.0 KiB) or more."
    )
    assert left_in(cache) == [A, B]
    cache_of(folder, clock, 6100).make_room(6000, sizes(A))
    assert left_in(cache) == [A]


def test_a_disk_that_is_too_small_is_told(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(100 * GIB, 96 * GIB, 4 * GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    cache = cache_of(folder, clock, 50 * GIB)
    cache.make_room(3 * GIB, ())
    assert asked == [folder.parent], "the folder is not there yet"
    with pytest.raises(CheckpointUnavailable) as caught:
        cache.make_room(5 * GIB, ())
    assert str(caught.value) == (
        f"{folder}: 5.0 GiB of weights are to be fetched, and there is room for 3.0 GiB: 2.0 GiB "
        "are missing. The disk has 4.0 GiB free of 100.0 GiB, of which 1.0 GiB are left to other "
        f"programs. Free some space, or set {CACHE_VARIABLE} to a folder on another disk."
    )
    put(cache, A)
    cache.make_room(3 * GIB + 100, ())
    assert left_in(cache) == []
    assert asked[-1] == folder


@pytest.mark.parametrize(("disk", "left"), [(10 * GIB, GIB // 2), (20 * GIB, GIB), (1 << 50, GIB)])
def test_a_disk_is_never_filled(disk: int, left: int) -> None:
    room = Room(used_bytes=0, limit_bytes=None, free_bytes=left + 10, disk_bytes=disk)
    assert room.lacking_bytes(10) == 0
    assert room.lacking_bytes(11) == 1


def test_what_windows_protects_stays_and_the_next_goes(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(folder, clock, 300)
    for data in (A, B, C):
        put(cache, data)
    open_now = {cache.path(name_of(A))}
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path in open_now:
            raise PermissionError(errno.EACCES, "in use", str(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    cache.make_room(100, ())
    assert left_in(cache) == [A, C]
    open_now.add(cache.path(name_of(C)))
    with pytest.raises(CheckpointUnavailable, match="100 bytes are missing"):
        cache.make_room(200, ())
    pruned = cache.shrink_to(0)
    assert (pruned.freed_bytes, pruned.left_bytes) == (0, 200)


def test_what_is_not_ours_stays(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock)
    put(cache, A)
    others = [folder / place / ".DS_Store" for place in ("tensors", "partial", "models")]
    others.append(cache.path(name_of(A)).with_name("README"))
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of somebody else")
    assert cache.contents().total_bytes == 100
    cache.shrink_to(0)
    assert left_in(cache) == []
    assert all(path.exists() for path in others)


# ------------------------------------------------------------------ models


def test_the_contents_by_model(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock)
    assert cache.contents() == Contents((), 0, 0, 0)
    cache.note_model("one", sizes(A, B, D))
    cache.note_model("two", sizes(B, content(7)))
    cache.note_model("three", sizes(D))
    for data in (A, B, C):
        put(cache, data)
    begin_at(cache, D, 30, 5.0).close()
    used = {data: os.stat(cache.path(name_of(data))).st_mtime for data in (A, B)}
    assert cache.contents() == Contents(
        models=(KeptModel("one", 200, 300, used[B]), KeptModel("two", 100, 107, used[B])),
        total_bytes=330,
        unknown_bytes=100,
        partial_bytes=30,
    )
    cache.check(name_of(A), 100)
    cache.note_model("two", sizes(B, C))  # what is not here is forgotten
    kept = [(one.name, one.kept_bytes) for one in cache.contents().models]
    assert kept == [("one", 200), ("two", 200)], "most lately used first"
    assert cache.contents().unknown_bytes == 0
    cache.check(name_of(C), 100)
    assert [one.name for one in cache.contents().models] == ["two", "one"]


def test_a_model_goes_without_what_others_have_as_well(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock)
    cache.note_model("one", sizes(A, B, D))
    cache.note_model("two", sizes(B, C))
    for data in (A, B, C):
        put(cache, data)
    begin_at(cache, D, 30, 5.0).close()
    pruned = cache.forget_model("one")
    assert (pruned.freed_bytes, pruned.left_bytes) == (130, 0)
    assert left_in(cache) == [B, C]
    assert [one.name for one in cache.contents().models] == ["two"]
    assert cache.forget_model("two").freed_bytes == 200
    assert files(folder) == []


def test_a_model_that_is_not_kept_is_told(folder: Path, clock: Clock) -> None:
    with pytest.raises(ConfigError, match=r"'nowhere' are kept.*dllm cache list"):
        cache_of(folder, clock).forget_model("nowhere")


def test_all_but_what_is_being_written_goes(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock)
    cache.note_model("one", sizes(A))
    cache.note_model("two", sizes(B))
    put(cache, A)
    with begin_at(cache, B, 60, 1.0):
        pruned = cache.clear()
        assert (pruned.freed_bytes, pruned.left_bytes) == (100, 60)
    put(cache, B)
    assert [one.name for one in cache.contents().models] == ["two"], "it was noted, and not lost"
    cache.clear()
    assert files(folder) == []
    put(cache, b"")
    cache.clear()
    assert files(folder) == []


def test_it_shrinks_to_a_size(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock)
    for data in (A, B, C):
        put(cache, data)
    assert cache.shrink_to(300).freed_bytes == 0
    assert cache.shrink_to(299).freed_bytes == 100
    assert left_in(cache) == [B, C]


def test_other_tensors_of_a_model_are_noted_beside_those_that_are_here(
    folder: Path, clock: Clock
) -> None:
    """As when a worker gets other layers."""
    cache = cache_of(folder, clock)
    cache.note_model("m", sizes(A, B))
    put(cache, A)
    cache.note_model("m", sizes(C, D))
    put(cache, C)
    (model,) = cache.contents().models
    assert (model.kept_bytes, model.total_bytes) == (200, 300), "A, C and D; B never came"
    assert cache.contents().unknown_bytes == 0
    cache.forget_model("m")
    assert files(folder) == []


def test_workers_that_note_a_model_at_once_forget_nothing_of_each_other(
    folder: Path, clock: Clock
) -> None:
    entries = [content(10, seed) for seed in range(8)]
    for data in entries:
        put(cache_of(folder, clock), data)
    with ThreadPoolExecutor(len(entries)) as threads:
        for data in entries:
            threads.submit(cache_of(folder, clock).note_model, "m", sizes(data))
    (model,) = cache_of(folder, clock).contents().models
    assert model.kept_bytes == 80
    assert not files(folder / "locks")


def test_notes_of_models_that_are_gone_are_forgotten(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock)
    cache.note_model("gone", sizes(A))
    cache.note_model("here", sizes(B))
    put(cache, B)
    cache.note_model("new", sizes(C))
    assert len(files(folder / "models")) == 3
    clock.now += ABANDONED_S
    cache.note_model("newer", sizes(D))
    assert notes_of(folder) == ["here", "newer"]


def notes_of(folder: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in files(folder / "models"))


NAMES: Iterable[str] = (
    *("Qwen/Qwen3-8B", "Qwen_Qwen3-8B", "qwen/qwen3-8b", "../../up", "C:\\models\\x", "", ".", "Ω"),
    "x" * 4000,
)


def test_names_of_models_are_free(folder: Path, clock: Clock) -> None:
    cache = cache_of(folder, clock)
    put(cache, A)
    for name in NAMES:
        cache.note_model(name, sizes(A))
    assert {one.name for one in cache.contents().models} == set(NAMES)
    found = files(folder / "models")
    assert len({path.name.lower() for path in found}) == len(found) == len(set(NAMES))
    for name in NAMES:
        cache.forget_model(name)
    assert files(folder) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"name": "m"}'])
def test_a_damaged_note_is_forgotten(folder: Path, clock: Clock, damage: bytes) -> None:
    cache = cache_of(folder, clock)
    put(cache, A)
    cache.note_model("m", sizes(A))
    (note,) = files(folder / "models")
    note.write_bytes(damage)
    assert cache.contents() == Contents((), 100, 100, 0)
    assert not note.exists()
    cache.note_model("m", sizes(A))
    assert cache.contents().unknown_bytes == 0


def test_a_note_that_is_read_meanwhile_stays_on_windows(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(folder, clock)
    put(cache, A)
    cache.note_model("m", sizes(A))
    monkeypatch.setattr(os, "replace", refuse(errno.EACCES))
    cache.note_model("m", sizes(B))
    assert [one.name for one in cache.contents().models] == ["m"]
    assert len(files(folder / "models")) == 1


def test_a_note_of_another_user_is_passed_over(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(folder, clock)
    put(cache, A)
    cache.note_model("m", sizes(A))
    monkeypatch.setattr(Path, "open", refuse(errno.EACCES))
    assert cache.contents() == Contents((), 100, 100, 0)
    assert len(files(folder / "models")) == 1
