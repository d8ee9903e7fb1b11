"""The compute thread: orders in turn, what is void, what is answered, memory for the KV cache."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from distributed_llm.common.errors import InvalidRequest, NotEnoughMemory, StageError
from distributed_llm.common.messages import (
    Capabilities,
    LoadStage,
    MissingPositions,
    ModelSource,
    SeenFrom,
    SequenceSlice,
    Task,
)
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import KV_BLOCK, Epoch, LayerRange, SequenceId, StepNumber
from distributed_llm.worker.compute import engine as engine_module
from distributed_llm.worker.compute import held_stages, loading, orders
from distributed_llm.worker.compute.engine import Engine
from distributed_llm.worker.compute.loading import NewStage
from distributed_llm.worker.model.failures import (
    MissingPositionsError,
    ReleasedSequence,
    SequencesFailed,
)
from distributed_llm.worker.model.step_results import StageOutput
from distributed_llm.worker.model.task_inputs import TaskInputs
from distributed_llm.worker.session.events import (
    Computed,
    ComputeFailed,
    ComputeThreadFailed,
    Drop,
    Event,
    Load,
    Loaded,
    LoadFailed,
    Probe,
    Probed,
    Release,
    Run,
    Serve,
    VoidableOrder,
)
from distributed_llm.worker.tensor_frames import frame_of, tensor_of
from tests.weights import weights_here

MIB = 1 << 20
GIB = 1 << 30
PER_TOKEN = 1000
WEIGHTS = 7 * MIB
TOKENS = TensorSpec("int32", (2,))
TOKEN_IDS = bytes([1, 0, 0, 0, 2, 0, 0, 0])

ORDER = LoadStage(
    epoch=Epoch(3),
    source=ModelSource(kind="builtin", name=""),
    layers=LayerRange(0, 2),
    dtype="float32",
    wire_dtype="bfloat16",
    digest="d",
    kv_tokens=1000,
    link_key="k",
)


class FakeStage:
    """Answers what it is told to, and notes what it is asked."""

    weight_bytes = WEIGHTS
    shared_weight_bytes = 0
    kv_bytes = 5
    kv_bytes_per_token = PER_TOKEN
    kv_windowed_bytes_per_token = PER_TOKEN // 2
    window = 9
    layers_s = 0.0
    inputs = TaskInputs(LayerRange(0, 2), hidden_size=3, vocab_size=9)

    def __init__(self, progress: Callable[[], None]) -> None:
        self.progress = progress
        self.story: list[Any] = []
        self.answer: Callable[[], StageOutput] = StageOutput

    def memory(self) -> list[Tensor]:
        return []

    def limit_kv(self, max_bytes: int) -> None:
        self.story.append(("limit", max_bytes))

    def reset(self) -> None:
        self.story.append("reset")

    def give_kv_back(self) -> None:
        self.story.append("give back")

    def release(self, ids: Sequence[int]) -> None:
        if ids:
            self.story.append(("release", *ids))

    def forget(self, seen_from: Mapping[SequenceId, int]) -> None:
        if seen_from:
            self.story.append(("forget", dict(seen_from)))

    def run(
        self,
        sequences: Sequence[SequenceSlice],
        token_ids: Tensor,
        hidden: Tensor | None,
        masks: object = None,
    ) -> StageOutput:
        self.story.append((token_ids.tolist(), None if hidden is None else hidden.dtype))
        return self.answer()


class FakeEngine(Engine):
    """An engine that loads fake stages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stages: list[FakeStage] = []
        held: Any = self._stages
        held._load_stage = self._fake
        held._load_beside = lambda load, served: self._fake(load)

    def _fake(self, load: Load) -> Any:
        stage: Any = FakeStage(self._made_progress)
        self.stages.append(stage)
        return NewStage(stage, 1)


