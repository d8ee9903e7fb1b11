"""Weights that come over real sockets: from the coordinator, from other workers, and badly."""

import asyncio
import contextlib
import errno
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from huggingface_hub import constants

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable, FetchFailed
from distributed_llm.common.messages import (
    Chunk,
    DigestsReport,
    ModelReport,
    ModelSource,
    NoChunk,
    Refused,
    TensorDigests,
    ToReader,
)
from distributed_llm.common.tensors import Frame, frame_of_bytes
from distributed_llm.common.types import LayerRange
from distributed_llm.common.units import split_address
from distributed_llm.weights import fetch as fetch_module
from distributed_llm.weights import inquiry as inquiry_module
from distributed_llm.weights import source_link
from distributed_llm.weights.cache import partial as partial_module
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.fetching import link as link_module
from distributed_llm.weights.giving.library import Library
from tests.hub_snapshot import COMMIT, NAME, write_snapshot
from tests.unit.cache_parts import content, name_of, put
from tests.unit.test_cache_disk import full_after
from tests.wire.test_transport import come_true, on_loop
from tests.wire.weight_sources import (
    MATRIX_BYTES,
    SHARDS,
    WHOLE,
    Giving,
    Model,
    Reader,
    key_pair,
    model_in,
)

pytestmark = pytest.mark.timeout(60)
FIRST, MIDDLE, LAST = LayerRange(0, 2), LayerRange(1, 3), LayerRange(2, 4)
Answer = tuple[ToReader, tuple[Frame, ...]]


@pytest.fixture(autouse=True)
def _never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine is taken for silent because this one is busy; and what is repeated, is so soon."""
    monkeypatch.setattr(link_module, "SILENCE_S", 1e6)
    monkeypatch.setattr(source_link, "_REDIAL_S", 0.01)
    monkeypatch.setattr(fetch_module, "_ASK_EVERY_S", 0.01)
    monkeypatch.setattr(fetch_module, "_LOOK_EVERY_S", 0.01)


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that happens here is a bug."""
    yield
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_in(tmp_path_factory.mktemp("model") / "here")


@dataclass
class Scene:
    """A coordinator, two workers that have all weights, and a reader that knows them.

    Attributes:
        reader: knows of no worker until it is told.
    """

    model: Model
    library: Library
    coordinator: Giving
    pc: Giving
    mac: Giving
    reader: Reader

    def knows(self, *names: str, layers: LayerRange = WHOLE) -> None:
        """Have the reader know of these workers."""
        self.reader.peers = {name: (getattr(self, name), layers) for name in names}

    def another_reader(self, cache: ContentCache | None = None) -> Reader:
        reader = self.reader
        return Reader(
            self.model, cache or reader.cache, self.coordinator, reader.peers, reader.keys
        )

    async def peers_first(self) -> None:
        """Have the coordinator give nothing before the workers have."""
        self.coordinator.hold()
        await come_true(lambda: all(one.total_bytes for one, _ in self.reader.peers.values()))
        self.coordinator.release()


@asynccontextmanager
async def scene(
    model: Model,
    folder: Path,
    *,
    use_keys: bool = False,
    file: Callable[[str], Path] | None = None,
) -> AsyncIterator[Scene]:
    library = model.library(folder / "digests", file)
    coordinator = Giving(library, key_pair(use_keys))
    pc, mac = (Giving(model.shelf(), key_pair(use_keys)) for _ in range(2))
    reader = Reader(
        model, ContentCache(folder / "cache", None), coordinator, keys=key_pair(use_keys)
    )
    made = Scene(model, library, coordinator, pc, mac, reader)
    try:
        yield made
    finally:
        for giving in (made.coordinator, made.pc, made.mac):
            giving.close()


def flip(data: Frame) -> bytes:
    """Return bytes of which one bit is another."""
    return bytes([data[0] ^ 1]) + bytes(data[1:])


def lying(message: ToReader, frames: tuple[Frame, ...]) -> Answer:
    return message, tuple(map(flip, frames)) if isinstance(message, Chunk) else frames


