"""What encoders read: whole, in steps of their own, shared by those who ask the same."""

from collections.abc import Sequence
from dataclasses import replace

from distributed_llm.common.messages import StageTime, TaskResult
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.tensors import TensorSpec, frame_of_token_ids
from distributed_llm.common.types import LayerRange, PeerId, SequenceId
from distributed_llm.coordinator.cluster.kv_transfers import transfers_between
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Answer, Request
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.steps import Dropped, SendTask, StepDone, StepsInFlight
from tests.unit.fake_model import HIDDEN, MODEL, with_sources
from tests.unit.test_move import stages
from tests.unit.test_scheduler import Bench, parts
from tests.unit.test_steps import EPOCH, LEASE_S, PEERS, STAGES

START = (7,)


class Readers(Bench):
    """A scheduler of an encoder-decoder."""

    def ask(self, source: Sequence[int], n: int = 1) -> list[Answer]:
        """Let the answers to a source run."""
        number, self._number = self._number, self._number + n
        request = Request(
            (PeerId(b"a"), f"r{number}", number), SamplingParams(), arrived_at=0.0, client=b"a"
        )
        limits = Limits(tuple(Sampling(seed=i) for i in range(n)), 10, ())
        request.accept(source, limits, number=number, start=START)
        assert all(self.admit(answer) for answer in request.answers)
        return list(request.answers)


def test_a_source_is_read_whole_and_the_answer_begins_after_it() -> None:
    bench = Readers(tokens=10)
    (answer,) = bench.ask(range(100, 125))
    reading = bench.step()
    assert parts(reading) == [(0, 0, 25, False)]
    assert reading.is_source
    assert not reading.decodes
    assert bench.poll() is None, "the first token cannot be computed before the source"
    bench.land(reading)
    writing = bench.step()
    assert parts(writing) == [(0, 25, 1, True)]
    assert writing.decodes
    assert [part.source for part in writing.slices] == [25]
    bench.land(writing)
    assert answer.num_new_tokens == 1
    assert answer.request.usage().prompt_tokens == 25


def test_sources_are_read_together_as_far_as_the_budget_goes() -> None:
    bench = Readers(tokens=20)
    for length in (8, 9, 7):
        bench.ask(range(100 * length, 100 * length + length))
    assert parts(bench.step()) == [(0, 0, 8, False), (1, 0, 9, False)]
    assert parts(bench.step()) == [(2, 0, 7, False)]


def test_reading_takes_turns_with_writing() -> None:
    bench = Readers(tokens=20)
    bench.ask(range(5))
    bench.run()
    for first in (100, 200, 300):
        bench.ask(range(first, first + 15))
    kinds = []
    for _ in range(6):
        step = bench.step()
        kinds.append(step.is_source)
        bench.land(step)
    assert kinds == [False, True, False, True, False, True]


def test_nothing_is_read_where_no_prompts_are_wanted() -> None:
    bench = Readers()
    bench.ask(range(5))
    assert bench.poll(prompts=False) is None


def test_an_answer_that_is_computed_again_reads_its_source_first() -> None:
    bench = Readers()
    (answer,) = bench.ask(range(5))
    bench.run(4)
    bench.scheduler.restart(answer)
    assert parts(bench.step()) == [(0, 0, 5, False)]
    bench.scheduler.restart(answer)
    reading = bench.step()
    bench.land(reading)
    assert parts(bench.step()) == [(0, 5, 4, True)]


def test_equal_sources_are_read_once() -> None:
    bench = Readers(tokens=200)
    source = range(100, 180)
    first, *others = bench.ask(source, n=3)
    assert parts(bench.step()) == [(0, 0, 80, False)]
    assert all(answer.waits_for is first for answer in others)
    (later,) = bench.ask([*source])
    assert later.waits_for is first


def test_sources_that_begin_alike_share_nothing() -> None:
    bench = Readers(tokens=200)
    bench.ask(range(100, 180))
    bench.run(2)
    (longer,) = bench.ask(range(100, 190))
    (shorter,) = bench.ask(range(100, 170))
    assert longer.prefix is None
    assert shorter.prefix is None
    assert bench.scheduler.hit_length(longer) == bench.scheduler.hit_length(shorter) == 0


def test_an_ended_answer_leaves_its_source_to_others() -> None:
    bench = Readers(tokens=200)
    (first,) = bench.ask(range(100, 180))
    bench.run(3)
    bench.scheduler.remove(first, keep=True)
    (again,) = bench.ask(range(100, 180))
    assert again.num_computed_tokens == 80
    assert parts(bench.step()) == [(1, 80, 1, True)]
    assert again.request.usage().cached_tokens == 80


# ------------------------------------------------------------------ steps on their way

