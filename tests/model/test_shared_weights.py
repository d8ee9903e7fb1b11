"""A stage loaded beside another one of the same model shares what that holds, no more."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.kernels import chosen, orders
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.tensor_files import TensorReader
from tests.checkpoints import REPRESENTATIVES, make_checkpoint
from tests.model.driver import CPU, Pipeline, load_stages
from tests.model.raw_outputs import answer, other_default_dtype, same
from tests.reference import check_varied, reference_ids

NUM_LAYERS = 4
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79], [2, 7, 18])

MOVES = {
    "grows to the left": ((2, 3), (1, 3)),
    "grows to the right": ((1, 2), (1, 3)),
    "grows on both sides": ((2, 3), (1, 4)),
    "shrinks": ((1, 3), (2, 3)),
    "moves on": ((0, 2), (1, 3)),
    "is the same": ((1, 3), (1, 3)),
    "is elsewhere": ((1, 2), (2, 3)),
    "the first becomes the last": ((0, 2), (2, 4)),
    "the last becomes the first": ((2, 4), (0, 2)),
    "the first ends the model too": ((0, 2), (0, 4)),
    "the last begins the model too": ((2, 4), (0, 4)),
    "the only one becomes the first": ((0, 4), (0, 2)),
    "the only one becomes the last": ((0, 4), (1, 4)),
    "the only one loses both ends": ((0, 4), (1, 3)),
    "the first shrinks": ((0, 3), (0, 1)),
    "the last grows": ((3, 4), (2, 4)),
    "the last shrinks": ((1, 4), (3, 4)),
    "a middle one becomes the only one": ((1, 3), (0, 4)),
}
PACKED_MOVES = (
    *("grows on both sides", "shrinks", "is the same", "the first becomes the last"),
    *("the last begins the model too", "the only one loses both ends"),
)
"""One of each kind; what is shared of packed weights is what is shared of others."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie": False}),
    "llama tied": ("llama", {"tie": True}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
}
WITH_STATES = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "zaya")


def load(
    checkpoint: Checkpoint,
    layers: tuple[int, int],
    donor: Stage | None = None,
    dtype: torch.dtype = torch.float32,
) -> Stage:
    return Stage.load(checkpoint, LayerRange(*layers), device=CPU, dtype=dtype, donor=donor)


def places(stage: Stage) -> dict[int, int]:
    """Return where parameters lie in memory, and how large they are."""
    return {p.data_ptr(): p.nbytes for p in stage._forward._model.parameters()}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, settings = KINDS[request.param]
    folder = tmp_path_factory.mktemp(family)
    return open_checkpoint(make_checkpoint(folder, family, num_layers=NUM_LAYERS, **settings))


