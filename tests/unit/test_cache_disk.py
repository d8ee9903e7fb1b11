"""The cache of weights on disks that are full, fail, or may not be written; and on Windows."""

import errno
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.weights.cache import partial as partial_module
from distributed_llm.weights.cache.content_cache import ContentCache
from tests.unit.cache_parts import DATA, NAME, begun, files, put, refuse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a cache, which is not there yet."""
    return tmp_path / "of this user" / "cache"


@pytest.fixture
def cache(folder: Path) -> ContentCache:
    return ContentCache(folder, None)


def full_after(nbytes: int, code: int) -> type[FileIO]:
    """Return files that take so many bytes, in small writes, until the disk is full."""

    class Full(FileIO):
        left = nbytes

        def write(self, data: Any) -> int:
            if not self.left:
                raise OSError(code, os.strerror(code))
            count = super().write(data[: min(self.left, 64)])
            self.left -= count
            return count

    return Full


@pytest.mark.parametrize(
    ("code", "what"), [(errno.ENOSPC, "The disk of"), (errno.EDQUOT, "Your quota on the disk of")]
)
def test_a_full_disk_is_told_and_breaks_nothing(
    cache: ContentCache, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, what: str
) -> None:
    with monkeypatch.context() as full:
        full.setattr(partial_module, "FileIO", full_after(300, code))
        with begun(cache) as partial:
            with pytest.raises(CheckpointUnavailable) as caught:
                partial.write(DATA)
            assert partial.done_bytes == 300
    said = str(caught.value)
    assert said.startswith(f"{what} {folder} is full; room for 700 bytes more is needed. ")
    assert "dllm cache prune" in said
    assert CACHE_VARIABLE in said
    with begun(cache) as partial:
        assert partial.done_bytes == 300
        partial.write(DATA[300:])
        partial.finish()
    assert cache.check(NAME, len(DATA))


def test_who_has_the_right_can_go_on_when_there_is_room_again(
    cache: ContentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = full_after(300, errno.ENOSPC)
    monkeypatch.setattr(partial_module, "FileIO", kind)
    with begun(cache) as partial:
        with pytest.raises(CheckpointUnavailable):
            partial.write(DATA)
        partial._file.left = len(DATA)  # type: ignore[attr-defined]
        partial.write(DATA[partial.done_bytes :])
        partial.finish()
    assert cache.check(NAME, len(DATA))


def test_a_disk_that_is_full_in_the_end_keeps_what_is_there(
    cache: ContentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(cache) as partial, monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse(errno.ENOSPC))  # as shares do
        partial.write(DATA)
        with pytest.raises(CheckpointUnavailable, match=r"is full\. Free some space"):
            partial.finish()
    assert not cache.has(NAME, len(DATA))
    with begun(cache) as partial:
        assert partial.done_bytes == len(DATA)
        partial.finish()
    assert cache.check(NAME, len(DATA))


@pytest.mark.parametrize("place", [".", "tensors", "partial", "locks", "models"])
def test_a_file_where_a_folder_should_be_is_named(folder: Path, place: str) -> None:
    in_the_way = folder / place
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file")
    cache = ContentCache(folder, None)

    def use_it() -> None:
        cache.note_model("m", {})
        put(cache)

    with pytest.raises(CheckpointError) as caught:
        use_it()
    said = str(caught.value)
    assert said.startswith(f"{in_the_way}")
    assert f"a file is where a folder should be; weights are to be kept in {folder}" in said
    assert CACHE_VARIABLE in said
    assert not isinstance(caught.value, CheckpointUnavailable), "only a person can put it right"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_named(
    cache: ContentCache, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "mkdir", refuse(code))
    uses: tuple[Callable[[], object], ...] = (
        lambda: cache.note_model("m", {}),
        lambda: cache.begin(NAME, len(DATA)),
    )
    for use in uses:
        with pytest.raises(CheckpointError) as caught:
            use()
        assert f"cannot be written: {os.strerror(code)}. Weights are kept in {folder}: let the" in (
            str(caught.value)
        )
        assert not isinstance(caught.value, CheckpointUnavailable)


def test_a_share_that_fails_may_be_back(
    cache: ContentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache)
    with monkeypatch.context() as away:
        away.setattr(Path, "open", refuse(errno.ESTALE))
        with pytest.raises(CheckpointUnavailable, match=r"cannot be read: Stale.*disk or share"):
            cache.check(NAME, len(DATA))
    with monkeypatch.context() as away:
        away.setattr(os, "mkdir", refuse(errno.EIO))
        with pytest.raises(CheckpointUnavailable, match="Check the disk or share"):
            cache.note_model("m", {})
    assert cache.check(NAME, len(DATA))


def test_a_folder_that_is_only_read_can_be_used(
    cache: ContentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache)
    monkeypatch.setattr(os, "utime", refuse(errno.EROFS))
    assert cache.check(NAME, len(DATA))


def test_windows_does_not_rename_over_what_is_open(
    cache: ContentCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(cache)
    path.write_bytes(b"")
    monkeypatch.setattr(os, "replace", refuse(errno.EACCES))
    with begun(cache) as partial:
        partial.write(DATA)
        with pytest.raises(CheckpointUnavailable, match=r"try again.*What was fetched is kept"):
            partial.finish()
    with begun(cache) as partial:
        assert partial.done_bytes == len(DATA)
        path.write_bytes(DATA)  # by whoever has it open now
        partial.finish()
    assert files(folder) == [path]
