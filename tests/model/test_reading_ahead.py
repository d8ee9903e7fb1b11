"""Tensors that are read before they are wanted are the same, and so are failures."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed_llm.common.errors import CheckpointUnavailable
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.weights.giving.shelf import Place
from distributed_llm.worker.model import reading_ahead
from distributed_llm.worker.model.reading_ahead import ReadingAhead

VALUES = torch.arange(300, dtype=torch.int32).view(3, 100)
INFOS = [
    TensorInfo(f"t{row}", "file", "I32", (100,), row * VALUES[0].nbytes, VALUES[0].nbytes)
    for row in range(3)
]


class Reader(ReadingAhead):
    """Tells which threads have read."""

    def __init__(self, folder: Path) -> None:
        self.threads: list[str] = []
        super().__init__(
            lambda info: Place(folder / info.file, info.offset, info.nbytes),
            lambda nbytes: self.threads.append(threading.current_thread().name),
        )


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    (tmp_path / "file").write_bytes(VALUES.numpy().tobytes())
    with Reader(tmp_path) as reader:
        yield reader


def read(reader: Reader, row: int) -> Tensor:
    tensor = reader.read(INFOS[row])
    assert tensor.equal(VALUES[row])
    return tensor


def test_what_was_read_ahead_is_not_read_again(reader: Reader) -> None:
    reader.read_ahead(INFOS[:2])
    for row in range(3):
        read(reader, row)
    ahead, again, other = reader.threads
    assert ahead.startswith("reading-ahead")
    assert again == ahead
    assert other == threading.current_thread().name


def test_a_tensor_is_handed_out_once(reader: Reader) -> None:
    reader.read_ahead(INFOS[:1])
    assert read(reader, 0).data_ptr() != read(reader, 0).data_ptr()
    assert len(reader.threads) == 2


def test_there_is_room_for_so_many_bytes(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_ahead, "_MOST_BYTES", 2 * VALUES[0].nbytes)
    reader.read_ahead(INFOS)
    read(reader, 2)
    assert threading.current_thread().name in reader.threads
    assert list(reader._ahead) == INFOS[:2]


def test_what_nobody_wanted_is_given_up(reader: Reader) -> None:
    reader.read_ahead(INFOS[:2])
    reader.read_ahead(INFOS[2:])
    assert list(reader._ahead) == INFOS[2:]
    read(reader, 0)


def test_failures_are_told_to_whoever_wants_the_tensor(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    reader.read_ahead(INFOS)
    with pytest.raises(CheckpointUnavailable, match="ends"):
        reader.read(INFOS[1])


def test_the_thread_ends_with_the_loading(tmp_path: Path) -> None:
    with Reader(tmp_path) as reader:
        reader.read_ahead(INFOS)
    own = [thread for thread in threading.enumerate() if thread.name.startswith("reading-ahead")]
    for thread in own:
        thread.join(10)
        assert not thread.is_alive()
