"""Digests of the tensors in a file: right, remembered, and computed again when the file changes."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.model_files import read_header
from distributed_llm.weights.giving import digests as digests_module
from distributed_llm.weights.giving.digests import FileDigests
from distributed_llm.weights.giving.shelf import Place, places_in_file

TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "a": np.arange(1000, dtype=np.float32),
    "b": np.arange(24, dtype=np.int8).reshape(2, 3, 4),
    "none": np.zeros((0, 5), np.float16),
    "same as a": np.arange(1000, dtype=np.float32),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Where digests are kept."""
    return tmp_path / "kept"


def places(file: Path) -> dict[str, Place]:
    header = read_header(file.parent, file.name)
    return dict(zip(header, places_in_file(file, header.values()), strict=True))


def digests_of(file: Path, kept: Path) -> tuple[dict[str, str], int]:
    """Return the digests of all tensors, and how many bytes were read for them."""
    read: list[int] = []
    digests = FileDigests(file, kept)
    found = {name: digests.of(name, place, read.append) for name, place in places(file).items()}
    digests.keep()
    return found, sum(read)


def expected(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as content:
        names = list(content.keys())
        return {n: hashlib.sha256(content.get_tensor(n).tobytes()).hexdigest() for n in names}


def test_they_are_those_of_the_bytes_that_safetensors_reads(
    file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests_module, "_PIECE_BYTES", 999)
    found, read = digests_of(file, kept)
    assert found == expected(file)
    assert found["a"] == found["same as a"]
    assert read == 8024


def test_they_are_remembered_and_nothing_is_read_again(file: Path, kept: Path) -> None:
    digests_of(file, kept)
    assert digests_of(file, kept) == (expected(file), 0)
    link = file.with_name("link.safetensors")
    link.symlink_to(file)
    assert digests_of(link, kept) == (expected(file), 0)


def test_more_of_a_file_is_remembered_beside_the_rest(file: Path, kept: Path) -> None:
    read: list[int] = []
    for name in ("a", "b"):
        digests = FileDigests(file, kept)
        digests.of(name, places(file)[name], read.append)
        digests.keep()
    assert sum(read) == 4024
    _, rest = digests_of(file, kept)
    assert rest == 4000


@pytest.mark.parametrize("what", ["size", "time", "inode"])
def test_a_file_that_changed_is_read_again(file: Path, kept: Path, what: str) -> None:
    digests_of(file, kept)
    before = os.stat(file)
    if what == "size":
        save_file({"a": TENSORS["b"]}, file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif what == "time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:
        other = file.with_name("other")
        other.write_bytes(file.read_bytes())
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(other, file)
    found, read = digests_of(file, kept)
    assert found == expected(file)
    assert read == sum(place.nbytes for place in places(file).values())


def test_what_was_read_while_the_file_changed_is_not_remembered(file: Path, kept: Path) -> None:
    digests = FileDigests(file, kept)
    digests.of("a", places(file)["a"], lambda nbytes: None)
    os.utime(file, ns=(1, 1))
    digests.keep()
    assert not kept.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"file": 1}', b"[" * 100_000])
def test_damaged_notes_are_written_anew(file: Path, kept: Path, damage: bytes) -> None:
    digests_of(file, kept)
    (note,) = kept.iterdir()
    note.write_bytes(damage)
    assert digests_of(file, kept)[1] == 8024
    assert digests_of(file, kept)[1] == 0


def test_a_folder_that_cannot_be_written_costs_only_time(
    file: Path, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept.write_text("a file is in the way")
    assert digests_of(file, kept) == (expected(file), 8024)
    assert "cannot remember the digests of" in caplog.text


def test_a_file_that_is_cut_short_or_gone_is_told(file: Path, kept: Path) -> None:
    place = places(file)["same as a"]
    digests = FileDigests(file, kept)
    os.truncate(file, place.offset + place.nbytes - 1)
    with pytest.raises(CheckpointUnavailable, match="ends before the tensor same as a"):
        digests.of("same as a", place, lambda nbytes: None)
    file.unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        digests.of("b", place, lambda nbytes: None)
    with pytest.raises(CheckpointError, match="is not there"):
        FileDigests(file, kept)