class Posted:
    """What the engine posted, and waiting for it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.post = self._queue.put

    def next(self) -> Event:
        return self._queue.get(timeout=20)

    def loaded(self) -> Loaded:
        event = self.next()
        assert isinstance(event, Loaded)
        return event

    def computed(self) -> Computed:
        event = self.next()
        assert isinstance(event, Computed)
        return event

    @property
    def nothing(self) -> bool:
        return self._queue.empty()


def capabilities(memory_bytes: int = GIB) -> Capabilities:
    return Capabilities(
        device="cpu",
        device_name="A CPU",
        platform="Linux",
        memory_bytes=memory_bytes,
        cores=2,
        threads=1,
        memory_bandwidth_bytes_per_s=1e10,
        flops_per_s=1e11,
    )


@contextmanager
def running(
    memory_bytes: int = GIB,
    *,
    slowdown: float = 1.0,
    void: Callable[[VoidableOrder], bool] = lambda order: False,
) -> Iterator[tuple[FakeEngine, Posted]]:
    posted = Posted()
    engine = FakeEngine(
        capabilities(memory_bytes),
        slowdown=slowdown,
        weights=weights_here(),
        is_void=void,
        post=posted.post,
    )
    try:
        yield engine, posted
    finally:
        assert engine.stop(20)


@pytest.fixture(autouse=True)
def _much_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda device: 100 * GIB)


def order(**fields: Any) -> LoadStage:
    return msgspec.structs.replace(ORDER, **fields)


def run(step: int = 0, *tensors: Tensor) -> Run:
    given = [frame_of(tensor) for tensor in tensors]
    part = SequenceSlice(sequence_id=SequenceId(1), start=0, num_tokens=2)
    specs = (TOKENS, *(spec for spec, _ in given))
    task = Task(
        epoch=Epoch(3),
        step=StepNumber(step),
        oldest=StepNumber(0),
        sequences=(part,),
        tensors=specs,
    )
    return Run(0, task, (TOKEN_IDS, *(frame for _, frame in given)))


# ------------------------------------------------------------------ what is answered


@pytest.mark.parametrize(
    ("wire", "dtype"),
    [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_hidden_states_travel_in_the_wire_dtype(wire: str, dtype: torch.dtype) -> None:
    hidden = torch.tensor([[1.0, 2.5], [3.0, -4.0]])
    with running() as (engine, posted):
        engine.put(Load(0, order(wire_dtype=wire)))
        posted.loaded()
        engine.stages[0].answer = lambda: StageOutput(hidden_states=hidden)
        given = run(0, torch.ones(2, 3, dtype=torch.float16))
        engine.put(given)
        done = posted.computed()
        assert done.run is given
        assert done.specs == (TensorSpec(wire, (2, 2)),)  # type: ignore[arg-type]
        back = tensor_of(done.specs[0], done.frames[0])
        assert back.dtype == dtype
        assert back.tolist() == hidden.tolist()
        assert engine.stages[0].story[1:] == [([1, 2], torch.float16)]


def test_last_stage_answers_token_ids_and_what_was_asked_besides() -> None:
    ids = torch.tensor([7, 8], dtype=torch.int32)
    logprobs = torch.tensor([[-0.5, -1.0], [-0.25, -2.0]])
    logprob_ids = torch.tensor([[7, 9], [8, 1]], dtype=torch.int32)
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        engine.stages[0].answer = lambda: StageOutput(token_ids=ids)
        engine.put(run())
        done = posted.computed()
        assert done.specs == (TensorSpec("int32", (2,)),)
        assert bytes(done.frames[0]) == bytes([7, 0, 0, 0, 8, 0, 0, 0])
        engine.stages[0].answer = lambda: StageOutput(
            token_ids=ids, logprobs=logprobs, logprob_ids=logprob_ids
        )
        engine.put(run())
        done = posted.computed()
        assert [str(spec) for spec in done.specs] == ["int32[2]", "float32[2, 2]", "int32[2, 2]"]
        got = [tensor_of(s, f).tolist() for s, f in zip(done.specs, done.frames, strict=True)]
        assert got == [ids.tolist(), logprobs.tolist(), logprob_ids.tolist()]
        engine.stages[0].answer = lambda: StageOutput(token_ids=torch.empty(0, dtype=torch.int32))
        engine.put(run())
        assert posted.computed().specs == ()


def raising(error: Exception) -> Callable[[], StageOutput]:
    def answer() -> StageOutput:
        raise error

    return answer


def test_errors_are_answers_and_the_thread_goes_on() -> None:
    missing = (MissingPositions(sequence_id=SequenceId(1), have=0),)
    with running() as (engine, posted):
        engine.put(run())
        (broke,) = [posted.next()]
        assert isinstance(broke, ComputeFailed)
        assert "No layers are loaded" in str(broke.error)
        engine.put(Load(0, ORDER))
        posted.loaded()
        for error, said in (
            (MissingPositionsError(missing), "positions are missing"),
            (StageError("not finite"), "not finite"),
            (SequencesFailed([SequenceId(1)], InvalidRequest("no token")), "no token"),
            (RuntimeError("a bug"), "Computing failed: RuntimeError: a bug."),
        ):
            engine.stages[0].answer = raising(error)
            engine.put(run())
            broke = posted.next()
            assert isinstance(broke, ComputeFailed)
            assert said in str(broke.error)
            assert broke.missing == (missing if isinstance(error, MissingPositionsError) else ())
            assert broke.sequence_ids == ((1,) if isinstance(error, SequencesFailed) else ())
            if isinstance(error, SequencesFailed):
                assert isinstance(broke.error, InvalidRequest)
        engine.stages[0].answer = StageOutput
        engine.put(run())
        posted.computed()


def test_a_step_that_finds_no_memory_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[torch.device] = []
    monkeypatch.setattr(engine_module, "give_memory_back", given_back.append)
    short = [torch.OutOfMemoryError("out of memory")]

    def answer() -> StageOutput:
        if short:
            raise short.pop()
        return StageOutput()

    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        engine.stages[0].answer = answer
        engine.put(run())
        posted.computed()
        assert given_back == [torch.device("cpu")]
        short += [torch.OutOfMemoryError("out of memory")] * 2
        engine.put(run())
        broke = posted.next()
        assert isinstance(broke, ComputeFailed)
        assert "out of memory" in str(broke.error)


@pytest.mark.parametrize("where", ["run", "load"])
def test_a_device_that_fails_ends_the_worker(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No later call to it succeeds, and what it holds cannot be trusted."""
    failed = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        if where == "run":
            engine.stages[0].answer = raising(failed)
            engine.put(run())
        else:
            held: Any = engine._stages
            monkeypatch.setattr(held, "_load_stage", lambda load: raising(failed)())
            engine.put(Load(0, msgspec.structs.replace(ORDER, layers=LayerRange(0, 1))))
        event = posted.next()
        assert isinstance(event, ComputeThreadFailed)
        assert "illegal memory access" in str(event.error)
        assert "others take its layers" in str(event.error)


