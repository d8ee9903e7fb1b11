"""Layers move between workers while sequences are generated, and no token changes."""

import gc
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.messages import MissingPositions, SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import KV_BLOCK, LayerRange, SequenceId
from distributed_llm.worker.kv.assembly import KVIncomplete
from distributed_llm.worker.kv.cache import KVCacheFull
from distributed_llm.worker.kv.held_transfer import HeldExporter, HeldImporter
from distributed_llm.worker.model.failures import MissingPositionsError
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.driver import CPU, Chunk, Pipeline
from tests.reference import check_varied, reference_ids

NUM_LAYERS = 6
KV_POSITIONS = 12 * KV_BLOCK
NUM_STATES = 40
FAMILIES = ("llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3")
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(VOCAB_SIZE, (n,), generator=GENERATOR).tolist() for n in (75, 9, 30, 100)]
PENALTY = Sampling(repetition_penalty=3.0)
ANSWER = 24

Plan = Sequence[tuple[str, tuple[int, int]]]
"""Names of workers and their layers, in the order of the layers."""

START: Plan = (("a", (0, 2)), ("b", (2, 4)), ("c", (4, 6)))
PLANS: dict[str, Plan] = {
    "one grows and its neighbour shrinks": (("a", (0, 3)), ("b", (3, 4)), ("c", (4, 6))),
    "all borders move": (("a", (0, 1)), ("b", (1, 5)), ("c", (5, 6))),
    "a whole stage goes to another worker": (("a", (0, 2)), ("d", (2, 4)), ("c", (4, 6))),
    "first and last change places": (("c", (0, 2)), ("b", (2, 4)), ("a", (4, 6))),
    "all at once on a new worker": (("d", (0, 6)),),
    "a worker leaves": (("a", (0, 3)), ("c", (3, 6))),
    "a worker joins": (("a", (0, 1)), ("b", (1, 3)), ("d", (3, 4)), ("c", (4, 6))),
}


class Move:
    """What happens between two plans: stages beside the old ones, and KV cache on its way."""

    def __init__(self, checkpoint: Checkpoint, old: dict[str, Stage], plan: Plan) -> None:
        self.old = old
        self.new: dict[str, Stage] = {}
        self.transfers: dict[str, list[tuple[Stage, HeldExporter, HeldImporter]]] = {}
        for worker, (start, stop) in plan:
            stage = load(checkpoint, LayerRange(start, stop), old.get(worker))
            self.new[worker] = stage
            self.transfers[worker] = []
            for name, source in old.items():
                left, right = max(start, source.layers.start), min(stop, source.layers.stop)
                if name != worker and left < right:
                    layers = LayerRange(left, right)
                    into = stage.import_kv(layers, 1 << 24)
                    self.transfers[worker].append((source, source.export_kv(layers), into))

    def pump(
        self, max_bytes: int, chunks: int | None = None, rest: Collection[SequenceId] | None = None
    ) -> int:
        """Move up to `chunks` chunks by each transfer, default all there are; return the bytes."""
        moved = 0
        for transfers in self.transfers.values():
            for _, out, into in transfers:
                left = chunks
                while left != 0 and (pieces := out.next_chunk(max_bytes, 100, rest)) is not None:
                    for piece in pieces:
                        into.add(piece)
                        moved += piece.nbytes
                    left = None if left is None else left - 1
        return moved

    def assemble_kv(self, worker: str, set_back: Collection[SequenceId] = ()) -> None:
        transfers = self.transfers[worker]
        for source, _, into in transfers:
            into.update(source.kv_manifest(set_back))
        self.new[worker].assemble_kv(self.old.get(worker), [into for _, _, into in transfers])


def load(checkpoint: Checkpoint, layers: LayerRange, donor: Stage | None = None) -> Stage:
    stage = Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32, donor=donor)
    stage.limit_kv(KV_POSITIONS * stage.kv_bytes_per_token + NUM_STATES * stage.state_bytes)
    return stage