SOURCE_SIZE = HIDDEN + 1
ENCODER_ALONE = replace(with_sources(MODEL), wire_dtype="bfloat16", source_size=SOURCE_SIZE)
"""Its first two layers are the encoder's, which are wider: those of the first of three stages."""


def line(credits: int = 4) -> StepsInFlight:
    return StepsInFlight(
        EPOCH,  # type: ignore[arg-type]
        STAGES,
        credits=credits,
        model=ENCODER_ALONE,
        task_timeout_s=LEASE_S,
    )


def result(task: SendTask, stage: int, first: int) -> TaskResult:
    count = sum(part.num_tokens for part in task.task.sequences)
    last = stage == len(PEERS) - 1
    samples = any(part.sample for part in task.task.sequences)
    width = SOURCE_SIZE if task.task.sequences[0].is_source else HIDDEN
    spec = frame_of_token_ids([1])[0] if last else TensorSpec("bfloat16", (count, width))
    return TaskResult(
        epoch=task.task.epoch,
        step=task.task.step,
        tensors=(spec,) if samples or not last else (),
        timings=tuple(
            StageTime(compute_us=1, layers_us=0, queued_us=0) for _ in range(stage + 1 - first)
        ),
    )


def both() -> tuple[Readers, StepsInFlight, SendTask, SendTask]:
    """Return a step that reads a source and is in flight, and one that decodes after it."""
    bench, steps = Readers(), line()
    bench.ask(range(5))
    bench.run()
    bench.ask(range(100, 109))
    writing, reading = bench.step(), bench.step()
    assert (reading.is_source, writing.is_source) == (True, False)
    return bench, steps, steps.begin(reading, now=0.0), steps.begin(writing, now=0.0)


def test_answers_begin_at_the_first_stage_with_decoder_layers() -> None:
    _, steps, reading, writing = both()
    assert reading.peer == PEERS[0]
    assert writing.peer == PEERS[2]
    assert writing.task.route == ()
    frames = (frame_of_token_ids([1])[1],)
    done = steps.result(PEERS[2], result(writing, 2, first=2), frames, now=1.0)
    assert isinstance(done, StepDone)
    assert (done.first, len(done.timings)) == (2, 1)


def test_a_step_that_begins_later_overtakes_nothing() -> None:
    _, steps, reading, writing = both()
    for stage in (0, 1):
        states = b"\0" * 9 * SOURCE_SIZE * 2
        relayed = steps.result(PEERS[stage], result(reading, stage, first=0), (states,), now=0.5)
        assert isinstance(relayed, SendTask)
    frames = (frame_of_token_ids([1])[1],)
    assert isinstance(
        steps.result(PEERS[2], result(writing, 2, first=2), frames, now=1.0), StepDone
    )
    assert not steps.has_overtaken, "the older one began at the first stage"


def test_steps_that_may_overtake_others_free_what_those_do() -> None:
    """They may need the room, whichever comes first; those that begin alike keep their order."""
    bench, steps = Readers(), line(credits=8)
    bench.ask(range(5))
    bench.run()
    bench.ask(range(100, 109))
    writing, reading = bench.step(), bench.step()
    freed, later = SequenceId(98), SequenceId(99)

    def told(step: Step) -> tuple[list[SequenceId], list[int]]:
        task = steps.begin(step, now=0.0).task
        return sorted(task.released), [one.position for one in task.seen_from]

    steps.to_forget.release([freed])
    steps.to_forget.drop({SequenceId(0): 64})
    assert told(reading) == ([freed], [64])
    assert told(writing) == ([freed], [64])
    steps.to_forget.release([later])
    assert told(writing) == ([freed, later], [64])
    assert told(reading) == ([later], []), "the first that reads goes before it"
    assert told(writing) == ([freed], [64])
    steps.abandon()
    assert told(writing) == ([freed, later], [64]), "all of them may be lost"
    assert told(writing) == ([], [])


def test_a_result_with_times_of_other_stages_is_not_taken() -> None:
    _, steps, _, writing = both()
    frames = (frame_of_token_ids([1])[1],)
    dropped = steps.result(PEERS[2], result(writing, 2, first=0), frames, now=1.0)
    assert isinstance(dropped, Dropped)


# ------------------------------------------------------------------ moves


def test_encoder_layers_have_nothing_to_send() -> None:
    old = stages(("a", 0, 4), ("b", 4, 8))
    new = stages(("b", 0, 3), ("a", 3, 6), ("c", 6, 8))
    sent = [
        (t.sender.worker, t.receiver.worker, t.layers)
        for t in transfers_between(old, new, encoder_layers=4)
    ]
    assert sent == [("b", "a", LayerRange(4, 6)), ("b", "c", LayerRange(6, 8))]
