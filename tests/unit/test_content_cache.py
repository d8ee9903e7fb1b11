"""Entries of the cache of weights: written once, resumed at any byte, checked, never half there."""

import errno
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_llm.common.cache_folder import CACHE_VARIABLE, cache_folder
from distributed_llm.common.errors import CheckpointError, WrongContent
from distributed_llm.weights.cache import content_cache as cache_module
from distributed_llm.weights.cache import partial as partial_module
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.cache.partial import Partial
from tests.unit.cache_parts import DATA, NAME, begun, content, files, name_of, put, refuse

CHUNK = 1 << 20
"""How much of a file is read at once, bytes."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a cache, which is not there yet."""
    return tmp_path / "of this user" / "cache"


@pytest.fixture
def cache(folder: Path) -> ContentCache:
    return ContentCache(folder, None)


# ------------------------------------------------------------------ written and read


def test_what_is_written_is_there_under_its_name(cache: ContentCache, folder: Path) -> None:
    assert not cache.has(NAME, len(DATA))
    assert not cache.check(NAME, len(DATA))
    assert not folder.exists()
    path = put(cache)
    assert path == cache.path(NAME) == folder / "tensors" / NAME[:2] / NAME
    assert path.read_bytes() == DATA
    assert cache.has(NAME, len(DATA))
    assert cache.check(NAME, len(DATA))
    assert not cache.has(NAME, len(DATA) + 1)
    assert cache.begin(NAME, len(DATA)) is None, "it is complete"
    assert files(folder) == [path], "no lock, no part"


def test_an_entry_of_no_bytes(cache: ContentCache) -> None:
    assert put(cache, b"").read_bytes() == b""
    assert cache.check(name_of(b""), 0)


def test_what_was_read_is_told(cache: ContentCache) -> None:
    data = content(2 * CHUNK + 5)
    name, read = name_of(data), [0]
    with begun(cache, data) as partial:
        partial.write(data[:-1])
    resumed = cache.begin(name, len(data), read.append)
    assert resumed
    with resumed as partial:
        assert sum(read) == partial.done_bytes == len(data) - 1
        partial.write(data[-1:])
        partial.finish()
    read.clear()
    assert cache.check(name, len(data), read.append)
    assert read == [CHUNK, CHUNK, 5]


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", NAME.upper(), NAME[:-1], f"{NAME}0", f"{NAME}\n", f"/{NAME}"]
)
def test_only_digests_become_names_of_files(cache: ContentCache, folder: Path, name: str) -> None:
    for use in (cache.path, *(lambda name, do=do: do(name, 5) for do in (cache.has, cache.begin))):
        with pytest.raises(ValueError, match="not a SHA-256"):
            use(name)
    assert not folder.exists()


def test_the_folder_is_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert "distributed_llm" in cache_folder().parts


# ------------------------------------------------------------------ resumed


