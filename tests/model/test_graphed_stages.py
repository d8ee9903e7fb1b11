"""Stages whose decode steps are graphs generate what transformers does."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.worker.model import stage as stages
from distributed_llm.worker.model.kernels import varlen
from distributed_llm.worker.model.packed_step import running_step
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.made_up_graphs import MadeUpCapture
from tests.made_up_varlen import made_up
from tests.model.driver import CPU, Pipeline, load_stages
from tests.model.test_waits import Waits
from tests.reference import likeliest


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[MadeUpCapture]]:
    """Let the CPU count as a GPU with pages and graphs; return what makes those of each stage."""
    made: list[MadeUpCapture] = []

    def capture_of(device: torch.device) -> MadeUpCapture:
        made.append(MadeUpCapture())
        return made[-1]

    monkeypatch.setattr(stages, "capture_of", capture_of)
    monkeypatch.setattr(stages, "graphs_bytes", lambda device: 256 << 20)
    with made_up(monkeypatch):
        yield made


class Texts:
    """Given texts, of which each step computes a token; what is likeliest next is held against
    transformers.

    Args:
        folder: of the checkpoint.
        pipeline: that computes.
        count: of texts; more may be added.
    """

    def __init__(self, folder: Path, pipeline: Pipeline, count: int) -> None:
        self._folder = folder
        self.pipeline = pipeline
        self._found: dict[int, dict[int, int]] = {}
        tokens = torch.randint(VOCAB_SIZE, (count, 64), generator=torch.Generator().manual_seed(1))
        pipeline.texts = tokens.tolist()
        pipeline.done = [0] * count

    def step(self, *chunks: tuple[int, int]) -> None:
        """Compute so many tokens of each of these texts: its number, and how many."""
        done = self.pipeline.done
        parts = [(number, done[number], done[number] + count) for number, count in chunks]
        for (number, _, stop), token in zip(parts, self.pipeline.run(parts), strict=True):
            self._found.setdefault(number, {})[stop - 1] = token

    def decode(self, numbers: Sequence[int], steps: int) -> None:
        for _ in range(steps):
            self.step(*((number, 1) for number in numbers))

    def check(self) -> None:
        """Fail unless every token was what transformers finds likeliest."""
        seen = set()
        for number, found in self._found.items():
            places = sorted(found)
            text = self.pipeline.texts[number][: places[-1] + 1]
            right = likeliest(self._folder, text)
            assert [found[place] for place in places] == [right[place] for place in places]
            seen |= set(found.values())
        assert len(seen) > 5, "a model that says always the same shows nothing"


def used(captures: Sequence[MadeUpCapture]) -> list[int]:
    """Return how many steps of each stage were launched, without those that were tried."""
    return [capture.replayed - capture.recorded for capture in captures]


@pytest.mark.parametrize(
    ("family", "stages_of"),
    [
        pytest.param("gpt2", [1], id="positions that are embedded"),
        pytest.param("gpt_oss", [1, 1], id="windows, sinks and experts"),
    ],
)
def test_batches_that_grow_and_shrink_compute_the_same(
    family: str, stages_of: list[int], captures: list[MadeUpCapture], tmp_path: Path
) -> None:
    """Graphs are forgotten once, when there are more pages than before."""
    folder = make_checkpoint(tmp_path, family, num_layers=sum(stages_of))
    texts = Texts(folder, Pipeline(load_stages(open_checkpoint(folder), stages_of)), 5)
    texts.step((0, 8), (1, 3), (2, 5))
    texts.decode([0, 1, 2], 3)
    texts.step((0, 1), (3, 2), (1, 1), (4, 20), (2, 1))
    texts.decode([0, 1, 2, 3, 4], 3)
    texts.decode([3, 1], 3)
    texts.check()
    assert [capture.recorded for capture in captures] == [3] * len(stages_of)
    assert used(captures) == [3] * len(stages_of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gemma"), "gemma3_text", num_layers=2)


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


def test_prefixes_that_are_shared_and_texts_that_are_set_back(
    folder: Path, checkpoint: Checkpoint, captures: list[MadeUpCapture]
) -> None:
    texts = Texts(folder, Pipeline(load_stages(checkpoint, [2])), 2)
    pipeline = texts.pipeline
    texts.step((0, 30), (1, 9))
    for _ in range(2):
        number = pipeline.share(0, 20, pipeline.texts[1][len(pipeline.texts) :])
        texts.step((number, 3))
    texts.decode([0, 2, 3, 1], 4)
    pipeline.done[0] = pipeline.done[2] = 25
    texts.decode([0, 2, 3], 3)
    pipeline.release(3)
    texts.decode([0, 2, 1], 2)
    texts.check()
    assert used(captures)[0] >= 4


def test_layers_that_move_to_another_stage_get_graphs_there(
    folder: Path, checkpoint: Checkpoint, captures: list[MadeUpCapture]
) -> None:
    texts = Texts(folder, Pipeline(load_stages(checkpoint, [1, 1])), 2)
    texts.step((0, 5), (1, 7))
    texts.decode([0, 1], 4)
    donor = texts.pipeline.stages[1]
    texts.pipeline.stages = [
        texts.pipeline.stages[0],
        Stage.load(checkpoint, donor.layers, device=CPU, dtype=torch.float32, donor=donor),
    ]
    texts.pipeline.stages[1].assemble_kv(donor)
    texts.decode([0, 1], 4)
    texts.check()
    assert used(captures) == [6, 2, 2]


def test_a_stage_with_graphs_is_freed_at_once(
    checkpoint: Checkpoint, captures: list[MadeUpCapture]
) -> None:
    pipeline = Pipeline(load_stages(checkpoint, [2]))
    pipeline.prefill([[3, 1, 4, 1, 5]], [4])
    for _ in range(3):
        pipeline.decode()
    assert used(captures) == [1]
    weight = weakref.ref(next(pipeline.stages[0]._held.layers.parameters()))
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert weight() is None
    finally:
        gc.enable()


def test_a_step_that_runs_out_of_memory_while_it_is_recorded_is_computed(
    folder: Path,
    checkpoint: Checkpoint,
    captures: list[MadeUpCapture],
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = Texts(folder, Pipeline(load_stages(checkpoint, [2])), 1)
    captures[0].failure = torch.OutOfMemoryError("CUDA out of memory.")
    texts.step((0, 5))
    texts.decode([0], 6)
    texts.check()
    assert used(captures) == [0]
    (line,) = [text for text in caplog.messages if "graphs" in text]
    assert "0 are: CUDA out of memory." in line


def test_layers_are_timed_and_progress_is_told_of_launches(
    folder: Path, checkpoint: Checkpoint, captures: list[MadeUpCapture]
) -> None:
    texts = Texts(folder, Pipeline(load_stages(checkpoint, [2])), 1)
    (stage,) = texts.pipeline.stages
    told: list[float] = []
    stage.progress = lambda: told.append(stage.layers_s)
    texts.step((0, 5))
    for steps, expected in ((1, 2), (1, 2), (3, 3)):
        told.clear()
        texts.decode([0], steps)
        assert len(told) == expected, "of each layer; of none that is recorded; of each launch"
        assert stage.layers_s > 0
    assert used(captures) == [3]


@pytest.mark.parametrize(
    ("family", "quantize", "why"),
    [
        pytest.param("mixtral", "int8", "tolist", id="experts that the CPU sorts"),
        pytest.param("llama4_text", "none", "aten.nonzero.default", id="rows that are counted"),
    ],
)
def test_what_looks_at_numbers_or_sequences_goes_on_as_ever(
    family: str,
    quantize: Quantize,
    why: str,
    captures: list[MadeUpCapture],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """The log says once why."""
    made = make_checkpoint(tmp_path, family, num_layers=2)
    stage = Stage.load(
        open_checkpoint(made),
        LayerRange(0, 2),
        device=CPU,
        dtype=torch.float32,
        quantize=quantize,
    )
    texts = Texts(made, Pipeline([stage]), 2)
    texts.step((0, 5), (1, 3))
    texts.decode([0, 1], 3)
    texts.decode([0], 2)
    if quantize == "none":
        texts.check()
    assert used(captures) == [0]
    (line,) = [text for text in caplog.messages if "graphs" in text]
    assert why in line


def test_a_layer_that_looks_at_its_sequences_goes_on_as_ever(
    checkpoint: Checkpoint, captures: list[MadeUpCapture], caplog: pytest.LogCaptureFixture
) -> None:
    """What it saw while it was recorded is not what it sees in a step."""
    (stage,) = stages_of_one = load_stages(checkpoint, [2])

    def look(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + sum(part.start for part in running_step().slices))

    stage._held.layers[0].register_forward_hook(look)
    pipeline = Pipeline(stages_of_one)
    pipeline.prefill([[3, 1, 4, 1, 5]], [4])
    for _ in range(4):
        pipeline.decode()
    assert used(captures) == [0]
    assert "rows that make up a number" in caplog.text


class Recordable(Exception):
    """All that would be recorded has been watched."""


class Watched(MadeUpCapture):
    """Watches on a device without numbers, of which nothing can be recorded."""

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        raise Recordable


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_nothing_in_a_decode_step_waits_or_is_sent(
    family: str,
    captures: list[MadeUpCapture],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Seen where a tensor of the CPU is none of the device."""
    monkeypatch.setattr(stages, "capture_of", lambda device: Watched())
    monkeypatch.setattr(varlen, "is_right", lambda *of: True)  # reads numbers
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=2))
    layers = LayerRange(0, 1)
    stage = Stage.load(checkpoint, layers, device=torch.device("meta"), dtype=torch.float32)
    with Waits():
        for start in range(3):
            part = SequenceSlice(sequence_id=SequenceId(0), start=start, num_tokens=1)
            stage.run([part], torch.ones(1, dtype=torch.int32), None)
    (line,) = [text for text in caplog.messages if "graphs" in text]
    assert line.endswith(Recordable.__name__)