def short(message: ToReader, frames: tuple[Frame, ...]) -> Answer:
    if not isinstance(message, Chunk):
        return message, frames
    spec, frame = frame_of_bytes(bytes(frames[0])[:-1])
    return msgspec.structs.replace(message, tensors=(spec,)), (frame,)


# ------------------------------------------------------------------ what is right


@pytest.mark.parametrize("use_keys", [False, True], ids=["without keys", "with keys"])
@on_loop
async def test_all_tensors_arrive_once_and_equal_what_safetensors_reads(
    model: Model, tmp_path: Path, use_keys: bool
) -> None:
    async with scene(model, tmp_path, use_keys=use_keys) as its:
        assert await its.reader.load() == model.nbytes()
        assert its.coordinator.total_bytes == model.nbytes()
        assert its.reader.on_bytes >= model.nbytes()
        assert await its.reader.load() == 0, "all is there already"
        assert its.coordinator.total_bytes == model.nbytes()


@on_loop
async def test_only_what_is_missing_for_other_layers_is_transferred(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        assert await its.reader.load(FIRST) == model.nbytes(FIRST)
        wanted = {name_of(model.bytes_of[name]) for name in model.names(FIRST)}
        assert its.coordinator.given_bytes.keys() <= wanted
        assert its.coordinator.total_bytes == model.nbytes(FIRST)
        missing = model.nbytes(FIRST, MIDDLE) - model.nbytes(FIRST)
        assert await its.reader.load(MIDDLE) == missing
        assert its.coordinator.total_bytes == model.nbytes(FIRST, MIDDLE)
        (kept,) = its.reader.cache.contents().models
        assert kept.kept_bytes == kept.total_bytes == model.nbytes(FIRST, MIDDLE)


@on_loop
async def test_two_workers_and_the_coordinator_give_together(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path, use_keys=True) as its:
        its.knows("pc", "mac")
        first = asyncio.create_task(its.peers_first())
        assert await its.reader.load() == model.nbytes()
        await first
        given = [one.total_bytes for one in (its.coordinator, its.pc, its.mac)]
        assert all(given)
        assert sum(given) >= model.nbytes()


@on_loop
async def test_what_one_reader_has_it_gives_to_the_next(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        await its.reader.load()
        its.pc.close()
        its.pc = Giving(its.reader.shelf)
        its.knows("pc")
        other = its.another_reader(ContentCache(tmp_path / "other", None))
        before = its.coordinator.total_bytes
        first = asyncio.create_task(its.peers_first())
        assert await other.load() == model.nbytes()
        await first
        assert its.pc.total_bytes
        assert its.coordinator.total_bytes - before < model.nbytes()


@on_loop
async def test_a_worker_is_not_asked_for_layers_that_it_is_not_said_to_have(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        its.knows("pc", layers=FIRST)
        first = asyncio.create_task(its.peers_first())
        await its.reader.load()
        await first
        others = {name_of(model.bytes_of[f"model.layers.{n}.mlp.weight"]) for n in (2, 3)}
        assert others.isdisjoint(one.sha256 for one in its.pc.asked)


@on_loop
async def test_a_limit_slows_nothing_that_matters_and_loses_nothing(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        its.reader.max_bytes_per_s = 500 << 20
        assert await its.reader.load() == model.nbytes()


@on_loop
async def test_progress_is_told(model: Model, tmp_path: Path) -> None:
    go_on = threading.Event()

    def file(name: str) -> Path:
        if name == SHARDS[1]:
            go_on.wait()
        return model.checkpoint.folder / name

    async with scene(model, tmp_path, file=file) as its:
        with its.reader.fetching() as fetch:
            assert fetch.progress.doing == "asks the coordinator"
            await its.reader.begun(fetch)
            await come_true(lambda: fetch.progress.doing == f"the coordinator gets {SHARDS[1]}")
            go_on.set()
            await its.reader.check(fetch, model.names())
            total = sum(len(data) for data in model.bytes_of.values())
            await come_true(lambda: fetch.progress.here_bytes == total)
            assert fetch.progress.total_bytes == total
            assert fetch.progress.bytes_per_s > 0


@on_loop
async def test_what_the_coordinator_does_for_it_counts_as_progress(
    model: Model, tmp_path: Path
) -> None:
    """So that a load is not given up while files are downloaded and hashed for it."""
    async with scene(model, tmp_path) as its:
        its.coordinator.hold()
        with its.reader.fetching() as fetch:
            await its.reader.begun(fetch)
            await come_true(lambda: its.reader.on_bytes > 0)
            assert fetch.fetched_bytes == 0


@pytest.mark.parametrize("use_keys", [False, True], ids=["without keys", "with keys"])
@on_loop
async def test_weights_are_on_the_wire_in_clear_only_without_keys(
    model: Model, tmp_path: Path, use_keys: bool
) -> None:
    async with scene(model, tmp_path, use_keys=use_keys) as its:
        host, port = split_address(its.coordinator.address)
        seen = bytearray()
        ends: list[asyncio.Task[None]] = []

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer):
                while piece := await reader.read(1 << 16):
                    seen.extend(piece)
                    writer.write(piece)

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, ahead = await asyncio.open_connection(host, port)
            ways = ((reader, ahead), (there, writer))
            ends.extend(asyncio.create_task(carry(*way)) for way in ways)

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        async with server:
            its.coordinator.address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
            await its.reader.load(LayerRange(1, 2))
            await asyncio.gather(*ends)
        assert len(seen) > MATRIX_BYTES
        piece = model.bytes_of["model.layers.1.mlp.weight"][1000:1032]
        assert (piece in seen) is not use_keys
        assert (b"model.layers.1.mlp.weight" in seen) is not use_keys


# ------------------------------------------------------------------ what was there


@on_loop
async def test_a_fetch_that_was_ended_in_the_middle_is_resumed_to_the_byte(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        with its.reader.fetching() as fetch:
            its.coordinator.before = lambda _: (
                its.coordinator.hold() if its.coordinator.total_bytes > MATRIX_BYTES else None
            )
            await its.reader.begun(fetch)
            await come_true(
                lambda: fetch.fetched_bytes >= its.coordinator.total_bytes > MATRIX_BYTES
            )
        written = its.reader.written_bytes()
        assert MATRIX_BYTES < written < model.nbytes()
        its.coordinator.before = lambda _: None
        its.coordinator.release()
        before = its.coordinator.total_bytes
        assert await its.reader.load() == model.nbytes() - written
        assert its.coordinator.total_bytes - before >= model.nbytes() - written


@on_loop
async def test_a_damaged_entry_is_fetched_again_alone(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        await its.reader.load()
        path = its.reader.cache.path(name_of(model.bytes_of["model.layers.1.mlp.weight"]))
        path.write_bytes(flip(path.read_bytes()))
        assert await its.reader.load() == MATRIX_BYTES


@on_loop
async def test_two_workers_of_one_machine_fetch_each_byte_once(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        readers = its.reader, its.another_reader()
        assert sum(await asyncio.gather(*(one.load() for one in readers))) == model.nbytes()
        assert its.coordinator.total_bytes == model.nbytes()


@on_loop
async def test_a_full_disk_ends_it_and_what_was_written_is_resumed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(model, tmp_path) as its:
        with monkeypatch.context() as full:
            full.setattr(partial_module, "FileIO", full_after(300 << 10, errno.ENOSPC))
            with pytest.raises(CheckpointUnavailable, match=r"is full; room for .* more is needed"):
                await its.reader.load(LayerRange(3, 4))
        written = its.reader.written_bytes()
        assert written >= 300 << 10
        assert await its.reader.load(LayerRange(3, 4)) == model.nbytes(LayerRange(3, 4)) - written


@on_loop
async def test_too_little_room_is_told_before_anything_comes(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        await its.another_reader(ContentCache(tmp_path / "other", None)).load()  # all is hashed
        before = its.coordinator.total_bytes
        its.reader.cache = ContentCache(tmp_path / "cache", model.nbytes() - 1)
        with pytest.raises(CheckpointUnavailable, match=r"1 byte are missing.*cache_limit"):
            await its.reader.load()
        assert its.coordinator.total_bytes == before


@on_loop
async def test_room_is_made_by_what_other_models_left(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        await its.another_reader(ContentCache(tmp_path / "other", None)).load()  # all is hashed
        cache = its.reader.cache = ContentCache(tmp_path / "cache", model.nbytes() + 100)
        await its.reader.load(FIRST)
        other = put(cache, content(200))  # used later than those layers
        await its.reader.load(MIDDLE)
        assert other.exists()
        assert await its.reader.load() == model.nbytes() - model.nbytes(FIRST, MIDDLE)
        assert not other.exists()


HUB = ModelSource(kind="hub", name=NAME, revision=COMMIT)


@on_loop
async def test_files_in_the_hubs_cache_are_not_transferred(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the coordinator's machine, which is getting the others."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = write_snapshot(tmp_path / "hub", model.checkpoint.folder)
    (snapshot / SHARDS[1]).rename(tmp_path / "later")

    go_on = threading.Event()

    def file(name: str) -> Path:
        if name == SHARDS[1]:
            (tmp_path / "later").rename(snapshot / name)
            go_on.wait()  # it is not hashed before the reader has found it
        return snapshot / name

    async with scene(Model(model.checkpoint, HUB), tmp_path, file=file) as its:
        with its.reader.fetching(FIRST) as fetch:
            await its.reader.begun(fetch)
            await its.reader.check(fetch, model.names(FIRST))
            go_on.set()
            assert fetch.fetched_bytes == 0
        assert its.coordinator.asked == []


@on_loop
async def test_damaged_files_in_the_hubs_cache_are_left_alone(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    damaged = write_snapshot(tmp_path / "hub", model.checkpoint.folder) / SHARDS[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    async with scene(Model(model.checkpoint, HUB), tmp_path) as its:
        assert await its.reader.load(LayerRange(0, 1)) == model.nbytes(LayerRange(0, 1))
        assert "is not a whole safetensors file" in caplog.text
        assert "Asking other machines for these weights." in caplog.text


# ------------------------------------------------------------------ sources that are lost


@on_loop
async def test_the_rest_comes_from_others_when_a_worker_dies(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        its.knows("pc")
        its.coordinator.hold()

        def die(message: ToReader) -> None:
            if its.pc.total_bytes > MATRIX_BYTES:
                its.pc.close()
                its.coordinator.release()

        its.pc.before = die
        assert await its.reader.load() == model.nbytes()
        assert its.pc.total_bytes > MATRIX_BYTES


@on_loop
async def test_a_coordinator_whose_connection_broke_is_asked_for_the_rest(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        with its.reader.fetching() as fetch:
            await its.reader.begun(fetch)
            its.coordinator.before = lambda _: (
                its.coordinator.cut() if its.coordinator.total_bytes > MATRIX_BYTES else None
            )
            await come_true(lambda: not its.coordinator._open)
            again = Giving(its.library, bind=its.coordinator.address)
            try:
                await its.reader.check(fetch, model.names())
                assert fetch.fetched_bytes == model.nbytes()
                assert again.total_bytes < model.nbytes()
            finally:
                again.close()


@on_loop
async def test_a_worker_that_answers_nothing_does_not_hold_it_up(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "SILENCE_S", 0.05)
    async with scene(model, tmp_path) as its:
        its.knows("pc")
        its.pc.hold()
        its.coordinator.hold()
        task = asyncio.create_task(its.reader.load())
        await come_true(lambda: bool(its.pc.asked))
        its.coordinator.release()
        assert await task == model.nbytes()
        assert its.pc.total_bytes == 0


@on_loop
async def test_who_has_no_weights_says_so_and_others_give_them(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        its.pc.close()
        its.pc = Giving(model.shelf(LayerRange(1, 2)))
        its.knows("pc")
        its.coordinator.hold()
        task = asyncio.create_task(its.reader.load())
        await come_true(lambda: bool(its.pc.asked))
        its.coordinator.release()
        assert await task == model.nbytes()


@on_loop
async def test_a_worker_that_is_not_told_of_the_reader_yet_is_dialled_again(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path, use_keys=True) as its:
        its.knows("pc")
        its.pc.admitted = False
        its.coordinator.hold()
        task = asyncio.create_task(its.reader.load())
        await come_true(lambda: its.pc.refused > 2)
        its.pc.admitted = True
        await come_true(lambda: its.pc.total_bytes > 0)
        its.coordinator.release()
        assert await task == model.nbytes()


@on_loop
async def test_a_worker_that_never_lets_the_reader_in_is_told_of(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(model, tmp_path, use_keys=True) as its:
        its.knows("pc")
        its.pc.admitted = False
        its.coordinator.hold()
        task = asyncio.create_task(its.reader.load())
        await come_true(
            lambda: "pc gives no weights: it does not let this worker in" in caplog.text
        )
        assert its.pc.refused == source_link._MOST_REJECTIONS
        its.coordinator.release()
        assert await task == model.nbytes()


# ------------------------------------------------------------------ sources that lie


@on_loop
async def test_a_worker_that_lies_is_named_and_used_no_more(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(model, tmp_path) as its:
        its.knows("pc")
        its.pc.change = lying
        first = asyncio.create_task(its.peers_first())
        await its.reader.load()
        await first
        assert "pc is not asked for weights any more: it gave wrong bytes of model." in caplog.text


@on_loop
async def test_a_coordinator_that_lies_twice_is_told_of(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        its.coordinator.change = lying
        with pytest.raises(FetchFailed) as caught:
            await its.reader.load()
        said = str(caught.value)
        assert said.startswith("Layers 1-4: ")
        assert "came from the coordinator with wrong bytes twice: memory or disk of" in said


@on_loop
async def test_a_coordinator_that_lies_once_is_believed_again(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(model, tmp_path) as its:

        def once(message: ToReader, frames: tuple[Frame, ...]) -> Answer:
            if isinstance(message, Chunk):
                its.coordinator.change = lambda message, frames: (message, frames)
            return lying(message, frames)

        its.coordinator.change = once
        await its.reader.load()
        assert "had wrong bytes, from the coordinator, and is fetched again" in caplog.text


@on_loop
async def test_a_worker_that_sends_other_lengths_is_used_no_more(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(model, tmp_path) as its:
        its.knows("pc")
        its.pc.change = short
        first = asyncio.create_task(its.peers_first())
        await its.reader.load()
        await first
        assert "pc is not asked for weights any more: it sent" in caplog.text


@on_loop
async def test_answers_that_nobody_asked_for_change_nothing(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        known = name_of(model.bytes_of["model.layers.0.mlp.weight"])
        spec, frame = frame_of_bytes(b"nothing")

        def more(message: ToReader) -> None:
            for sha256 in (known, name_of(b"something else")):
                its.coordinator.send(Chunk(sha256=sha256, offset=1, tensors=(spec,)), (frame,))
                its.coordinator.send(NoChunk(sha256=sha256, offset=1, reason="absent"))
                its.coordinator.send(NoChunk(sha256=sha256, offset=1, reason="failed"))

        its.coordinator.before = more
        assert await its.reader.load() == model.nbytes()


@on_loop
async def test_workers_say_nothing_about_the_model(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        its.knows("pc")

        def more(message: ToReader) -> None:
            its.pc.send(ModelReport(message="There is none."))
            its.pc.send(DigestsReport(layers=WHOLE, failure="There are none."))

        its.pc.before = more
        first = asyncio.create_task(its.peers_first())
        assert await its.reader.load() == model.nbytes()
        await first


@on_loop
async def test_a_worker_that_sends_no_message_is_used_no_more(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(model, tmp_path) as its:
        its.knows("pc")
        its.pc.before = lambda _: its.pc.send_raw([b"no message"])
        first = asyncio.create_task(its.peers_first())
        assert await its.reader.load() == model.nbytes()
        await first
        assert "pc gives no weights: it sent what cannot be read" in caplog.text


@on_loop
async def test_a_worker_that_refuses_is_used_no_more(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(model, tmp_path) as its:
        its.knows("pc")
        its.pc.before = lambda _: its.pc.send(Refused(code="not_allowed", message="Go away."))
        first = asyncio.create_task(its.peers_first())
        assert await its.reader.load() == model.nbytes()
        await first
        assert "pc gives no weights: Go away." in caplog.text


# ------------------------------------------------------------------ a coordinator that is no help


def broken(kind: type[ToReader]) -> Callable[[ToReader, tuple[Frame, ...]], Answer]:
    """Return a change that breaks what these messages hold."""

    def change(message: ToReader, frames: tuple[Frame, ...]) -> Answer:
        return message, tuple(b"\xc1" * len(one) for one in frames) if type(
            message
        ) is kind else frames

    return change


def replaced(kind: type[ToReader], by: ToReader) -> Callable[[ToReader, tuple[Frame, ...]], Answer]:
    """Return a change that answers something else."""
    return lambda message, frames: (by, ()) if type(message) is kind else (message, frames)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (broken(ModelReport), "What the coordinator says of the model is broken"),
        (broken(DigestsReport), "What the coordinator says of the weights is broken"),
        (replaced(ModelReport, ModelReport(message="No.")), "No."),
        (replaced(ModelReport, ModelReport()), "describes no model"),
        (
            replaced(ModelReport, Refused(code="not_allowed", message="Go away.")),
            "does not say what the model consists of: Go away.",
        ),
        (
            replaced(DigestsReport, Refused(code="not_allowed", message="Go away.")),
            "does not say what its tensors hash to: Go away.",
        ),
        (
            replaced(DigestsReport, DigestsReport(layers=WHOLE, failure="The disk is gone.")),
            "cannot give these weights: The disk is gone.",
        ),
    ],
)
@on_loop
async def test_why_the_coordinator_tells_nothing_is_said(
    model: Model,
    tmp_path: Path,
    change: Callable[[ToReader, tuple[Frame, ...]], Answer],
    said: str,
) -> None:
    async with scene(model, tmp_path) as its:
        its.coordinator.change = change
        with pytest.raises(FetchFailed, match=said):
            await its.reader.load()


@pytest.mark.parametrize("kind", [ModelReport, DigestsReport])
@on_loop
async def test_a_coordinator_that_sends_no_message_is_told_of(
    model: Model, tmp_path: Path, kind: type[ToReader]
) -> None:
    async with scene(model, tmp_path) as its:
        its.coordinator.before = lambda message: (
            its.coordinator.send_raw([b"no message"]) if type(message) is kind else None
        )
        with pytest.raises(FetchFailed, match=r"does not say .*it sent what cannot be read"):
            await its.reader.load()


@pytest.mark.parametrize("kind", [ModelReport, DigestsReport])
@on_loop
async def test_a_coordinator_that_does_not_answer_is_given_up(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ToReader]
) -> None:
    monkeypatch.setattr(inquiry_module, "PATIENCE_S", 0.3)
    async with scene(model, tmp_path) as its:
        its.coordinator.change = lambda message, frames: (
            None if type(message) is kind else (message, frames)
        )
        with pytest.raises(FetchFailed, match=r"does not say .* it may be busy"):
            await its.reader.load()


@on_loop
async def test_chunks_of_another_length_from_the_coordinator_end_it(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        its.coordinator.change = short
        with pytest.raises(FetchFailed, match=r"coordinator.*sent .* where it was asked for"):
            await its.reader.load()


@on_loop
async def test_a_coordinator_that_is_used_no_more_is_not_waited_for(
    model: Model, tmp_path: Path
) -> None:
    """It gives wrong lengths of what it has, while it gets the rest."""
    go_on = threading.Event()

    def file(name: str) -> Path:
        if name == SHARDS[1]:
            go_on.wait()
        return model.checkpoint.folder / name

    async with scene(model, tmp_path, file=file) as its:
        its.coordinator.change = short
        with pytest.raises(FetchFailed, match=r"does not say what its tensors hash to: it sent"):
            await its.reader.load()
        go_on.set()


@on_loop
async def test_one_hash_for_tensors_of_two_sizes_is_refused(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        same = encode_payload(TensorDigests(sha256=dict.fromkeys(model.names(), name_of(b"x"))))
        spec, frame = frame_of_bytes(same)
        told = DigestsReport(layers=WHOLE, tensors=(spec,), complete=True)
        its.coordinator.change = lambda message, frames: (
            (told, (frame,)) if isinstance(message, DigestsReport) else (message, frames)
        )
        with pytest.raises(FetchFailed, match="cannot be the same bytes"):
            await its.reader.load()


@on_loop
async def test_a_coordinator_that_serves_another_model_says_so(
    model: Model, tmp_path: Path
) -> None:
    async with scene(model, tmp_path) as its:
        other = ModelSource(kind="folder", name="/another")
        with (
            its.reader.fetching(source=other) as fetch,
            pytest.raises(FetchFailed, match="serves /a folder of another machine by now"),
        ):
            await asyncio.to_thread(fetch.model)


@on_loop
async def test_what_the_coordinator_can_give_arrives_although_it_lacks_the_rest(
    model: Model, tmp_path: Path
) -> None:
    def file(name: str) -> Path:
        if name == SHARDS[1]:
            raise CheckpointError("The hub is down.")
        return model.checkpoint.folder / name

    async with scene(model, tmp_path, file=file) as its:
        with its.reader.fetching() as fetch:
            await its.reader.begun(fetch)
            await its.reader.check(fetch, [n for n in model.names() if "layers.0" in n])
            with pytest.raises(FetchFailed, match="cannot give these weights: The hub is down"):
                await asyncio.to_thread(fetch.wait_for, "model.layers.1.mlp.weight")


# ------------------------------------------------------------------ the end


@on_loop
async def test_a_fetch_that_is_not_wanted_any_more_ends(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        its.coordinator.hold()
        with its.reader.fetching() as fetch:
            await its.reader.begun(fetch)
            waiting = asyncio.create_task(
                asyncio.to_thread(fetch.wait_for, "model.layers.0.mlp.weight")
            )
            await come_true(lambda: bool(its.coordinator.asked))
            its.reader.wanted = False
            with pytest.raises(FetchFailed, match="not wanted any more"):
                await waiting
            await come_true(lambda: not fetch._thread.is_alive())


@on_loop
async def test_closing_frees_who_waits_for_the_model(model: Model, tmp_path: Path) -> None:
    async with scene(model, tmp_path) as its:
        its.coordinator.change = lambda message, frames: None
        with its.reader.fetching() as fetch:
            waiting = asyncio.create_task(asyncio.to_thread(fetch.model))
            await come_true(lambda: bool(its.coordinator.peers))
            fetch.close()
            with pytest.raises(FetchFailed, match="not wanted any more"):
                await waiting


@on_loop
async def test_closing_does_not_wait_for_hashes_of_what_is_here(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(model, tmp_path) as its:
        await its.reader.load()
        read, go_on = threading.Event(), threading.Event()
        pieces: list[int] = []

        def count(self: Reader, nbytes: int) -> None:
            if nbytes > 1:  # no other progress
                pieces.append(nbytes)
                read.set()
                go_on.wait()

        monkeypatch.setattr(Reader, "_count", count)
        monkeypatch.setattr(partial_module, "_CHUNK_BYTES", 100)
        with its.reader.fetching() as fetch:
            await its.reader.begun(fetch)
            await asyncio.to_thread(read.wait)
            closing = asyncio.create_task(asyncio.to_thread(fetch.close))
            await come_true(lambda: fetch._arrivals._ending)
            go_on.set()
            await closing
        assert pieces == [100], "it reads no more of that tensor, nor of others"


@on_loop
async def test_a_bug_ends_a_fetch_and_nobody_waits_for_ever(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("a bug")

    async with scene(model, tmp_path) as its:
        monkeypatch.setattr(fetch_module.Fetch, "_chunk", bug)
        with pytest.raises(FetchFailed, match="a bug"):
            await its.reader.load()
    assert [record for record in caplog.records if record.levelno == logging.ERROR]
    caplog.clear()