def test_task_without_token_ids_is_refused() -> None:
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        whole = run(0, torch.ones(2, 3), torch.ones(1))
        hidden = msgspec.structs.replace(whole.task, tensors=whole.task.tensors[1:])
        nothing = msgspec.structs.replace(whole.task, tensors=())
        for wrong in (whole, Run(0, hidden, whole.frames[1:]), Run(0, nothing, ())):
            engine.put(wrong)
            broke = posted.next()
            assert isinstance(broke, ComputeFailed)
            assert "not token ids, hidden states" in str(broke.error)


def test_late_task_of_a_released_sequence_is_dropped_in_silence() -> None:
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        engine.put(Release(Epoch(3), (SequenceId(1), SequenceId(2))))
        engine.stages[0].answer = raising(ReleasedSequence("late"))
        engine.put(run(1))
        engine.put(Drop())
        engine.put(run(2))
        broke = posted.next()
        assert isinstance(broke, ComputeFailed)
        assert broke.run.task.step == 2
        assert engine.stages[0].story[1] == ("release", 1, 2)


def test_what_a_task_releases_is_freed_before_it_runs() -> None:
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        given = run()
        seen_from = (SeenFrom(sequence_id=SequenceId(6), position=64),)
        task = msgspec.structs.replace(given.task, released=(4, 5), seen_from=seen_from)
        engine.put(Run(0, task, given.frames))
        posted.computed()
        told = [("release", 4, 5), ("forget", {6: 64}), ([1, 2], None)]
        assert engine.stages[0].story[1:] == told


