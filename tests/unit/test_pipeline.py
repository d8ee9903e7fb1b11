"""One pipeline and its answers: what it begins with, how many steps, and what it frees."""

import itertools

import pytest

from distributed_llm.common.messages import (
    MAX_RELEASED,
    ReleaseSequences,
    SequenceSlice,
    StageReady,
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.states import IllegalTransition
from distributed_llm.common.tensors import frame_of_token_ids
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, WorkerId
from distributed_llm.coordinator.events import Send
from distributed_llm.coordinator.plan import PipelineStage, PlannedStage
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Answer, Request
from distributed_llm.coordinator.serving.pipeline import (
    PIPELINE_STATES,
    Pipeline,
    PipelineCause,
    PipelineState,
)
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.steps import Dropped, StepBroken, StepDone, StepsInFlight
from tests.unit.fake_model import MODEL

EPOCH = 3
PEERS = [PeerId(b"a"), PeerId(b"b")]
NAMES = [WorkerId("a"), WorkerId("b")]
LAYERS = [LayerRange(0, 1), LayerRange(1, 2)]
STAGES = tuple(PipelineStage(*stage) for stage in zip(PEERS, NAMES, LAYERS, strict=True))
SETTINGS = CoordinatorSettings(max_batch_sequences=16, max_batch_tokens=32, task_timeout_s=10.0)


class Bench:
    """A pipeline of two stages, and workers that send results when they are told to.

    Attributes:
        changes: how often it said that steps may be begun, or answers admitted.
    """

    def __init__(self, *, planned: tuple[int, int] = (1024, 1024)) -> None:
        plan = tuple(
            PlannedStage(name, layers, 100, tokens)
            for name, layers, tokens in zip(NAMES, LAYERS, planned, strict=True)
        )
        self.changes = 0
        self.now = 0.0
        self._numbers = itertools.count()
        self.pipeline = Pipeline(
            Epoch(EPOCH),
            plan,
            STAGES,
            MODEL,
            SETTINGS,
            map(SequenceId, itertools.count(100)).__next__,
            self._changed,
        )

    def _changed(self, pipeline: Pipeline) -> None:
        assert pipeline is self.pipeline
        self.changes += 1

    @property
    def in_flight(self) -> StepsInFlight:
        assert self.pipeline.in_flight is not None
        return self.pipeline.in_flight

    @property
    def scheduler(self) -> Scheduler:
        assert self.pipeline.scheduler is not None
        return self.pipeline.scheduler

    def ready(self, stage: int, *, credits: int = 8, kv_tokens: int = 4096) -> bool:
        """A stage has loaded; return whether serving begins."""
        said = StageReady(
            epoch=Epoch(EPOCH), credits=credits, load_s=1.0, weight_bytes=1, kv_tokens=kv_tokens
        )
        last = self.pipeline.stage_ready(PEERS[stage], said)
        if last:
            self.pipeline.serve()
        return last

    def serve(self, *, credits: int = 8) -> "Bench":
        """Let both stages load, and reach one another."""
        self.ready(0, credits=credits)
        self.ready(1, credits=credits)
        self.pipeline.set_link(PEERS[0], True)
        return self

    def admit(self, prompt: int, new_tokens: int = 20) -> Answer:
        """Let an answer run whose prompt has this many tokens."""
        number = next(self._numbers)
        answer = answer_of(number, prompt, new_tokens)
        assert self.scheduler.admit(answer, now=self.now)
        return answer

    def begin(self) -> list[Send]:
        """Return what is sent now."""
        sends = self.pipeline.begin_steps(now=self.now)
        self.pipeline.validate()
        return sends

    def done(self, task: Task) -> StepDone:
        """Let the last stage send the result of a task, and its answers go on."""
        samples = sum(part.sample for part in task.sequences)
        spec, frame = frame_of_token_ids([7] * samples)
        result = TaskResult(
            epoch=Epoch(EPOCH),
            step=task.step,
            timings=(StageTime(compute_us=1000, layers_us=0, queued_us=0),) * 2,
            tensors=(spec,) if samples else (),
        )
        outcome = self.in_flight.result(PEERS[1], result, (frame,) if samples else (), now=self.now)
        assert isinstance(outcome, StepDone)
        self.scheduler.complete(outcome.step)
        for answer, part in zip(outcome.step.answers, outcome.step.slices, strict=True):
            if part.sample and part.sequence_id == answer.sequence_id:
                answer.append(7, None, now=self.now)
        return outcome

    def decode(self, prompts: int) -> list[Answer]:
        """Admit answers and compute their prompts."""
        answers = [self.admit(4) for _ in range(prompts)]
        tasks = tasks_of(self.begin())
        while tasks:
            self.done(tasks.pop(0))
            if any(a.num_new_tokens == 0 and not a.num_in_flight for a in answers):
                tasks += tasks_of(self.begin())
        return answers


def answer_of(number: int, prompt: int, new_tokens: int) -> Answer:
    """Return an answer to a prompt of so many tokens, with so many to come; no two begin alike."""
    request = Request(
        (PeerId(b"client"), f"r{number}", number), SamplingParams(), 0.0, client="client"
    )
    tokens = [(number + at) % 50 for at in range(prompt)]
    request.accept(tokens, Limits((Sampling(),), new_tokens, ()), number=number)
    return request.answers[0]


def tasks_of(sends: list[Send]) -> list[Task]:
    """Return the tasks in `sends`; all go to the first stage."""
    tasks = []
    for send in sends:
        if isinstance(send.message, Task):
            assert send.peer == PEERS[0]
            tasks.append(send.message)
    return tasks


def releases_of(sends: list[Send]) -> list[tuple[PeerId, tuple[int, ...]]]:
    """Return who is told to free what, by messages of their own."""
    return [
        (send.peer, send.message.sequence_ids)
        for send in sends
        if isinstance(send.message, ReleaseSequences)
    ]


def measured(
    bench: Bench, compute_us: tuple[int, int], *, decodes: bool, times: int = 6, depth: int = 1
) -> None:
    """Let steps of 4 tokens have been measured at one depth."""
    sizes = [1] * 4 if decodes else [4]
    slices = tuple(
        SequenceSlice(sequence_id=SequenceId(1), start=9, num_tokens=size) for size in sizes
    )
    step = Step((answer_of(99, 20, 5),) * len(sizes), slices, (0,) * 4)
    timings = tuple(StageTime(compute_us=us, layers_us=0, queued_us=0) for us in compute_us)
    round_trip_s = sum(compute_us) / 1e6
    for _ in range(times):
        bench.now += 0.1
        done = StepDone(step, [], [], timings, depth, round_trip_s)
        bench.pipeline.observe(done, now=bench.now)


# ------------------------------------------------------------------ loading


def test_serves_once_all_stages_have_loaded() -> None:
    bench = Bench()
    assert bench.begin() == []
    assert not bench.ready(1)
    assert (bench.pipeline.in_flight, bench.changes) == (None, 0)
    assert bench.begin() == []
    assert bench.ready(0)
    assert bench.changes == 1
    assert bench.begin() == []


@pytest.mark.parametrize(
    ("planned", "told", "expected"),
    [
        ((1024, 512), (4096, 4096), (512, 512)),
        ((1024, 512), (4096, 130), (512, 128)),
        ((1024, 512), (255, 256), (192, 192)),
        ((1000, 1000), (4096, 4096), (960, 960)),
    ],
)
def test_kv_tokens_are_the_least_that_a_stage_has(
    planned: tuple[int, int], told: tuple[int, int], expected: tuple[int, int]
) -> None:
    """First of what is planned and what the first stage told, then of what both did."""
    bench = Bench(planned=planned)
    bench.ready(0, kv_tokens=told[0])
    assert bench.pipeline.kv_tokens == expected[0]
    bench.ready(1, kv_tokens=told[1])
    assert bench.pipeline.kv_tokens == expected[1]
    answer = bench.admit(4, new_tokens=expected[1] - 4)
    bench.scheduler.remove(answer)
    with pytest.raises(AssertionError):
        bench.admit(4, new_tokens=expected[1] - 3)


@pytest.mark.parametrize("up", [True, False])
def test_links_that_were_reported_while_loading_count(up: bool) -> None:
    bench = Bench()
    bench.pipeline.set_link(PEERS[0], True)
    bench.ready(0)
    bench.pipeline.set_link(PEERS[0], up)
    bench.ready(1)
    bench.admit(4)
    (task,) = tasks_of(bench.begin())
    assert task.route == (up,)


# ------------------------------------------------------------------ how many steps


@pytest.mark.parametrize(("credits", "steps"), [(1, 1), (2, 2), (8, 2)])
def test_steps_begin_up_to_the_credits_and_the_depth(credits: int, steps: int) -> None:
    """Without measurements as many steps are worth it as there are stages."""
    bench = Bench().serve(credits=credits)
    bench.decode(8)
    tasks = tasks_of(bench.begin())
    assert [len(task.sequences) for task in tasks] == [8 // steps] * steps
    assert bench.begin() == []
    bench.done(tasks[0])
    assert len(tasks_of(bench.begin())) == 1


def test_the_least_credits_of_a_stage_count() -> None:
    bench = Bench()
    bench.ready(0, credits=8)
    bench.ready(1, credits=1)
    bench.decode(8)
    assert len(tasks_of(bench.begin())) == 1


def test_chunks_of_a_prompt_follow_one_another() -> None:
    bench = Bench().serve()
    measured(bench, (10_000, 10_000), decodes=False)
    bench.admit(100)
    first, second = tasks_of(bench.begin())
    assert [(p.start, p.num_tokens) for p in first.sequences] == [(0, 32)]
    assert [(p.start, p.num_tokens) for p in second.sequences] == [(32, 32)]


def test_one_sequence_that_decodes_is_one_step() -> None:
    bench = Bench().serve()
    bench.decode(1)
    (task,) = tasks_of(bench.begin())
    assert bench.begin() == []
    assert task.route == (True,)


def test_a_prompt_of_one_token_begins() -> None:
    """It computes one token like those that answer, but it is a prompt."""
    bench = Bench().serve()
    bench.admit(1)
    (task,) = tasks_of(bench.begin())
    assert [(p.start, p.num_tokens, p.sample) for p in task.sequences] == [(0, 1, True)]


# ------------------------------------------------------------------ steps that are lost


def test_a_lost_link_abandons_what_is_under_way() -> None:
    bench = Bench().serve()
    measured(bench, (10_000, 10_000), decodes=False)
    answer = bench.admit(100)
    lost = tasks_of(bench.begin())
    assert len(lost) == 2
    bench.pipeline.set_link(PEERS[0], False)
    assert bench.in_flight.num_steps == answer.num_in_flight == 0
    again = tasks_of(bench.begin())
    assert [task.sequences for task in again] == [task.sequences for task in lost]
    assert {task.route for task in again} == {(False,)}
    assert {task.oldest for task in again} == {lost[-1].step + 1}
    result = TaskResult(
        epoch=Epoch(EPOCH),
        step=lost[0].step,
        timings=(StageTime(compute_us=1, layers_us=0, queued_us=1),) * 2,
    )
    assert bench.in_flight.result(PEERS[1], result, (), now=0.0) == Dropped("late_result")


def test_a_link_that_comes_up_or_was_down_abandons_nothing() -> None:
    bench = Bench().serve()
    bench.decode(8)
    bench.begin()
    bench.pipeline.set_link(PEERS[0], True)
    bench.pipeline.set_link(PEERS[1], False)
    assert bench.in_flight.num_steps == 2


def test_nothing_to_abandon_while_loading() -> None:
    bench = Bench()
    bench.pipeline.abandon_steps()
    bench.pipeline.set_link(PEERS[0], False)
    assert bench.begin() == []


# ------------------------------------------------------------------ what stages free


def test_freed_by_message_while_nothing_is_under_way_and_again_by_the_next_task() -> None:
    bench = Bench().serve()
    (answer,) = bench.decode(1)
    sequence_id = answer.sequence_id
    assert sequence_id is not None
    bench.scheduler.remove(answer)
    sends = bench.begin()
    assert releases_of(sends) == [(PEERS[0], (sequence_id,)), (PEERS[1], (sequence_id,))]
    assert {send.message.epoch for send in sends if isinstance(send.message, ReleaseSequences)} == {
        EPOCH
    }
    assert bench.begin() == []  # said once
    bench.admit(4)
    (task,) = tasks_of(bench.begin())
    assert task.released == (sequence_id,)


def test_what_was_not_said_yet_is_said_alone() -> None:
    bench = Bench().serve()
    answers = bench.decode(2)
    for answer in answers:
        sequence_id = answer.sequence_id
        bench.scheduler.remove(answer)
        sends = bench.begin()
        if answer is answers[-1]:
            assert releases_of(sends) == [(peer, (sequence_id,)) for peer in PEERS]
        else:  # the other goes on, and its next task says it
            assert releases_of(sends) == []
            (task,) = tasks_of(sends)
            assert task.released == (sequence_id,)
            bench.done(task)


def test_no_message_overtakes_a_step_under_way() -> None:
    bench = Bench().serve()
    one, two = bench.decode(2)
    leaving = one.sequence_id
    tasks = tasks_of(bench.begin())
    bench.scheduler.remove(one)
    assert bench.begin() == []
    (mine,) = [t for t in tasks if any(p.sequence_id == leaving for p in t.sequences)]
    (other,) = [t for t in tasks if t is not mine]
    bench.done(mine)
    assert releases_of(bench.begin()) == []  # the other step is under way
    bench.done(other)
    (task,) = tasks_of(bench.begin())
    assert task.released == (leaving,)
    assert [part.sequence_id for part in task.sequences] == [two.sequence_id]


def test_what_an_abandoned_task_said_is_said_by_message() -> None:
    """Nothing is left to run: no later task would say it."""
    bench = Bench().serve()
    one, two = bench.decode(2)
    freed = [one.sequence_id, two.sequence_id]
    bench.scheduler.remove(one)
    (task,) = tasks_of(bench.begin())
    assert task.released == (freed[0],)
    bench.pipeline.abandon_steps()
    bench.scheduler.remove(two)
    sends = bench.begin()
    assert tasks_of(sends) == []
    assert [(peer, sorted(ids)) for peer, ids in releases_of(sends)] == [
        (peer, freed) for peer in PEERS
    ]


def test_a_message_frees_so_many_at_most() -> None:
    bench = Bench().serve()
    bench.in_flight.to_forget.release(map(SequenceId, range(MAX_RELEASED + 1)))
    assert releases_of(bench.begin()) == [
        (PEERS[0], tuple(range(MAX_RELEASED))),
        (PEERS[1], tuple(range(MAX_RELEASED))),
        (PEERS[0], (MAX_RELEASED,)),
        (PEERS[1], (MAX_RELEASED,)),
    ]


# ------------------------------------------------------------------ measured times


def test_load_is_the_time_of_the_slowest_stage_per_answer() -> None:
    bench = Bench().serve()
    measured(bench, (4_000, 8_000), decodes=True)
    assert bench.pipeline.expected_round_s == pytest.approx(0.002)
    bench.admit(4)
    assert bench.pipeline.expected_round_s == pytest.approx(0.004)


def test_prefill_says_nothing_about_decoding() -> None:
    bench = Bench().serve()
    measured(bench, (4_000, 8_000), decodes=True)
    assert bench.pipeline.expected_round_s == pytest.approx(0.002)
    measured(bench, (400_000, 800_000), decodes=False, times=20)
    assert bench.pipeline.expected_round_s == pytest.approx(0.002)
    measured(bench, (2_000, 40_000), decodes=True, times=60)
    assert bench.pipeline.expected_round_s == pytest.approx(0.01, rel=0.1)


def test_depth_of_prompts_follows_from_prompts_alone() -> None:
    """One stage takes all the time of a prompt: chunks in a row are hardly faster."""
    bench = Bench().serve()
    measured(bench, (10_000, 10_000), decodes=True)
    measured(bench, (100, 20_000), decodes=False)
    bench.admit(100)
    assert len(tasks_of(bench.begin())) == 1


def test_depth_of_decoding_follows_from_decoding_alone() -> None:
    """Stages that slow each other down do so when they decode, too: one step at a time is best."""
    bench = Bench().serve()
    measured(bench, (10_000, 10_000), decodes=False)
    measured(bench, (10_000, 10_000), decodes=True, times=4)
    measured(bench, (40_000, 40_000), decodes=True, times=4, depth=2)
    bench.decode(8)
    assert len(tasks_of(bench.begin())) == 1


# ------------------------------------------------------------------ broken steps


def test_a_broken_step_frees_again_what_it_was_to_free() -> None:
    bench = Bench().serve()
    one, two = bench.decode(2)
    freed = one.sequence_id
    bench.scheduler.remove(one)
    (task,) = tasks_of(bench.begin())
    said = TaskFailed(epoch=Epoch(EPOCH), step=task.step, code="stage_error", message="no")
    broken = bench.in_flight.failed(PEERS[1], said)
    assert isinstance(broken, StepBroken)
    bench.scheduler.abandon(broken.step)
    (again,) = tasks_of(bench.begin())
    assert (task.released, again.released) == ((freed,), (freed,))
    assert [part.sequence_id for part in again.sequences] == [two.sequence_id]


# ------------------------------------------------------------------ other stages


def moved(bench: Bench) -> Pipeline:
    """Return a pipeline that continues from another, with the stages the other way round."""
    stages = tuple(
        PipelineStage(peer, name, layers)
        for peer, name, layers in zip(PEERS[::-1], NAMES[::-1], LAYERS, strict=True)
    )
    plan = tuple(PlannedStage(stage.worker, stage.layers, 100, 1024) for stage in stages)
    new = Pipeline(
        Epoch(EPOCH + 1),
        plan,
        stages,
        MODEL,
        SETTINGS,
        map(SequenceId, itertools.count(500)).__next__,
        lambda pipeline: None,
    )
    for at, stage in enumerate(stages):
        said = StageReady(
            epoch=Epoch(EPOCH + 1), credits=8, load_s=1.0, weight_bytes=1, kv_tokens=4096
        )
        assert new.stage_ready(stage.peer, said) == (at == 1)
    new.set_link(stages[0].peer, True)
    new.continue_from(bench.pipeline)
    return new


def test_answers_go_on_on_other_stages() -> None:
    bench = Bench().serve()
    (answer,) = bench.decode(1)
    sequence = answer.sequence_id
    bench.pipeline.pause()
    new = moved(bench)
    assert (bench.pipeline.in_flight, bench.pipeline.scheduler) == (None, None)
    (send,) = new.begin_steps(now=bench.now)
    new.validate()
    assert isinstance(send.message, Task)
    assert (send.peer, send.message.epoch, send.message.route) == (PEERS[1], EPOCH + 1, (True,))
    (part,) = send.message.sequences
    assert (part.sequence_id, part.start, part.num_tokens) == (sequence, 4, 1)
    assert part.sampling is not None


def test_what_was_freed_meanwhile_is_said_to_the_other_stages() -> None:
    bench = Bench().serve()
    gone, stays = bench.decode(2)
    sequence = gone.sequence_id
    bench.pipeline.pause()
    bench.scheduler.remove(gone)
    assert bench.begin() == [], "nothing is said while the caches are handed over"
    new = moved(bench)
    (send,) = new.begin_steps(now=bench.now)
    assert isinstance(send.message, Task)
    assert send.message.released == (sequence,)
    assert [part.sequence_id for part in send.message.sequences] == [stays.sequence_id]


def test_no_step_begins_while_it_is_held() -> None:
    bench = Bench().serve()
    bench.decode(1)
    bench.pipeline.pause()
    assert bench.begin() == []
    changes = bench.changes
    bench.pipeline.resume()
    assert bench.changes == changes + 1
    assert len(tasks_of(bench.begin())) == 1


# ------------------------------------------------------------------ the table


def test_a_pipeline_that_was_continued_or_given_up_does_nothing_more() -> None:
    bench = Bench().serve()
    bench.pipeline.pause()
    moved(bench)
    assert bench.pipeline.state is PipelineState.ENDED
    assert not any(PIPELINE_STATES.allows(PipelineState.ENDED, cause) for cause in PipelineCause)
    with pytest.raises(IllegalTransition, match="PAUSED cannot happen while ENDED"):
        bench.pipeline.pause()


def test_one_that_serves_cannot_be_continued_before_it_is_paused() -> None:
    with pytest.raises(IllegalTransition, match="CONTINUED_BY_ANOTHER cannot happen while SERVING"):
        moved(Bench().serve())
