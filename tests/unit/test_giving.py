"""Giving chunks of weights: what, to whom, how much at a time, and how fast."""

import asyncio
import threading
import time
from pathlib import Path

import pytest

from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.messages import Chunk, NoChunk, ReadChunk, ToReader
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import PeerId
from distributed_llm.weights.giving import giver as giver_module
from distributed_llm.weights.giving.giver import Giver, Pace
from distributed_llm.weights.giving.shelf import Place, Shelf, places_in_file
from tests.unit.cache_parts import content, name_of
from tests.wire.test_transport import Inbox, on_loop

DATA = content(1000)
NAME = name_of(DATA)
PC, MAC = PeerId(b"pc"), PeerId(b"mac")


def read(offset: int = 0, length: int = 1000, sha256: str = NAME) -> ReadChunk:
    return ReadChunk(sha256=sha256, offset=offset, length=length)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """With one tensor, in the middle of a file."""
    file = tmp_path / "file"
    file.write_bytes(b"before" + DATA + b"after")
    shelf = Shelf()
    shelf.put(NAME, Place(file, len(b"before"), len(DATA)))
    return shelf


class Answers(Inbox):
    """What was answered."""

    def take(self, peer: PeerId, message: ToReader, frames: tuple[Frame, ...]) -> None:
        self.put(peer, message, tuple(bytes(frame) for frame in frames))


class HeldShelf(Shelf):
    """A shelf from which nothing can be read until `go_on` is set; counts those who read."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.num_read = 0

    def read(self, sha256: str, offset: int, length: int) -> bytes | None:
        self.go_on.wait()
        self.num_read += 1
        return DATA[offset : offset + length]


def test_bytes_are_those_of_the_tensor_and_no_others(shelf: Shelf) -> None:
    assert shelf.read(NAME, 0, 1000) == DATA
    assert shelf.read(NAME, 990, 10) == DATA[990:]
    for offset, length in ((990, 11), (1000, 1), (1 << 62, 1)):
        with pytest.raises(CheckpointError, match="were asked for of a tensor of 1000"):
            shelf.read(NAME, offset, length)
    assert shelf.read(name_of(b"other"), 0, 1) is None
    shelf.clear()
    assert shelf.read(NAME, 0, 1000) is None


def test_a_file_that_is_cut_or_gone_is_told(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before" + DATA[:-1])
    with pytest.raises(CheckpointUnavailable, match="ends before"):
        shelf.read(NAME, 500, 500)
    (tmp_path / "file").unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        shelf.read(NAME, 0, 1)


def test_places_are_of_the_same_tensors_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not there"):
        places_in_file(tmp_path / "x.safetensors", [TensorInfo("a", "x", "F32", (1,), 0, 4)])


@on_loop
async def test_chunks_are_answered_with_what_they_are_of(shelf: Shelf) -> None:
    answers = Answers()
    giver = Giver(shelf, answers.take, max_bytes_per_s=None)
    giver.asked(PC, read(100, 50))
    await answers.until(1)
    ((peer, message, frames),) = answers
    assert isinstance(message, Chunk)
    assert (peer, message.sha256, message.offset) == (PC, NAME, 100)
    assert frames == (DATA[100:150],)
    giver.close()


@on_loop
async def test_what_is_not_there_is_told_and_why(shelf: Shelf, tmp_path: Path) -> None:
    answers = Answers()
    giver = Giver(shelf, answers.take, max_bytes_per_s=None)
    other = name_of(b"other")
    giver.asked(PC, read(sha256=other))
    await answers.until(1)
    assert answers[0][1] == NoChunk(sha256=other, offset=0, reason="absent")
    (tmp_path / "file").unlink()
    giver.asked(PC, read(7))
    await answers.until(2)
    failed = answers[1][1]
    assert (failed.sha256, failed.offset, failed.reason) == (NAME, 7, "failed")
    giver.close()


@on_loop
async def test_what_one_asks_for_is_bounded_and_others_are_served() -> None:
    answers, shelf = Answers(), HeldShelf()
    giver = Giver(shelf, answers.take, max_bytes_per_s=None)
    most = giver_module._MOST_ASKED
    for number in range(most + 3):
        giver.asked(PC, read(number, 1))
    assert [(peer, message.reason) for peer, message, _ in answers] == [(PC, "failed")] * 3
    assert "on their way to this worker already" in answers[0][1].message
    giver.asked(MAC, read(5, 1))
    shelf.go_on.set()
    await answers.until(3 + most + 1)
    assert [peer for peer, _, _ in answers[3:]].count(MAC) == 1
    giver.asked(PC, read(0, 1))
    await answers.until(3 + most + 2)
    assert isinstance(answers[-1][1], Chunk), "it has got what it asked for, and may ask again"
    assert not giver._asked
    giver.close()


@on_loop
async def test_few_chunks_are_in_memory_before_a_socket_has_them() -> None:
    """While the event loop is busy, no more than a few are read."""
    answers, shelf = Answers(), HeldShelf()
    giver = Giver(shelf, answers.take, max_bytes_per_s=None)
    for number in range(40):
        giver.asked(PC, read(number, 1))
    shelf.go_on.set()
    while giver._room._value:  # the loop is not to run meanwhile
        pass
    assert shelf.num_read <= giver_module._MOST_READ
    await answers.until(40)
    giver.close()


@on_loop
async def test_after_the_end_nothing_is_answered_and_no_thread_is_left() -> None:
    answers, shelf = Answers(), HeldShelf()
    giver = Giver(shelf, answers.take, max_bytes_per_s=1)
    for number in range(40):
        giver.asked(PC, read(number, 1))
    giver.close()
    shelf.go_on.set()
    await asyncio.to_thread(giver._threads.shutdown, wait=True)
    giver.asked(PC, read())
    await asyncio.sleep(0)
    assert not answers


@pytest.mark.parametrize(("rate", "waits"), [(None, []), (100, [0.0, 0.5, 1.0])])
def test_all_readers_together_get_so_many_bytes_per_second(
    rate: int | None, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    pace = Pace(rate)
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    monkeypatch.setattr(pace._closed, "wait", waited.append)
    for _ in range(3):
        pace.wait(50)
    assert waited == waits