# ------------------------------------------------------------------ what is void


def test_what_became_void_while_it_waited_is_not_run() -> None:
    oldest = 0
    begun, held = threading.Event(), threading.Event()
    with running(void=lambda o: isinstance(o, Run) and o.task.step < oldest) as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()

        def wait() -> StageOutput:
            begun.set()
            held.wait(20)
            return StageOutput()

        engine.stages[0].answer = wait
        for step in range(4):
            engine.put(run(step))
        assert begun.wait(20)
        oldest = 3
        held.set()
        assert [posted.computed().run.task.step for _ in range(2)] == [0, 3]
        assert len(engine.stages[0].story) == 3  # the limit, and two tasks
        engine.put(run(9))
        assert posted.computed().run.task.step == 9
        assert posted.nothing


def test_void_order_loads_nothing() -> None:
    with running(void=lambda o: isinstance(o, Load) and o.order.epoch < 4) as (engine, posted):
        engine.put(Load(0, order(epoch=3)))
        engine.put(Load(0, order(epoch=4)))
        assert posted.loaded().epoch == 4
        assert len(engine.stages) == 1


def test_same_layers_are_kept_and_their_cache_is_dropped() -> None:
    with running() as (engine, posted):
        for epoch in (3, 4):
            engine.put(Load(0, order(epoch=epoch, wire_dtype="float32")))
            assert posted.loaded().epoch == epoch
        assert len(engine.stages) == 1
        assert engine.stages[0].story.count("reset") == 1
        engine.put(Load(0, order(epoch=5, layers=LayerRange(0, 3))))
        posted.loaded()
        assert len(engine.stages) == 2


# ------------------------------------------------------------------ time


