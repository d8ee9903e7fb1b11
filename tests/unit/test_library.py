"""The weights as the coordinator has them: fetched, then hashed, as they are asked for."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.types import LayerRange
from distributed_llm.weights.giving.library import Digests, Library
from distributed_llm.weights.giving.shelf import Shelf
from tests.waiting import eventually
from tests.wire.weight_sources import MATRIX_BYTES, SHARDS, WHOLE, Model, model_in

FIRST, SECOND, LAST = LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_in(tmp_path_factory.mktemp("model") / "here")


class Files:
    """The files of a model that are fetched when they are asked for.

    Attributes:
        asked: names of files.
        failures: what the next ones that are asked for fail with.
        go_on: they are there once it is set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.failures: list[Exception] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, name: str, on_bytes: Callable[[int], None]) -> Path:
        self.asked.append(name)
        on_bytes(1)
        self.go_on.wait()
        if self.failures:
            raise self.failures.pop(0)
        return self.folder / name


@contextmanager
def library_of(model: Model, kept: Path) -> Iterator[tuple[Library, Files]]:
    files = Files(model.checkpoint.folder)
    library = Library(model.source, model.checkpoint, files, Shelf(), kept)
    try:
        yield library, files
    finally:
        files.go_on.set()
        library.close()


def complete(library: Library, layers: LayerRange = WHOLE) -> Digests:
    """Return all digests of some layers once they are known."""
    eventually(lambda: library.digests(layers).complete)
    return library.digests(layers)


def expected(model: Model, layers: LayerRange = WHOLE) -> dict[str, str]:
    return {n: hashlib.sha256(model.bytes_of[n]).hexdigest() for n in model.names(layers)}


def test_the_model_is_described_without_reading_weights(model: Model, tmp_path: Path) -> None:
    with library_of(model, tmp_path) as (library, files):
        described = {one.name: one for one in library.description.tensors}
        assert {name: one.nbytes for name, one in described.items()} == {
            name: len(data) for name, data in model.bytes_of.items()
        }
        assert b'"num_hidden_layers": 4' in library.description.config
        assert (library.num_layers, files.asked) == (4, [])


def test_a_file_is_fetched_before_it_is_hashed_and_only_if_it_is_asked_for(
    model: Model, tmp_path: Path
) -> None:
    with library_of(model, tmp_path) as (library, files):
        files.go_on.clear()
        before = library.progress
        assert library.digests(SECOND) == Digests({}, complete=False, failure="")
        eventually(lambda: library.doing == f"gets {SHARDS[1]}")
        assert library.progress > before
        assert library.digests(SECOND).sha256 == {}
        files.go_on.set()
        assert complete(library, SECOND) == Digests(expected(model, SECOND), True, "")
        assert files.asked == [SHARDS[1]]
        assert library.progress >= 2 * MATRIX_BYTES
        assert library.digests(LAST).sha256.keys().isdisjoint(model.names(SECOND))
        eventually(lambda: not library.doing)


def test_what_is_hashed_is_on_the_shelf(model: Model, tmp_path: Path) -> None:
    with library_of(model, tmp_path) as (library, _):
        for name, sha256 in complete(library).sha256.items():
            data = model.bytes_of[name]
            if data:
                assert library.shelf.read(sha256, 0, len(data)) == data


def test_it_is_hashed_once_and_remembered_by_the_next_start(model: Model, tmp_path: Path) -> None:
    with library_of(model, tmp_path) as (library, files):
        complete(library, FIRST)
        complete(library, WHOLE)
        eventually(lambda: not library._asked)
        assert files.asked == [SHARDS[0], *SHARDS[1:]], "no tensor of the first file is missing"
        assert library.progress > 4 * MATRIX_BYTES
    with library_of(model, tmp_path) as (library, files):
        complete(library, WHOLE)
        assert library.progress < MATRIX_BYTES, "nothing was read"


@pytest.mark.parametrize(
    "error", [CheckpointError("The hub is down."), RuntimeError("The hub is down.")]
)
def test_a_failure_is_told_once_and_tried_again(
    model: Model, tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with library_of(model, tmp_path) as (library, files):
        files.failures = [error]
        files.go_on.clear()
        library.digests(SECOND)
        eventually(lambda: files.asked)
        files.go_on.set()
        told = [""]

        def failure() -> str:
            told.append(library.digests(SECOND).failure)
            return told[-1]

        assert "The hub is down." in eventually(failure)
        assert complete(library, SECOND).failure == ""
        assert files.asked == [SHARDS[1]] * 2
        assert "The hub is down." in caplog.text


def test_a_failure_leaves_what_is_known(model: Model, tmp_path: Path) -> None:
    with library_of(model, tmp_path) as (library, files):
        complete(library, FIRST)
        files.failures = [CheckpointError("No.")] * 9
        told: list[Digests] = []

        def is_told() -> bool:
            told.append(library.digests(WHOLE))
            return bool(told[-1].failure)

        eventually(is_told)
        failed = told[-1]
        assert failed.sha256.keys() >= set(model.names(FIRST)) - {"lm_head.weight"}
        assert not failed.complete


def test_a_file_with_other_tensors_than_at_the_start_is_refused(
    model: Model, tmp_path: Path
) -> None:
    other = open_checkpoint(model.checkpoint.folder)
    files = Files(model.checkpoint.folder)
    mixed = {SHARDS[0]: SHARDS[1], SHARDS[1]: SHARDS[0]}
    library = Library(
        ModelSource(kind="folder", name="x"),
        other,
        lambda name, on_bytes: files(mixed.get(name, name), on_bytes),
        Shelf(),
        tmp_path,
    )
    why = eventually(lambda: library.digests(FIRST).failure)
    assert "is another file than the coordinator has opened" in why
    library.close()


def test_nothing_is_begun_after_the_end(model: Model, tmp_path: Path) -> None:
    with library_of(model, tmp_path) as (library, files):
        library.close()
        assert library.digests(WHOLE) == Digests({}, complete=False, failure="")
        assert library._thread is None
        assert not files.asked