@given(
    data=st.binary(max_size=200),
    cuts=st.lists(st.integers(0, 200), max_size=5),
    piece=st.integers(1, 64),
)
def test_it_is_resumed_at_any_byte(data: bytes, cuts: list[int], piece: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
            with begun(ContentCache(Path(folder), None), data) as partial:
                start = partial.done_bytes
                assert (Path(folder) / "partial" / name_of(data)).read_bytes() == data[:start]
                for at in range(start, cut, piece):
                    partial.write(data[at : min(at + piece, cut)])
                assert partial.done_bytes == cut
                if cut == len(data):
                    partial.finish()
                    break
        cache = ContentCache(Path(folder), None)
        assert cache.check(name_of(data), len(data))
        assert cache.path(name_of(data)).read_bytes() == data


@pytest.mark.parametrize("cut", [CHUNK - 1, CHUNK, CHUNK + 1])
def test_it_is_resumed_beyond_what_is_read_at_once(cache: ContentCache, cut: int) -> None:
    data = content(CHUNK + 10)
    with begun(cache, data) as partial:
        partial.write(data[:cut])
    with begun(cache, data) as partial:
        assert partial.done_bytes == cut
        partial.write(data[cut:])
        partial.finish()
    assert cache.check(name_of(data), len(data))


def test_a_part_that_is_too_long_is_begun_anew(cache: ContentCache, folder: Path) -> None:
    begun(cache).close()
    (folder / "partial" / NAME).write_bytes(DATA + b"x")
    with begun(cache) as partial:
        assert partial.done_bytes == 0
    assert put(cache).read_bytes() == DATA


def test_a_part_that_is_damaged_is_found_in_the_end(cache: ContentCache, folder: Path) -> None:
    begun(cache).close()
    (folder / "partial" / NAME).write_bytes(b"\0" * 100)  # as after a power failure
    with pytest.raises(WrongContent, match="SHA-256"):
        put(cache)
    assert files(folder) == []
    put(cache)
    assert cache.check(NAME, len(DATA))


# ------------------------------------------------------------------ other processes

CHILD = f"""
import sys
from pathlib import Path
from distributed_llm.weights.cache.content_cache import ContentCache
data = sys.stdin.buffer.read({len(DATA)})
partial = ContentCache(Path(sys.argv[1]), None).begin(sys.argv[2], len(data))
partial.write(data[:600])
print(partial.done_bytes, flush=True)
sys.stdin.buffer.read(1)
partial.write(data[600:])
partial.finish()
"""
"""A process that writes an entry, 600 bytes first; and the rest when it is told to."""


@contextmanager
def other_process(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `CHILD` until it has written its first bytes."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), NAME],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(DATA)
        child.stdin.flush()
        assert child.stdout.readline().strip() == b"600"
        try:
            yield child
        finally:
            child.kill()


def test_a_process_that_is_killed_leaves_what_it_wrote(cache: ContentCache, folder: Path) -> None:
    with other_process(folder) as child:
        child.kill()
        child.wait()
        with begun(cache) as partial:
            assert partial.done_bytes == 600
            partial.write(DATA[600:])
            partial.finish()
    assert cache.check(NAME, len(DATA))
    assert files(folder) == [cache.path(NAME)]


def test_one_process_at_a_time_writes_an_entry(cache: ContentCache, folder: Path) -> None:
    put(cache, other := content(10, seed=1))
    with other_process(folder) as child:
        assert cache.begin(NAME, len(DATA)) is None
        pruned = cache.shrink_to(0)
        assert (pruned.freed_bytes, pruned.left_bytes) == (10, 600), "what is written stays"
        assert not cache.has(name_of(other), 10)
        child.communicate(b"!")
        assert child.returncode == 0
        assert cache.begin(NAME, len(DATA)) is None
        assert cache.check(NAME, len(DATA))
    assert files(folder) == [cache.path(NAME)]


def test_one_thread_at_a_time_writes_an_entry(cache: ContentCache, folder: Path) -> None:
    partial = begun(cache)
    assert ContentCache(folder, None).begin(NAME, len(DATA)) is None
    begun(cache, content(10, seed=1)).close()  # another entry is free
    thread = threading.Thread(target=partial.close)  # the right is not bound to a thread
    thread.start()
    thread.join()
    put(cache)
    partial.close()  # once more, when it is over
    assert cache.check(NAME, len(DATA))


def test_who_waited_for_the_right_finds_the_entry_complete(
    cache: ContentCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = partial_module.claim

    def late(*arguments: Any) -> Any:
        with monkeypatch.context() as other:
            other.setattr(cache_module, "claim", real)
            put(ContentCache(folder, None))
        return real(*arguments)

    monkeypatch.setattr(cache_module, "claim", late)
    assert cache.begin(NAME, len(DATA)) is None
    assert files(folder) == [cache.path(NAME)]


# ------------------------------------------------------------------ damaged and wrong

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda data: data[:500] + bytes([data[500] ^ 16]) + data[501:],
    "cut short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "too long": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_found_and_deleted(
    cache: ContentCache,
    folder: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = put(cache)
    path.write_bytes(damage(DATA))
    with caplog.at_level(logging.WARNING, "distributed_llm"):
        assert not cache.check(NAME, len(DATA))
    assert [(one.levelname, str(path) in one.message) for one in caplog.records] == [
        ("WARNING", True)
    ]
    assert files(folder) == []
    put(cache)
    assert cache.check(NAME, len(DATA))


def test_an_entry_of_another_size_is_not_even_read(cache: ContentCache) -> None:
    path, read = put(cache), list[int]()
    path.write_bytes(DATA[:-1])
    assert not cache.check(NAME, len(DATA), read.append)
    assert not read
    assert not path.exists()


def test_a_damaged_entry_that_is_open_elsewhere_is_written_again(
    cache: ContentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(cache)
    path.write_bytes(b"\0" * len(DATA))
    with monkeypatch.context() as windows:  # does not delete what is open
        windows.setattr(Path, "unlink", refuse(errno.EACCES))
        assert not cache.check(NAME, len(DATA))
        assert not cache.has(NAME, len(DATA))
    put(cache)
    assert cache.check(NAME, len(DATA))


def test_a_damaged_entry_that_nobody_may_delete_is_told(
    cache: ContentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache).write_bytes(b"\0" * len(DATA))
    monkeypatch.setattr(Path, "unlink", refuse(errno.EROFS))
    with pytest.raises(CheckpointError, match=f"Read-only.*{CACHE_VARIABLE}"):
        cache.check(NAME, len(DATA))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (b"\0" * len(DATA), "its SHA-256 is another"),
        (DATA[:-1], "999 of 1,000 bytes came"),
        (DATA + b"\0", "more than 1,000 bytes came"),
    ],
)
def test_wrong_content_is_refused_and_nothing_is_left(
    cache: ContentCache, folder: Path, wrong: bytes, why: str
) -> None:

    def take(partial: Partial) -> None:
        partial.write(wrong)
        partial.finish()

    with pytest.raises(WrongContent, match=f"{NAME}.*{why}.*another machine"):
        take(begun(cache))
    assert files(folder) == []
    put(cache)
    assert cache.check(NAME, len(DATA))