class Clock:
    """Takes the place of the module `time` in the engine: time passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        assert seconds > 0.0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (engine_module, held_stages, orders):
        monkeypatch.setattr(module, "time", clock)
    return clock


def taking(clock: Clock, seconds: float) -> Callable[[], StageOutput]:
    """Return the answer of a stage that computes for so long."""

    def answer() -> StageOutput:
        clock.now += seconds
        return StageOutput()

    return answer


def test_time_is_counted_in_whole_microseconds_with_what_is_waited(clock: Clock) -> None:
    both_queued = threading.Event()
    with running(slowdown=5.0) as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()

        def answer() -> StageOutput:
            assert both_queued.wait(20)
            clock.now += 0.01
            return StageOutput()

        engine.stages[0].answer = answer
        engine.put(run(0))
        engine.put(run(1))
        assert engine.vitals.tasks_waiting == 2
        both_queued.set()
        first, second = posted.computed(), posted.computed()
        assert (first.compute_us, first.queued_us) == (50_000, 0)
        assert (second.compute_us, second.queued_us) == (50_000, 50_000)
        assert {type(v) for v in (first.compute_us, first.queued_us)} == {int}
    assert engine.vitals.tasks_waiting == 0


@pytest.mark.parametrize(
    ("slowdown", "task_s", "layers_s", "compute_us", "layers_us"),
    [
        pytest.param(1.0, 0.0, 0.0, 0, 0, id="no time"),
        pytest.param(1.0, 0.05, 0.02, 50_000, 20_000, id="the rest is not the layers'"),
        pytest.param(2.0, 0.05, 0.02, 100_000, 40_000, id="slower layers"),
        pytest.param(3.0, 0.01, 0.02, 30_000, 30_000, id="no more than all of it"),
    ],
)
def test_layers_take_a_part_of_the_time(
    clock: Clock,
    slowdown: float,
    task_s: float,
    layers_s: float,
    compute_us: int,
    layers_us: int,
) -> None:
    with running(slowdown=slowdown) as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        engine.stages[0].layers_s = layers_s
        engine.stages[0].answer = taking(clock, task_s)
        engine.put(run())
        done = posted.computed()
        assert (done.compute_us, done.layers_us) == (compute_us, layers_us)


def test_a_machine_may_become_slower_while_it_works(clock: Clock) -> None:
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        engine.stages[0].answer = taking(clock, 0.01)
        engine.put(run())
        assert posted.computed().compute_us == 10_000
        engine.slowdown = 10.0
        engine.put(run())
        assert posted.computed().compute_us == 100_000


def test_progress_is_as_old_as_the_latest_order_or_layer(clock: Clock) -> None:
    ages: list[float] = []
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        clock.now = 50.0
        assert engine.progress_age_s() == 0.0, "it has no task"

        def answer() -> StageOutput:
            ages.append(engine.progress_age_s())
            clock.now += 3.0
            ages.append(engine.progress_age_s())
            engine.stages[0].progress()
            clock.now += 0.5
            ages.append(engine.progress_age_s())
            return StageOutput()

        engine.stages[0].answer = answer
        engine.put(run())
        posted.computed()
    assert ages == [0.0, 3.0, 0.5]
    assert engine.progress_age_s() == 0.0


def test_loading_is_timed(clock: Clock) -> None:
    with running() as (engine, posted):
        held: Any = engine._stages
        load = held._load_stage

        def load_slowly(given: Load) -> Any:
            clock.now += 2.0
            return load(given)

        held._load_stage = load_slowly
        engine.put(Load(0, ORDER))
        assert posted.loaded().load_s == 2.0


def test_progress_of_a_load_is_told_while_there_is_one() -> None:
    with running() as (engine, posted):
        assert engine.load_progress is None
        held: Any = engine._stages
        load = held._load_stage
        seen: list[int | None] = []

        def load_in_parts(given: Load) -> Any:
            seen.append(engine.load_progress)
            held._progress.add(1 << 30)
            seen.append(engine.load_progress)
            new = load(given)
            new.stage.progress = held._layer_done  # as of every stage that is loaded
            new.stage.answer = lambda: (held._layer_done(), StageOutput())[1]
            return new

        held._load_stage = load_in_parts
        before = held._progress._done
        engine.put(Load(0, order(trials=True, kv_tokens=KV_BLOCK)))
        posted.loaded()
        first, second = seen
        assert first is not None
        assert second is not None
        assert second >= first + (1 << 30)
        assert held._progress._done > before + (1 << 30), "trial steps are progress too"
        trials = held._progress._done
        engine.put(run())
        posted.computed()
        assert engine.load_progress is None
        assert held._progress._done == trials, "tasks are not"


def test_a_load_beside_is_told_until_it_has_ended() -> None:
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        held: Any = engine._stages
        load, gate, began = held._load_beside, threading.Event(), threading.Event()

        def load_later(*given: Any) -> Any:
            began.set()
            assert gate.wait(20)
            return load(*given)

        held._load_beside = load_later
        engine.put(Load(0, order(epoch=Epoch(4), beside=Epoch(3))))
        assert began.wait(20)
        before = held._progress._done
        engine.put(run())
        posted.computed()
        assert engine.load_progress is not None
        assert held._progress._done == before, "tasks beside it are no progress of the load"
        gate.set()
        posted.loaded()
        engine.put(run(1))
        posted.computed()
        assert engine.load_progress is None


def test_trial_steps_are_run_and_timed_like_tasks(clock: Clock) -> None:
    with running(slowdown=2.0) as (engine, posted):
        held: Any = engine._stages
        load = held._load_stage

        def load_slow_stage(given: Load) -> Any:
            new = load(given)
            new.stage.layers_s, new.stage.answer = 0.005, taking(clock, 0.01)
            return new

        held._load_stage = load_slow_stage
        engine.put(Load(0, order(trials=True, kv_tokens=KV_BLOCK)))
        trials = posted.loaded().trials
        assert [(trial.time.compute_us, trial.time.layers_us) for trial in trials] == [
            (20_000, 10_000)
        ] * 3
        runs = [len(step[0]) for step in engine.stages[0].story if isinstance(step[0], list)]
        assert runs == [8, 1, 1, 1, 8, 8, 8, 1, 1, 1]


# ------------------------------------------------------------------ two stages


def test_tasks_run_on_the_stage_of_their_epoch() -> None:
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        engine.put(Load(0, order(epoch=4, layers=LayerRange(1, 3), beside=Epoch(3))))
        assert [posted.loaded().epoch for _ in range(2)] == [3, 4]
        old, new = engine.stages
        for epoch in (3, 4):
            engine.put(Release(Epoch(epoch), (SequenceId(epoch),)))
            given = run()
            task = msgspec.structs.replace(given.task, epoch=epoch)
            engine.put(Run(0, task, given.frames))
            posted.computed()
        assert old.story[1:] == [("release", 3), ([1, 2], None)]
        assert new.story[1:] == [("release", 4), ([1, 2], None)]
        engine.put(Serve(Epoch(4)))
        engine.put(Serve(Epoch(4)))  # already
        engine.put(run())
        broke = posted.next()
        assert isinstance(broke, ComputeFailed)
        assert "No layers are loaded for plan 3" in str(broke.error)
        engine.put(Load(0, order(epoch=5, layers=LayerRange(1, 3))))
        assert posted.loaded().epoch == 5
        assert new.story[-3:] == [
            "reset",
            "give back",
            ("limit", blocks(16)),
        ]  # it is the served one


def test_speed_is_not_measured_while_layers_load_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine_module, "remeasure", lambda order, *_, **__: Probed(order.session, 1.0, 1.0, 1)
    )
    gate = threading.Event()
    with running() as (engine, posted):
        held: Any = engine._stages
        load = held._load_beside

        def load_later(*given: Any) -> Any:
            assert gate.wait(20)
            return load(*given)

        held._load_beside = load_later
        engine.put(Load(0, order(beside=Epoch(3))))
        engine.put(Probe(1))
        engine.put(run())
        assert isinstance(posted.next(), ComputeFailed)  # so it has come to the probe
        gate.set()
        posted.loaded()
        engine.put(Probe(2))
        assert posted.next() == Probed(2, 1.0, 1.0, 1)


@pytest.mark.parametrize("end", [Drop(), Load(0, msgspec.structs.replace(ORDER, epoch=5))])
def test_the_stage_beside_is_given_up_with_the_served_one(end: Drop | Load) -> None:
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        engine.put(Load(0, order(epoch=4, beside=Epoch(3))))
        posted.loaded(), posted.loaded()
        engine.put(end)
        if isinstance(end, Load):
            posted.loaded()
        given = run()
        engine.put(Run(0, msgspec.structs.replace(given.task, epoch=4), given.frames))
        assert isinstance(posted.next(), ComputeFailed)


# ------------------------------------------------------------------ memory


def blocks(count: int) -> int:
    return count * KV_BLOCK * PER_TOKEN


@pytest.mark.parametrize(
    ("wanted", "memory_bytes", "free_bytes", "kv_tokens", "limit"),
    [
        pytest.param(1000, GIB, 100 * GIB, 1000, blocks(16), id="all that is wanted"),
        pytest.param(64, GIB, 100 * GIB, 64, blocks(1), id="one block"),
        pytest.param(10, GIB, 100 * GIB, 10, blocks(1), id="less than a block"),
        pytest.param(
            1000, WEIGHTS + blocks(3) + 1, 100 * GIB, 192, blocks(3), id="as max_memory allows"
        ),
        pytest.param(
            1000, GIB, 256 * MIB + blocks(2), 128, blocks(2), id="what is free but 256 MiB"
        ),
        pytest.param(
            10**9, 1000 * GIB, 100 * GIB, 102_005_440, None, id="what is free but 5 percent"
        ),
    ],
)
def test_cache_gets_what_is_wanted_or_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
    wanted: int,
    memory_bytes: int,
    free_bytes: int,
    kv_tokens: int,
    limit: int | None,
) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda device: free_bytes)
    with running(memory_bytes) as (engine, posted):
        engine.put(Load(0, order(kv_tokens=wanted)))
        event = posted.loaded()
        assert event.weight_bytes == WEIGHTS
        assert event.kv_tokens == kv_tokens
        assert (event.kv_token_bytes, event.kv_windowed_bytes, event.kv_window) == (1000, 500, 9)
        if limit is None:
            limit = kv_tokens * PER_TOKEN
            assert limit <= 0.95 * free_bytes < limit + blocks(1)
        assert engine.stages[0].story == [("limit", limit)]


def test_a_stage_that_keeps_no_positions_is_told_its_room_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda device: 100 * GIB)
    monkeypatch.setattr(FakeStage, "kv_bytes_per_token", 0)
    with running(WEIGHTS + 7 * KV_BLOCK + 3) as (engine, posted):
        engine.put(Load(0, order(kv_tokens=1000)))
        assert posted.loaded().kv_tokens == 7 * KV_BLOCK
        assert engine.stages[-1].story == [("limit", 7 * KV_BLOCK)]


def test_what_a_step_takes_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the worker may use, and of what is free."""
    step = 1000 * PER_TOKEN
    for budget, free in (
        (WEIGHTS + blocks(3) + step, 100 * GIB),
        (GIB, 256 * MIB + blocks(3) + step),
    ):
        monkeypatch.setattr(loading, "free_memory_bytes", lambda device, free=free: free)
        with running(budget) as (engine, posted):
            engine.put(Load(0, order(workspace_bytes=step)))
            assert posted.loaded().kv_tokens == 3 * KV_BLOCK
            engine.put(Load(0, order(epoch=4, workspace_bytes=step + blocks(3))))
            assert isinstance(posted.next(), LoadFailed)


