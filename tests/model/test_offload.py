"""Layers that stay on the disk compute the same tokens, and take no memory of their own."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import NotEnoughMemory
from distributed_llm.common.offloading import Away, away, layers_away, most_in_ram
from distributed_llm.common.types import LayerRange
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.worker.model.away_layers import away_nbytes
from distributed_llm.worker.model.offload import LayerFile, file_of
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import Load, Loaded
from tests.checkpoints import make_checkpoint
from tests.model.driver import CPU, Pipeline
from tests.model.workers import Cluster, workers

PROMPTS = [[5, 17, 3, 99, 12], [7, 7, 1]]
TOKENS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep files of layers in a folder of the test."""
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    return tmp_path / "offload"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a model with matrices that are large enough for kernels of their own."""
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", **SIZES))


def load(
    checkpoint: Checkpoint,
    from_disk: int = 0,
    *,
    quantize: Quantize = "none",
    start: int = 0,
    donor: Stage | None = None,
) -> Stage:
    """Return a stage from layer `start` on."""
    return Stage.load(
        checkpoint,
        LayerRange(start, checkpoint.num_layers),
        device=CPU,
        dtype=torch.float32,
        quantize=quantize,
        from_disk=from_disk,
        donor=donor,
    )


def texts(*stages: Stage) -> list[list[int]]:
    """Return the prompts with what greedy sampling adds."""
    pipeline = Pipeline(list(stages))
    pipeline.prefill(PROMPTS, [3, 0])
    for _ in range(TOKENS):
        pipeline.decode()
    return pipeline.texts


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_tokens_are_the_same(checkpoint: Checkpoint, quantize: Quantize, folder: Path) -> None:
    whole = load(checkpoint, quantize=quantize)
    parts = load(checkpoint, 5, quantize=quantize)
    assert texts(parts) == texts(whole)
    saved = whole.weight_bytes - parts.weight_bytes
    sizes = [file.nbytes for file in map(file_of, parts._held.layers) if file]
    layer_bytes = (whole.weight_bytes - load_ends(checkpoint)) // checkpoint.num_layers
    assert saved == pytest.approx(3 * sizes[0], rel=0.05)  # two of five are in memory at a time
    assert sizes[0] == pytest.approx(layer_bytes, rel=0.1)
    assert not list(folder.iterdir())  # no name, so nothing stays behind


def load_ends(checkpoint: Checkpoint) -> int:
    """Return the bytes of embedding, norm and head in float32."""
    return 4 * (2 * checkpoint.vocab_size + 1) * checkpoint.hidden_size


def test_experts_lie_on_the_disk(tmp_path: Path) -> None:
    model = open_checkpoint(make_checkpoint(tmp_path / "model", "qwen3_moe", **EXPERTS))
    whole, parts = load(model), load(model, 3)
    assert texts(parts) == texts(whole)
    stacks = 4 * 3 * 24 * 64 * 4  # experts, matrices, float32
    assert all(file and file.nbytes >= stacks for file in map(file_of, parts._held.layers[:2]))


def test_the_next_layer_is_read_while_one_computes(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load(checkpoint, 3)
    files = [file_of(layer) for layer in stage._held.layers]
    calls: list[tuple[str, int]] = []
    for name in ("read_ahead", "give_back"):
        monkeypatch.setattr(
            LayerFile, name, lambda file, name=name: calls.append((name, files.index(file)))
        )
    pipeline = Pipeline([stage])
    pipeline.prefill(PROMPTS[:1], [0])
    pipeline.decode()
    assert calls == [
        *(("read_ahead", 3), ("give_back", 1)),
        *(("read_ahead", 5), ("give_back", 3)),
        *(("read_ahead", 1), ("give_back", 5)),  # for the next step
    ]


def test_a_stage_shares_layers_on_the_disk(checkpoint: Checkpoint) -> None:
    donor = load(checkpoint, 3)
    expected = texts(donor)
    donor.reset()
    new = load(checkpoint, 3, donor=donor)
    assert [file_of(a) for a in new._held.layers] == [file_of(b) for b in donor._held.layers]
    assert new.shared_weight_bytes <= new.weight_bytes
    assert texts(new) == expected
    new.reset()
    del donor
    assert texts(new) == expected


def test_a_full_disk_is_told(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(NotEnoughMemory, match=r"cannot be written to .*offload: No space left"):
        load(checkpoint, 1)


def on_disk(layers: LayerRange, count: int) -> tuple[int, ...]:
    return away(layers, 0, count).on_disk


def test_layers_on_the_disk_lie_apart() -> None:
    assert on_disk(LayerRange(4, 10), 0) == ()
    assert on_disk(LayerRange(4, 10), 1) == (7,)
    assert on_disk(LayerRange(4, 10), 3) == (5, 7, 9)
    for count in range(7):
        chosen = on_disk(LayerRange(4, 10), count)
        assert len(set(chosen)) == count
        assert all(4 <= layer < 10 for layer in chosen)
    with pytest.raises(ValueError, match="7 of 6"):
        on_disk(LayerRange(4, 10), 7)


def test_layers_in_memory_and_on_the_disk_take_turns() -> None:
    layers = LayerRange(4, 10)
    assert away(layers, 0, 0) == Away()
    assert away(layers, 3, 0) == Away(in_ram=(5, 7, 9))
    assert away(layers, 2, 1) == Away(in_ram=(5, 9), on_disk=(7,))
    assert away(layers, 4, 2) == Away(in_ram=(4, 6, 7, 9), on_disk=(5, 8))
    for count in range(7):
        for from_disk in range(count + 1):
            found = away(layers, count - from_disk, from_disk)
            assert sorted((*found.in_ram, *found.on_disk)) == [*layers_away(layers, count)]
    with pytest.raises(ValueError, match="7 of 6"):
        away(layers, 3, 4)


def test_as_many_layers_stay_in_memory_as_there_is_room_for() -> None:
    assert most_in_ram([], 100) == 0
    assert most_in_ram([10] * 5, 49) == 4
    assert most_in_ram([10] * 5, 50) == 5
    assert most_in_ram([10] * 5, 9) == 0
    assert most_in_ram([50, 10, 10], 30) == 1  # the first goes to the disk with another
    assert most_in_ram([10, 50, 10], 30) == 2


def test_bytes_that_are_read_are_known(checkpoint: Checkpoint) -> None:
    layers = load(checkpoint, 6)._held.layers
    assert away_nbytes(layers) == sum(file.nbytes for file in map(file_of, layers) if file) > 0


def test_workers_do_as_they_are_told(checkpoint: Checkpoint) -> None:
    whole = (0, checkpoint.num_layers)
    with workers("a") as held:
        cluster = Cluster(checkpoint.folder, [("a", whole)], held)
        told = [
            held["a"].ask(Load(0, cluster.order(epoch, whole, from_disk=count)), Loaded)
            for epoch, count in ((2, 6), (3, 0))
        ]
    file = file_of(load(checkpoint, 1)._held.layers[3])
    assert file is not None
    assert told[1].weight_bytes - told[0].weight_bytes == 4 * file.nbytes
