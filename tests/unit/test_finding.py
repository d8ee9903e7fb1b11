"""Where a worker finds weights: its own copy, the hub's cache, other machines, the hub itself."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from huggingface_hub import constants

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.errors import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointUnavailable,
    FetchFailed,
)
from distributed_llm.common.messages import (
    FetchProgress,
    LoadStage,
    ModelDescription,
    ModelSource,
)
from distributed_llm.common.model_names import fingerprints
from distributed_llm.common.types import Epoch, LayerRange
from distributed_llm.weights.fetch import Fetch
from distributed_llm.weights.giving.library import Library
from distributed_llm.weights.giving.shelf import Place
from distributed_llm.worker.compute import finding
from distributed_llm.worker.compute.finding import WeightFinder
from tests.hub_snapshot import COMMIT, NAME, write_snapshot
from tests.waiting import eventually
from tests.wire.weight_sources import SHARDS, Model, model_in

LAYERS = LayerRange(0, 2)
MATRIX = "model.layers.0.mlp.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_in(tmp_path_factory.mktemp("model") / "here")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of this machine, in which there is nothing, without a hub to reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


class FakeFetch:
    """Stands for a fetch: has the weights of a model, or fails.

    Attributes:
        begun: whether it was.
        closed: whether it was.
        failure: what waiting for each tensor meets.
        progress: of it.
        go_on: nobody gets anything before it is set.
    """

    def __init__(self, model: Model, failure: CheckpointError | None = None) -> None:
        self.begun = self.closed = False
        self.failure = failure
        self.fetched_bytes = 7
        self.progress = FetchProgress(here_bytes=1, total_bytes=2)
        self.go_on = threading.Event()
        self.go_on.set()
        self.described: ModelDescription = Library(
            model.source, model.checkpoint, cast(Any, None), cast(Any, None), Path()
        ).description

    def model(self) -> ModelDescription:
        return self.described

    def begin(self, checkpoint: object) -> None:
        self.begun = True

    def wait_for(self, name: str) -> Place:
        self.go_on.wait()
        if self.failure:
            raise self.failure
        return Place(Path("fetched"), 0, len(name))

    def close(self) -> None:
        self.closed = True
        self.go_on.set()


def order(model: Model, source: ModelSource | None = None) -> LoadStage:
    source = source or model.source
    prints = fingerprints(source, model.checkpoint, LAYERS)
    return LoadStage(
        epoch=Epoch(1),
        source=source,
        layers=LAYERS,
        dtype="float32",
        wire_dtype="float32",
        digest=model.checkpoint.digest(LAYERS, prints),
        kv_tokens=64,
        link_key="key",
    )


def folder_source(folder: Path) -> ModelSource:
    return ModelSource(kind="folder", name=str(folder))


HUB = ModelSource(kind="hub", name=NAME, revision=COMMIT)


def finder(fetch: FakeFetch | None, local_model: str = "") -> WeightFinder:
    """Return a finder that may fetch so; None may not fetch."""

    def start(*_: object) -> Fetch:
        assert fetch is not None, "it is here already"
        return cast(Fetch, fetch)

    return WeightFinder(local_model, start)


def find(
    found: WeightFinder, wanted: LoadStage, is_wanted: Callable[[], bool] = lambda: True
) -> Any:
    return found.weights(wanted, is_wanted, lambda nbytes: None)


def changed(model: Model, folder: Path) -> Path:
    """Return a copy of the model of which one weight is another."""
    folder.mkdir()
    for file in model.checkpoint.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    info = model.checkpoint.tensors[MATRIX]
    with open(folder / info.file, "r+b") as content:
        content.seek(info.offset)
        content.write(b"other")
    return folder


# ------------------------------------------------------------------ here


def test_a_folder_with_the_same_weights_is_read(model: Model) -> None:
    wanted = order(model, folder_source(model.checkpoint.folder))
    with find(finder(None), wanted) as weights:
        assert weights.checkpoint.folder == model.checkpoint.folder
        assert (weights.locate, weights.fetch) == (None, None)
        assert (weights.fetched_bytes, weights.waited_s) == (0, 0.0)


def test_the_folder_of_the_worker_is_read_wherever_the_coordinator_has_it(
    model: Model, tmp_path: Path
) -> None:
    with find(finder(None, str(model.checkpoint.folder)), order(model)) as weights:
        assert weights.checkpoint.folder == model.checkpoint.folder


def test_other_weights_in_the_folder_of_the_worker_are_an_error(
    model: Model, tmp_path: Path
) -> None:
    other = changed(model, tmp_path / "other")
    with (
        pytest.raises(CheckpointMismatch, match=r"dllm worker --model.*come from other machines"),
        find(finder(None, str(other)), order(model)),
    ):
        pass


@pytest.mark.parametrize("local_model", ["no such folder", "damaged"])
def test_a_folder_of_the_worker_that_cannot_be_read_is_an_error(
    model: Model, tmp_path: Path, local_model: str
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    with (
        pytest.raises(CheckpointError),
        find(finder(None, str(tmp_path / local_model)), order(model)),
    ):
        pass


def test_weights_in_the_hubs_cache_are_read(model: Model, hub_cache: Path) -> None:
    folder = write_snapshot(hub_cache, model.checkpoint.folder)
    with find(finder(None), order(model, HUB)) as weights:
        assert weights.checkpoint.folder == folder


# ------------------------------------------------------------------ from other machines


def test_what_is_not_here_is_fetched(model: Model) -> None:
    fetch = FakeFetch(model)
    found = finder(fetch)
    assert found.progress is None
    with find(found, order(model)) as weights:
        assert fetch.begun
        assert found.progress == fetch.progress
        assert list(weights.checkpoint.tensors) == list(model.checkpoint.tensors)
        assert weights.checkpoint.config == model.checkpoint.config
        info = weights.checkpoint.tensors[MATRIX]
        assert weights.locate(info) == Place(Path("fetched"), 0, len(MATRIX))
        assert weights.fetched_bytes == 7
    assert fetch.closed
    assert found.progress is None


def test_other_weights_where_the_coordinator_has_its_own_are_left_alone(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = FakeFetch(model)
    other = changed(model, tmp_path / "other")
    with find(finder(fetch), order(model, folder_source(other))):
        assert fetch.begun
    assert "are not those of the coordinator" in caplog.text
    assert "Asking other machines for them." in caplog.text


def test_a_damaged_folder_where_the_coordinator_has_its_own_is_left_alone(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = FakeFetch(model)
    (tmp_path / "config.json").write_text("{")
    with find(finder(fetch), order(model, folder_source(tmp_path))):
        assert fetch.begun
    assert "is not JSON" in caplog.text


def test_weights_of_some_layers_in_the_hubs_cache_do_not_do(model: Model, hub_cache: Path) -> None:
    fetch = FakeFetch(model)
    (write_snapshot(hub_cache, model.checkpoint.folder) / SHARDS[1]).unlink()
    with find(finder(fetch), order(model, HUB)):
        assert fetch.begun


@pytest.mark.parametrize("config", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_description_that_is_none_is_refused(model: Model, config: bytes) -> None:
    fetch = FakeFetch(model)
    fetch.described = ModelDescription(config=config, tensors=fetch.described.tensors)
    with (
        pytest.raises(FetchFailed, match="What the coordinator says of the model is broken"),
        find(finder(fetch), order(model)),
    ):
        pass
    assert fetch.closed


def test_time_in_which_several_threads_wait_counts_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, now = FakeFetch(model), 10.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with find(finder(fetch), order(model)) as weights:
        fetch.go_on.clear()
        info = weights.checkpoint.tensors[MATRIX]
        threads = [threading.Thread(target=weights.locate, args=(info,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: weights.waiting._threads == 3)
        now = 12.5
        fetch.go_on.set()
        for thread in threads:
            thread.join()
        assert weights.waited_s == 2.5


# ------------------------------------------------------------------ the hub as the last resort

WHY = FetchFailed("The coordinator lacks it.")


def test_what_nobody_gives_comes_from_the_hub(
    model: Model,
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        finding, "download_file", lambda source, file, on_bytes: model.checkpoint.folder / file
    )
    with find(finder(FakeFetch(model, WHY)), order(model, HUB)) as weights:
        for name in model.names(LAYERS):
            place = weights.locate(weights.checkpoint.tensors[name])
            held = model.checkpoint.tensors[name]
            assert place == Place(model.checkpoint.folder / held.file, held.offset, held.nbytes)
    told = [line for line in caplog.messages if "from the hub" in line]
    assert told == [f"{WHY} Getting {file} from the hub." for file in SHARDS[:2]], "once per file"


def test_both_reasons_are_told_if_the_hub_fails_too(model: Model, hub_cache: Path) -> None:
    with (
        find(finder(FakeFetch(model, WHY)), order(model, HUB)) as weights,
        pytest.raises(CheckpointError) as caught,
    ):
        weights.locate(weights.checkpoint.tensors[MATRIX])
    said = str(caught.value)
    assert said.startswith(f"{WHY} And this machine cannot get them by itself: {NAME}")
    assert f"Not here yet: {SHARDS[0]}." in said
    assert isinstance(caught.value, CheckpointUnavailable)


def test_a_folder_of_the_coordinator_is_not_looked_for_on_the_hub(model: Model) -> None:
    with (
        find(finder(FakeFetch(model, WHY)), order(model)) as weights,
        pytest.raises(FetchFailed) as caught,
    ):
        weights.locate(weights.checkpoint.tensors[MATRIX])
    assert caught.value is WHY


def never(*_: object) -> Path:
    raise AssertionError("nobody wants it")


def test_what_is_not_wanted_any_more_is_not_got_from_the_hub(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "download_file", never)
    with (
        find(finder(FakeFetch(model, WHY)), order(model, HUB), lambda: False) as weights,
        pytest.raises(FetchFailed),
    ):
        weights.locate(weights.checkpoint.tensors[MATRIX])


def test_what_this_disk_has_no_room_for_is_not_got_from_the_hub(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole files need more room than the tensors that were missing."""
    monkeypatch.setattr(finding, "download_file", never)
    full = CheckpointUnavailable("The disk is full.")
    with (
        find(finder(FakeFetch(model, full)), order(model, HUB)) as weights,
        pytest.raises(CheckpointUnavailable) as caught,
    ):
        weights.locate(weights.checkpoint.tensors[MATRIX])
    assert caught.value is full


def test_stopping_ends_the_fetch_and_asks_no_hub(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "download_file", never)
    fetch = FakeFetch(model, WHY)
    found = finder(fetch)
    with find(found, order(model, HUB)) as weights:
        fetch.go_on.clear()
        failed: list[Exception] = []

        def wait() -> None:
            try:
                weights.locate(weights.checkpoint.tensors[MATRIX])
            except FetchFailed as exc:
                failed.append(exc)

        thread = threading.Thread(target=wait)
        thread.start()
        found.stop()
        thread.join()
        assert fetch.closed
        assert failed == [WHY]


def test_the_reference_is_what_safetensors_reads(model: Model) -> None:
    checkpoint = open_checkpoint(model.checkpoint.folder)
    assert {n: len(b) for n, b in model.bytes_of.items()} == {
        n: info.nbytes for n, info in checkpoint.tensors.items()
    }