class MovingPipeline(Pipeline):
    """A pipeline of named workers that answers with a repetition penalty."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.workers = {worker: load(checkpoint, LayerRange(*layers)) for worker, layers in START}
        super().__init__(list(self.workers.values()))

    def begin_to_move(self, plan: Plan) -> Move:
        return Move(self.checkpoint, self.workers, plan)

    def end_to_move(self, move: Move, set_back: Collection[SequenceId] = ()) -> None:
        for worker in move.new:
            move.assemble_kv(worker, set_back)
        self.workers = move.new
        self.stages = list(self.workers.values())

    def abandon(self, chunks: Sequence[Chunk], stages: int) -> None:
        """Run a step on the first stages alone; on the next one it fails after a layer."""
        whole, done = self.stages, list(self.done)

        def fail() -> None:
            raise RuntimeError("the machine failed")

        whole[stages].progress = fail
        with pytest.raises(RuntimeError, match="the machine failed"):
            self.run(chunks)
        whole[stages].progress = None
        self.done = done


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(path, request.param, num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), num_layers=NUM_LAYERS)


def start(folder: Path) -> MovingPipeline:
    """Four texts: two that answer, one within its prompt, one that is about to be taken."""
    pipeline = MovingPipeline(open_checkpoint(folder))
    pipeline.prefill(PROMPTS, [74, 8, 13, 100])
    for _ in range(3):
        pipeline.decode(PENALTY, [0, 1])
    return pipeline


def go_on(pipeline: MovingPipeline, move: Move | None) -> None:
    """Steps of every kind, with chunks of KV cache exported between them."""

    def pump() -> None:
        if move is not None:
            move.pump(3000, 3)

    child = pipeline.share(0, 70, [5, 6, 7])
    pipeline.decode(PENALTY, [0, 1, child])
    pump()
    pipeline.run([(2, 13, 20)], None)
    pump()
    chunk = [(n, pipeline.done[n], len(pipeline.texts[n])) for n in (0, 1, child)]
    pipeline.abandon(chunk, 1)
    pump()
    pipeline.decode(PENALTY, [0, 1, child])
    turn = pipeline.share(3, 90, [1, 2, 3], take=True)
    pipeline.decode(PENALTY, [1, turn])
    pump()
    pipeline.run([(1, 4, 10), (0, 60, 76)], None)  # the same again, from before
    pipeline.abandon([(2, 20, 30)], 2)
    pump()
    pipeline.decode(PENALTY, [1, turn])
    pipeline.abandon([(2, 17, 25)], 1)


def finish(folder: Path, pipeline: MovingPipeline) -> None:
    """Let all texts but the one that was taken answer, and compare them."""
    prompts = [*PROMPTS, [*PROMPTS[0][:70], 5, 6, 7], [*PROMPTS[3][:90], 1, 2, 3]]
    pipeline.done[2] = 17  # that far everyone holds what the last steps left
    pipeline.done[0] = pipeline.done[1] = 10
    numbers = [0, 1, 2, 4, 5]
    while any(len(pipeline.texts[n]) < len(prompts[n]) + ANSWER for n in numbers):
        left = [n for n in numbers if len(pipeline.texts[n]) < len(prompts[n]) + ANSWER]
        pipeline.decode(PENALTY, left)
    for number in numbers:
        expected = reference_ids(folder, prompts[number], ANSWER, repetition_penalty=3.0)
        assert pipeline.texts[number] == prompts[number] + expected
        check_varied(expected)


def kv_bytes(pipeline: Pipeline) -> int:
    return sum(stage.kv_bytes for stage in pipeline.stages)


class Memory(NamedTuple):
    """KV cache of a pipeline whose texts have answered."""

    used_bytes: int
    capacities: set[int]


def fill(pipeline: MovingPipeline) -> Memory:
    """Return what is used, then check that more than there is is refused, and all given back."""
    capacities = {stage._cache.capacity for stage in pipeline.stages}
    memory = Memory(kv_bytes(pipeline), capacities)
    for number in (0, 1):
        pipeline.texts[number] += [1] * 300
    wide = [(n, pipeline.done[n], pipeline.done[n] + 300) for n in (0, 1)]
    with pytest.raises(KVCacheFull):
        pipeline.run(wide)
    pipeline.release(*range(6))
    assert kv_bytes(pipeline) == 0
    return memory


@pytest.fixture(scope="module")
def memory_of_still(folder: Path) -> Memory:
    """Do without a move what is done with each."""
    still = start(folder)
    go_on(still, None)
    finish(folder, still)
    return fill(still)


@pytest.mark.parametrize("name", PLANS)
def test_tokens_and_memory_are_as_if_nothing_had_moved(
    folder: Path, memory_of_still: Memory, name: str
) -> None:
    moving = start(folder)
    move = moving.begin_to_move(PLANS[name])
    go_on(moving, move)
    move.pump(3000)
    moving.end_to_move(move)
    del move
    finish(folder, moving)
    memory = fill(moving)
    assert memory == memory_of_still
    assert len(memory.capacities) == 1


def test_one_move_follows_another(folder: Path) -> None:
    pipeline = start(folder)
    for number, plan in enumerate((*PLANS.values(), START)):
        move = pipeline.begin_to_move(plan)
        if number == 2:
            go_on(pipeline, move)
        move.pump(100_000)
        pipeline.end_to_move(move)
        if number > 2:
            pipeline.decode(PENALTY, [4, 5])
    finish(folder, pipeline)


@pytest.mark.parametrize("name", PLANS)
def test_memory_of_the_old_stages_is_given_back(llama: Path, name: str) -> None:
    pipeline = start(llama)
    old = dict(pipeline.workers)
    move = pipeline.begin_to_move(PLANS[name])
    move.pump(100_000)
    pipeline.end_to_move(move)
    weights = [weakref.ref(p) for stage in old.values() for p in stage._forward._model.parameters()]
    buffers = [
        weakref.ref(held.keys)
        for stage in old.values()
        for segment in stage._cache.extents()
        for held in segment.layers
        if held
    ]
    stages = [weakref.ref(stage) for stage in old.values()]
    used = {p.data_ptr() for stage in pipeline.stages for p in stage._forward._model.parameters()}
    caches = {
        held.keys.data_ptr()
        for stage in pipeline.stages
        for segment in stage._cache.extents()
        for held in segment.layers
        if held
    }
    del old, move
    pipeline.decode(PENALTY, [0, 1])
    gc.collect()
    assert all(ref() is None for ref in stages)
    assert {weight.data_ptr() for ref in weights if (weight := ref()) is not None} <= used
    assert {buffer.data_ptr() for kept in buffers if (buffer := kept()) is not None} <= caches


def test_most_travels_before_the_end(llama: Path) -> None:
    pipeline = start(llama)
    move = pipeline.begin_to_move(PLANS["a whole stage goes to another worker"])
    ahead = move.pump(10_000)
    pipeline.decode(PENALTY, [0, 1])
    token_bytes = move.new["d"].kv_bytes_per_token
    assert move.pump(10_000) == 2 * token_bytes
    assert ahead == (74 + 3 + 8 + 3 + 13 + 100 - 0) * token_bytes


def test_until_one_of_them_runs_either_may_go_on(llama: Path) -> None:
    pipeline = start(llama)
    old = dict(pipeline.workers)
    move = pipeline.begin_to_move(PLANS["all borders move"])
    with pytest.raises(KVIncomplete):
        move.assemble_kv("b")
    assert move.new["b"].kv_bytes == 0
    move.pump(100_000)
    for worker in move.new:
        move.assemble_kv(worker)
    assert pipeline.workers == old
    go_on(pipeline, None)
    finish(llama, pipeline)


def test_the_new_last_stage_is_to_be_told_how_to_sample(llama: Path) -> None:
    pipeline = start(llama)
    move = pipeline.begin_to_move(PLANS["one grows and its neighbour shrinks"])
    move.pump(100_000)
    pipeline.end_to_move(move)
    last = pipeline.stages[-1]
    part = SequenceSlice(
        sequence_id=SequenceId(0), start=pipeline.done[0], num_tokens=1, sample=True, sampling=None
    )
    with pytest.raises(MissingPositionsError) as caught:
        last.run([part], torch.tensor([1], dtype=torch.int32), torch.zeros(1, 32))
    assert caught.value.missing == (MissingPositions(sequence_id=SequenceId(0), have=0),)


def test_what_only_one_stage_took_is_begun_again(llama: Path) -> None:
    """A turn took over the one before it on the first stage, then its step was abandoned."""
    pipeline = start(llama)
    turn = pipeline.share(3, 90, [1, 2, 3], take=True)
    pipeline.abandon([(turn, 90, 93)], 1)
    move = pipeline.begin_to_move((("a", (0, 3)), ("b", (3, 4)), ("c", (4, 6))))
    move.pump(100_000)
    pipeline.end_to_move(move)
    assert [stage.num_computed_tokens(SequenceId(turn)) for stage in pipeline.stages] == [90, 90, 0]
    with pytest.raises(MissingPositionsError):
        pipeline.run([(turn, 91, 93)])
    del pipeline.prefixes[turn]
    pipeline.release(3)
    pipeline.run([(turn, 0, 93)])
    expected = reference_ids(llama, pipeline.texts[turn], 1, repetition_penalty=3.0)
    assert pipeline.run([(turn, 92, 93)], PENALTY) == expected