@pytest.mark.parametrize(
    ("memory_bytes", "free_bytes"),
    [
        (WEIGHTS + blocks(1) - 1, 100 * GIB),
        (WEIGHTS - 1, 100 * GIB),
        (GIB, 256 * MIB + blocks(1) - 1),
        (GIB, 0),
    ],
)
def test_no_room_for_one_block_is_said_with_numbers_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: int, free_bytes: int
) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda device: free_bytes)
    with running(memory_bytes) as (engine, posted):
        engine.put(Load(0, ORDER))
        event = posted.next()
        assert isinstance(event, LoadFailed)
        assert isinstance(event.error, NotEnoughMemory)
        text = str(event.error)
        assert "No room for a KV cache beside layers 1-2" in text
        assert "7.0 MiB" in text
        assert "raise its max_memory" in text
        engine.put(run())
        broke = posted.next()
        assert isinstance(broke, ComputeFailed)
        assert "No layers are loaded" in str(broke.error)


def test_layers_that_were_kept_are_given_up_where_there_is_no_more_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        monkeypatch.setattr(loading, "free_memory_bytes", lambda device: 0)
        engine.put(Load(0, order(epoch=4)))
        assert isinstance(posted.next(), LoadFailed)
        engine.put(run())
        assert isinstance(posted.next(), ComputeFailed)


def test_tensor_owns_its_memory() -> None:
    raw = bytearray(range(9))
    spec = TensorSpec("int32", (2,))
    tensor = tensor_of(spec, memoryview(raw)[1:])  # at an odd address, as frames may be
    raw[:] = bytes(9)
    assert tensor.tolist() == [0x04030201, 0x08070605]
    tensor += 1


# ------------------------------------------------------------------ bugs


@pytest.mark.parametrize("method", ["release", "serve", "load", "free_some"])
def test_a_bug_in_the_thread_is_told_and_ends_it(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on with stages of which nobody knows what they hold."""

    def broken(*args: Any) -> None:
        raise RuntimeError("it is broken")

    with running() as (engine, posted):
        engine.put(Load(0, ORDER))
        posted.loaded()
        if method == "release":
            monkeypatch.setattr(FakeStage, method, broken)
        else:
            monkeypatch.setattr(held_stages.HeldStages, method, broken)
        engine.put(Load(0, ORDER) if method == "load" else Release(Epoch(3), (SequenceId(1),)))
        if method == "serve":
            engine.put(Serve(Epoch(3)))
        event = posted.next()
        assert isinstance(event, ComputeThreadFailed)
        assert "it is broken" in str(event.error)