class Alone(NamedTuple):
    """A stage that was loaded without a donor."""

    weight_bytes: int
    answers: list[Tensor]


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint) -> Callable[[tuple[int, int]], Alone]:
    """Return what tells of layers that are loaded alone; each are loaded once, packed and not."""

    @cache
    def loaded(layers: tuple[int, int], smallest_packed: object) -> Alone:
        stage = load(checkpoint, layers)
        return Alone(stage.weight_bytes, answer(stage))

    return lambda layers: loaded(layers, vars(chosen)["SMALLEST"])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that tensors that are read are added to."""
    names: list[str] = []
    original = TensorReader.read

    def reading(self: TensorReader, info: TensorInfo) -> Tensor:
        names.append(info.name)
        return original(self, info)

    monkeypatch.setattr(TensorReader, "read", reading)
    return names


@pytest.mark.parametrize("move", MOVES)
def test_it_is_as_if_loaded_alone_but_reads_only_what_the_donor_lacks(
    checkpoint: Checkpoint,
    alone: Callable[[tuple[int, int]], Alone],
    move: str,
    read: list[str],
) -> None:
    before, after = MOVES[move]
    donor = load(checkpoint, before)
    expected = answer(donor)
    held = set(read)
    read.clear()
    stage = load(checkpoint, after, donor)
    wanted = {tensor.name for tensor in checkpoint.tensors_of(LayerRange(*after))}
    assert sorted(read) == sorted(wanted - held)

    own, theirs = places(stage), places(donor)
    shared = sum(nbytes for place, nbytes in own.items() if place in theirs)
    assert shared == sum(checkpoint.tensors[name].nbytes for name in wanted & held)
    assert shared <= stage.shared_weight_bytes
    added = stage.weight_bytes - stage.shared_weight_bytes
    buffers = sum(buffer.nbytes for buffer in stage._forward._model.buffers())
    missing = sum(checkpoint.tensors[name].nbytes for name in wanted - held)
    assert missing <= added <= missing + buffers

    weight_bytes, answers = alone(after)
    assert stage.weight_bytes == weight_bytes
    assert stage.layers_s > 0
    assert same(answer(donor), expected)
    assert same(answer(stage), answers)
    del donor
    gc.collect()
    assert same(answer(stage), answers)


@pytest.mark.parametrize("first_gone", ["donor", "stage"])
def test_whoever_is_dropped_leaves_to_the_other_what_it_uses(
    checkpoint: Checkpoint, first_gone: str
) -> None:
    stages = {"donor": load(checkpoint, (0, 3))}
    stages["stage"] = load(checkpoint, (2, 4), stages["donor"])
    pair = {
        name: {p.data_ptr(): weakref.ref(p) for p in stage._forward._model.parameters()}
        for name, stage in stages.items()
    }
    kept = ({"donor", "stage"} - {first_gone}).pop()
    expected = answer(stages[kept])
    del stages[first_gone]
    gc.collect()
    for place, parameter in pair[first_gone].items():
        if parameter() is not None:
            assert place in pair[kept]
    assert all(parameter() is not None for parameter in pair[kept].values())
    assert sum(parameter() is None for parameter in pair[first_gone].values()) > 4
    assert same(answer(stages[kept]), expected)


def test_progress_is_that_of_the_stage_that_runs(checkpoint: Checkpoint) -> None:
    donor = load(checkpoint, (0, 3))
    stage = load(checkpoint, (1, 4), donor)
    calls: list[str] = []
    donor.progress = lambda: calls.append("donor")
    stage.progress = lambda: calls.append("stage")
    answer(stage)
    answer(donor)
    assert calls == ["stage"] * 6 + ["donor"] * 6


def test_loading_in_another_thread_does_not_disturb_a_donor_that_runs(
    checkpoint: Checkpoint,
) -> None:
    donor = load(checkpoint, (0, 3))
    expected = answer(donor)
    alone = answer(load(checkpoint, (1, 4)))
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: [load(checkpoint, (1, 4), donor) for _ in range(3)])
        while not loading.done():
            assert same(answer(donor), expected)
        for stage in loading.result():
            assert same(answer(stage), alone)


def test_a_donor_of_another_dtype_is_refused(checkpoint: Checkpoint) -> None:
    donor = load(checkpoint, (0, 3))
    with pytest.raises(ValueError, match=r"the donor is torch\.float32 on cpu"):
        load(checkpoint, (1, 4), donor, torch.bfloat16)


@pytest.mark.skipif(not orders._packing_helps("float32"), reason="nothing is packed here")
@pytest.mark.parametrize("move", PACKED_MOVES)
def test_packed_weights_are_shared_too(
    checkpoint: Checkpoint,
    alone: Callable[[tuple[int, int]], Alone],
    move: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chosen, "SMALLEST", 1)
    before, after = MOVES[move]
    donor = load(checkpoint, before)
    expected = answer(donor)
    stage = load(checkpoint, after, donor)
    weight_bytes, answers = alone(after)
    assert stage.weight_bytes == weight_bytes
    assert same(answer(stage), answers)
    assert same(answer(donor), expected)
    if before == after:
        buffers = sum(buffer.nbytes for buffer in stage._forward._model.buffers())
        assert stage.weight_bytes - stage.shared_weight_bytes <= buffers


def test_a_bias_that_is_tied_too_is_not_taken_for_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last stage, which has the matrix packed."""
    monkeypatch.setattr(chosen, "SMALLEST", 1)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "bert", num_layers=2))
    stage = load(checkpoint, (0, 1), load(checkpoint, (1, 2)))
    assert same(answer(stage), answer(load(checkpoint, (0, 1))))


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_every_kind_answers_as_transformers_after_a_move(tmp_path: Path, family: str) -> None:
    """The stages of one split, and others made of them, run in turns."""
    folder = make_checkpoint(tmp_path, family, num_layers=NUM_LAYERS)
    checkpoint = open_checkpoint(folder)
    old = load_stages(checkpoint, [2, 1, 1])
    new = [
        load(checkpoint, (0, 1), old[0]),
        load(checkpoint, (1, 3), old[1]),
        load(checkpoint, (3, 4), old[2]),
    ]
    other = [load(checkpoint, (0, 2), old[2]), load(checkpoint, (2, 4), old[0])]
    expected = [reference_ids(folder, list(prompt), 6) for prompt in PROMPTS]
    pipelines = [Pipeline(stages) for stages in (old, new, other)]
    for pipeline in pipelines:
        pipeline.prefill(PROMPTS, [len(prompt) - 1 for prompt in PROMPTS])
    for step in range(6):
        for pipeline in pipelines:
            assert pipeline.decode() == [tokens[step] for tokens in expected]


@pytest.mark.parametrize("family", [*REPRESENTATIVES, *WITH_STATES])
def test_the_default_dtype_does_not_matter_to_a_stage_that_runs(
    tmp_path: Path, family: str
) -> None:
    """Nor does it to one in float32, as `test_families` says of every family."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=2))
    stage = load(checkpoint, (0, 2), dtype=torch.bfloat16)
    expected = answer(stage)
    with other_default_dtype():
        again = answer(stage)
    assert same(again, expected)


def test_the_references_say_something(tmp_path: Path) -> None:
    check_varied(reference_ids(make_checkpoint(tmp_path, num_layers=NUM_LAYERS), [3, 1, 4], 12))
