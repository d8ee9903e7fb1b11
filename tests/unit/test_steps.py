"""Steps on their way: routes, results, leases, and what stages are told to free."""

from array import array
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.messages import (
    SeenFrom,
    SequenceSlice,
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
    TokenLogprobs,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.tensors import Frame, TensorSpec, frame_of_token_ids
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, StepNumber, WorkerId
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Answer, Request
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.steps import (
    Dropped,
    SendTask,
    StepBroken,
    StepDone,
    StepsInFlight,
)
from tests.unit import fake_model
from tests.unit.fake_model import HIDDEN, VOCAB

MODEL = replace(fake_model.MODEL, wire_dtype="bfloat16")
TOKENS = 3
EPOCH = 7
LEASE_S = 10.0
PEERS = [PeerId(b"a"), PeerId(b"b"), PeerId(b"c")]
STRANGER = PeerId(b"?")
STAGES = [
    PipelineStage(peer, WorkerId(peer.decode()), LayerRange(i, i + 1))
    for i, peer in enumerate(PEERS)
]
ACTIVATIONS = TensorSpec("bfloat16", (TOKENS, HIDDEN))

Outcome = StepDone | SendTask | StepBroken | Dropped


def in_flight(credits: int = 4, links: Iterable[int] = ()) -> StepsInFlight:
    """Three stages; those in `links` reach the next one."""
    line = StepsInFlight(
        Epoch(EPOCH),
        STAGES,
        credits=credits,
        model=MODEL,
        task_timeout_s=LEASE_S,
    )
    for stage in links:
        line.set_link(PEERS[stage], True)
    return line


def step(*asked: int | None, samples: bool = True) -> Step:
    """Return a step of one slice per answer, each of which asks for so many log-probabilities."""
    asked = asked or (None,)
    answers: list[Answer] = []
    for number, logprobs in enumerate(asked):
        request = Request(
            (PeerId(b"client"), f"r{number}", number), SamplingParams(), 0.0, client="client"
        )
        limits = Limits((Sampling(logprobs=logprobs),), 5, ())
        request.accept(range(TOKENS), limits, number=number)
        answers += request.answers
    slices = tuple(
        SequenceSlice(sequence_id=SequenceId(10 + i), start=0, num_tokens=TOKENS, sample=samples)
        for i in range(len(asked))
    )
    return Step(tuple(answers), slices, tuple(range(TOKENS)) * len(asked))


def timings(stage: int) -> tuple[StageTime, ...]:
    """What the stages up to this one took."""
    return tuple(StageTime(compute_us=100 + i, layers_us=0, queued_us=i) for i in range(stage + 1))


def run_stage(line: StepsInFlight, task: Task, stage: int, *, now: float = 0.0) -> Outcome:
    """Give the pipeline the right result of a stage for a task."""
    if stage == len(PEERS) - 1:
        sampled = [42] * sum(part.sample for part in task.sequences)
        tensors = [frame_of_token_ids(sampled)] if sampled else []
    else:
        tensors = [(ACTIVATIONS, bytes([task.step % 256]) * ACTIVATIONS.nbytes)]
    return reply(line, task.step, stage, tensors, now=now)


def reply(
    line: StepsInFlight,
    number: int,
    stage: int,
    tensors: Iterable[tuple[TensorSpec, Frame]],
    *,
    now: float = 0.0,
) -> Outcome:
    """Give the pipeline some result of a stage for a step."""
    pairs = list(tensors)
    result = TaskResult(
        epoch=Epoch(EPOCH),
        step=StepNumber(number),
        timings=timings(stage),
        tensors=tuple(spec for spec, _ in pairs),
    )
    outcome = line.result(PEERS[stage], result, tuple(frame for _, frame in pairs), now=now)
    line.validate()
    return outcome


def relayed(line: StepsInFlight, sent: SendTask, stage: int, *, now: float = 0.0) -> SendTask:
    """Give the right result of a stage that is not the last, and return the next task."""
    outcome = run_stage(line, sent.task, stage, now=now)
    assert isinstance(outcome, SendTask)
    return outcome


def finish(line: StepsInFlight, sent: SendTask, *, now: float = 0.0) -> StepDone:
    """Let the last stage send its result."""
    outcome = run_stage(line, sent.task, 2, now=now)
    assert isinstance(outcome, StepDone)
    return outcome


def floats(values: Iterable[float], shape: tuple[int, ...]) -> tuple[TensorSpec, Frame]:
    return TensorSpec("float32", shape), array("f", values).tobytes()


def ints(values: Iterable[int], shape: tuple[int, ...]) -> tuple[TensorSpec, Frame]:
    return TensorSpec("int32", shape), array("i", values).tobytes()


def refusal(number: int, epoch: int = EPOCH) -> TaskFailed:
    return TaskFailed(epoch=Epoch(epoch), step=StepNumber(number), code="stage_error", message="no")


# ------------------------------------------------------------------ the way through


@pytest.mark.parametrize(
    ("links", "route"),
    [
        ((), (False, False)),
        ((0,), (True, False)),
        ((1,), (False, True)),
        ((0, 1), (True, True)),
        ((0, 1, 2), (True, True)),  # nothing comes after the last stage
    ],
)
def test_a_task_carries_its_route(links: tuple[int, ...], route: tuple[bool, ...]) -> None:
    line = in_flight(links=links)
    going = step()
    sent = line.begin(going, now=1.0)
    assert sent.peer == PEERS[0]
    assert sent.frames == (frame_of_token_ids(range(TOKENS))[1],)
    assert sent.task == Task(
        epoch=Epoch(EPOCH),
        step=StepNumber(1),
        oldest=StepNumber(1),
        sequences=going.slices,
        tensors=(TensorSpec("int32", (TOKENS,)),),
        route=route,
    )


def test_relayed_from_stage_to_stage() -> None:
    line = in_flight()
    line.to_forget.release([SequenceId(3)])
    going = step()
    first = line.begin(going, now=1.0)
    second = relayed(line, first, 0, now=2.0)
    assert second.peer == PEERS[1]
    assert second.task.tensors == (*first.task.tensors, ACTIVATIONS)
    assert second.frames == (*first.frames, bytes([1]) * ACTIVATIONS.nbytes)
    assert second.task.timings == timings(0)
    assert second.task.route == (False,)
    assert second.task.released == (3,)
    assert second.task.sequences == going.slices
    third = relayed(line, second, 1, now=3.0)
    assert (third.peer, third.task.route, third.task.timings) == (PEERS[2], (), timings(1))
    assert line.steps == [going]
    assert finish(line, third, now=5.0) == StepDone(going, [42], [None], timings(2), 1, 4.0)
    assert line.steps == []
    assert line.next_deadline() is None


def test_last_stage_sends_the_result_of_what_was_handed_on_directly() -> None:
    line = in_flight(links=(0, 1))
    first = line.begin(step(), now=0.0)
    assert finish(line, first).timings == timings(2)
    assert line.begin(step(), now=0.0).task.step == first.task.step + 1


def test_a_stage_that_could_not_hand_on_is_relayed() -> None:
    """The link broke meanwhile: the stage sends what its route told it to hand on."""
    line = in_flight(links=(0, 1))
    second = relayed(line, line.begin(step(), now=0.0), 0)
    assert (second.peer, second.task.route) == (PEERS[1], (True,))
    finish(line, second)


def test_relayed_at_the_second_hop_only() -> None:
    line = in_flight(links=(0,))
    third = relayed(line, line.begin(step(), now=0.0), 1)
    assert (third.peer, third.task.timings) == (PEERS[2], timings(1))
    finish(line, third)


def test_step_that_samples_nothing() -> None:
    line = in_flight(links=(0, 1))
    done = finish(line, line.begin(step(samples=False), now=0.0))
    assert (done.token_ids, done.logprobs) == ([], [])


def test_depth_is_what_was_under_way_at_the_beginning() -> None:
    line = in_flight(links=(0, 1))
    first, second = line.begin(step(), now=0.0), line.begin(step(), now=0.0)
    assert line.num_steps == 2
    assert [finish(line, sent).depth for sent in (first, second)] == [1, 2]


def test_a_pipeline_of_one_stage() -> None:
    line = StepsInFlight(
        Epoch(EPOCH),
        STAGES[:1],
        credits=1,
        model=MODEL,
        task_timeout_s=LEASE_S,
    )
    assert not line.set_link(PEERS[0], True)
    sent = line.begin(step(), now=0.0)
    assert sent.task.route == ()
    assert isinstance(reply(line, sent.task.step, 0, [frame_of_token_ids([42])]), StepDone)


# ------------------------------------------------------------------ links that come and go


def test_a_link_that_comes_up_is_used_once_nothing_is_relayed_there() -> None:
    """A step handed on directly would overtake one on its way through the coordinator."""
    line = in_flight(links=(1,))
    first = line.begin(step(), now=0.0)
    line.set_link(PEERS[0], True)
    second = line.begin(step(), now=0.0)
    assert second.task.route == (False, True)
    finish(line, relayed(line, first, 0))
    assert line.begin(step(), now=0.0).task.route == (False, True)  # the second is relayed still
    line.abandon()
    assert line.begin(step(), now=0.0).task.route == (True, True)


def test_a_link_that_goes_down_is_used_no_longer() -> None:
    line = in_flight(links=(0, 1))
    line.set_link(PEERS[1], False)
    assert line.begin(step(), now=0.0).task.route == (True, False)


def test_a_broken_link_may_lose_steps() -> None:
    line = in_flight(links=(0,))
    line.begin(step(), now=0.0)
    assert not line.set_link(PEERS[1], False)  # it was down before
    assert not line.set_link(PEERS[0], True)
    assert not line.set_link(PEERS[2], False)  # there is no stage after it
    assert not line.set_link(STRANGER, False)
    assert line.set_link(PEERS[0], False)
    assert not line.set_link(PEERS[0], False)


def test_a_link_that_breaks_while_nothing_is_under_way_loses_nothing() -> None:
    line = in_flight(links=(0,))
    finish(line, line.begin(step(), now=0.0))
    assert not line.set_link(PEERS[0], False)


# ------------------------------------------------------------------ results nobody waits for


def test_an_earlier_stage_sends_its_result_again() -> None:
    line = in_flight()
    first = line.begin(step(), now=0.0)
    second = relayed(line, first, 0)
    assert run_stage(line, first.task, 0) == Dropped("late_result")
    relayed(line, second, 1)
    for stage in (0, 1):
        assert run_stage(line, first.task, stage) == Dropped("late_result")
    finish(line, first)
    assert run_stage(line, first.task, 2) == Dropped("late_result")


def test_a_step_that_was_never_sent() -> None:
    line = in_flight()
    line.begin(step(), now=0.0)
    for number in (0, 2):
        assert reply(line, number, 0, []) == Dropped("foreign_result")
        assert line.failed(PEERS[0], refusal(number)) == Dropped("foreign_result")
    assert line.num_steps == 1


@pytest.mark.parametrize("number", [1, 3])
def test_wrong_number_of_timings(number: int) -> None:
    line = in_flight()
    sent = line.begin(step(), now=0.0)
    result = TaskResult(
        epoch=Epoch(EPOCH), step=sent.task.step, timings=timings(number - 1), tensors=(ACTIVATIONS,)
    )
    frames = (bytes(ACTIVATIONS.nbytes),)
    assert line.result(PEERS[1], result, frames, now=0.0) == Dropped("foreign_result")
    assert line.num_steps == 1


def test_other_workers_and_other_epochs() -> None:
    line = in_flight()
    number = line.begin(step(), now=0.0).task.step
    for peer, epoch in ((STRANGER, EPOCH), (PEERS[0], EPOCH - 1), (PEERS[0], EPOCH + 1)):
        result = TaskResult(
            epoch=Epoch(epoch), step=number, timings=timings(0), tensors=(ACTIVATIONS,)
        )
        frames = (bytes(ACTIVATIONS.nbytes),)
        assert line.result(peer, result, frames, now=0.0) == Dropped("foreign_result")
        assert line.failed(peer, refusal(number, epoch)) == Dropped("foreign_result")
    assert line.num_steps == 1


# ------------------------------------------------------------------ broken steps


def broken(outcome: Outcome, line: StepsInFlight) -> str:
    """Return why the only step under way was broken."""
    assert isinstance(outcome, StepBroken)
    assert outcome.failure.code == "shape_mismatch"
    assert line.steps == []
    return outcome.failure.message


def test_refusal_breaks_the_step_alone() -> None:
    line = in_flight()
    one, two = step(), step()
    sent = line.begin(one, now=0.0)
    line.begin(two, now=0.0)
    said = refusal(sent.task.step)
    assert line.failed(PEERS[2], said) == StepBroken(one, said)
    assert line.failed(PEERS[2], said) == Dropped("late_result")
    assert line.steps == [two]


@pytest.mark.parametrize(
    "specs",
    [
        (),
        (TensorSpec("float32", (TOKENS, HIDDEN)),),
        (TensorSpec("bfloat16", (TOKENS - 1, HIDDEN)),),
        (TensorSpec("bfloat16", (TOKENS, HIDDEN + 1)),),
        (TensorSpec("bfloat16", (TOKENS * HIDDEN,)),),
        (ACTIVATIONS, ACTIVATIONS),
    ],
)
def test_wrong_activations_break_the_step(specs: tuple[TensorSpec, ...]) -> None:
    line = in_flight()
    sent = line.begin(step(), now=0.0)
    tensors = [(spec, bytes(spec.nbytes)) for spec in specs]
    why = broken(reply(line, sent.task.step, 0, tensors), line)
    assert "expected bfloat16[3, 4]" in why


@pytest.mark.parametrize(
    "specs",
    [(), (TensorSpec("int32", (2,)),), (TensorSpec("float32", (1,)),), (ACTIVATIONS,)],
)
def test_wrong_token_ids_break_the_step(specs: tuple[TensorSpec, ...]) -> None:
    line = in_flight()
    sent = line.begin(step(), now=0.0)
    tensors = [(spec, bytes(spec.nbytes)) for spec in specs]
    assert "expected int32[1]" in broken(reply(line, sent.task.step, 2, tensors), line)


def test_token_ids_that_nobody_asked_for_break_the_step() -> None:
    line = in_flight()
    sent = line.begin(step(samples=False), now=0.0)
    why = broken(reply(line, sent.task.step, 2, [frame_of_token_ids([1])]), line)
    assert "int32[1], expected none" in why


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_breaks_the_step(token: int) -> None:
    line = in_flight()
    sent = line.begin(step(), now=0.0)
    why = broken(reply(line, sent.task.step, 2, [frame_of_token_ids([token])]), line)
    assert why == f"token id {token} is not in the vocabulary"


@pytest.mark.parametrize("token", [0, VOCAB - 1])
def test_the_ends_of_the_vocabulary_are_in_it(token: int) -> None:
    line = in_flight()
    sent = line.begin(step(), now=0.0)
    done = reply(line, sent.task.step, 2, [frame_of_token_ids([token])])
    assert isinstance(done, StepDone)
    assert done.token_ids == [token]


# ------------------------------------------------------------------ log-probabilities


def test_each_answer_gets_the_log_probabilities_that_were_asked_for() -> None:
    """The last stage reports as many columns as the one that wants most."""
    line = in_flight()
    sent = line.begin(step(1, None, 3, 0), now=0.0)
    values = [-(row + column / 8) for row in range(4) for column in range(4)]
    ids = [10 * row + column for row in range(4) for column in range(4)]
    tensors = [ints([5, 6, 7, 8], (4,)), floats(values, (4, 4)), ints(ids, (4, 4))]
    done = reply(line, sent.task.step, 2, tensors)
    assert isinstance(done, StepDone)
    assert done.token_ids == [5, 6, 7, 8]
    assert done.logprobs == [
        TokenLogprobs(logprob=0.0, top=((1, -0.125),)),
        None,
        TokenLogprobs(logprob=-2.0, top=((21, -2.125), (22, -2.25), (23, -2.375))),
        TokenLogprobs(logprob=-3.0, top=()),
    ]


def test_only_answers_that_sample_count() -> None:
    line = in_flight()
    going = step(3, 1)
    waits = SequenceSlice(sequence_id=SequenceId(10), start=0, num_tokens=TOKENS)
    going = Step(going.answers, (waits, going.slices[1]), going.token_ids)
    sent = line.begin(going, now=0.0)
    tensors = [ints([5], (1,)), floats([-1.0, -0.5], (1, 2)), ints([5, 6], (1, 2))]
    done = reply(line, sent.task.step, 2, tensors)
    assert isinstance(done, StepDone)
    assert done.logprobs == [TokenLogprobs(logprob=-1.0, top=((6, -0.5),))]


@pytest.mark.parametrize(
    "tensors",
    [
        [ints([5], (1,))],
        [ints([5], (1,)), floats([-1.0], (1, 1)), ints([5], (1, 1))],
        [ints([5], (1,)), floats([-1.0, -1.0], (2,)), ints([5, 6], (2,))],
        [ints([5], (1,)), ints([5, 6], (1, 2)), floats([-1.0, -1.0], (1, 2))],
    ],
)
def test_log_probabilities_of_the_wrong_shape(tensors: list[tuple[TensorSpec, Frame]]) -> None:
    line = in_flight()
    sent = line.begin(step(1), now=0.0)
    why = broken(reply(line, sent.task.step, 2, tensors), line)
    assert "expected int32[1], float32[1, 2], int32[1, 2]" in why


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.5])
@pytest.mark.parametrize("column", [0, 1])
def test_log_probabilities_out_of_range(value: float, column: int) -> None:
    line = in_flight()
    sent = line.begin(step(1), now=0.0)
    values = [-1.0, -1.0]
    values[column] = value
    tensors = [ints([5], (1,)), floats(values, (1, 2)), ints([5, 6], (1, 2))]
    assert "out of range" in broken(reply(line, sent.task.step, 2, tensors), line)


def test_likeliest_tokens_outside_the_vocabulary() -> None:
    line = in_flight()
    sent = line.begin(step(1), now=0.0)
    tensors = [ints([5], (1,)), floats([-1.0, -1.0], (1, 2)), ints([5, VOCAB], (1, 2))]
    assert "vocabulary" in broken(reply(line, sent.task.step, 2, tensors), line)


# ------------------------------------------------------------------ steps that are abandoned


def test_abandoned_steps_are_void() -> None:
    line = in_flight()
    one, two = step(), step()
    old = [line.begin(one, now=0.0), line.begin(two, now=0.0)]
    assert old[1].task.oldest == 1
    assert line.abandon() == [one, two]
    assert line.steps == []
    assert line.next_deadline() is None
    new = line.begin(step(), now=0.0)
    assert (new.task.step, new.task.oldest) == (3, 3)
    for sent in old:
        for stage in range(3):
            assert run_stage(line, sent.task, stage) == Dropped("late_result")
        assert line.failed(PEERS[0], refusal(sent.task.step)) == Dropped("late_result")
    assert relayed(line, new, 0).task.oldest == 3


# ------------------------------------------------------------------ what stages free


def test_the_next_task_says_what_to_forget() -> None:
    line = in_flight()
    line.to_forget.release([SequenceId(3), SequenceId(1)])
    line.to_forget.drop({SequenceId(2): 64})
    first = line.begin(step(), now=0.0)
    assert first.task.released == (3, 1)
    assert first.task.seen_from == (SeenFrom(sequence_id=SequenceId(2), position=64),)
    assert line.begin(step(), now=0.0).task.released == ()
    finish(line, first)
    assert (line.to_forget.released, line.to_forget.seen_from) == ([], {})


def test_what_an_abandoned_task_freed_is_said_again() -> None:
    line = in_flight()
    line.to_forget.release([SequenceId(1), SequenceId(2)])
    line.begin(step(), now=0.0)
    line.to_forget.release([SequenceId(3)])
    line.abandon()
    assert set(line.to_forget.released) == {1, 2, 3}
    assert set(line.begin(step(), now=0.0).task.released) == {1, 2, 3}


def test_what_a_broken_task_freed_is_said_again() -> None:
    line = in_flight()
    line.to_forget.release([SequenceId(1)])
    refused = line.begin(step(), now=0.0)
    line.to_forget.release([SequenceId(2)])
    wrong = line.begin(step(), now=0.0)
    line.failed(PEERS[1], refusal(refused.task.step))
    assert line.to_forget.released == [1]
    reply(line, wrong.task.step, 0, [])
    assert line.to_forget.released == [1, 2]


def test_positions_that_a_broken_or_abandoned_task_dropped_are_said_again() -> None:
    line = in_flight()
    one, two = SequenceId(1), SequenceId(2)
    line.to_forget.drop({one: 192, two: 128})
    first = line.begin(step(), now=0.0)
    line.to_forget.drop({one: 256})
    line.failed(PEERS[1], refusal(first.task.step))
    assert line.to_forget.seen_from == {one: 256, two: 128}
    line.begin(step(), now=0.0)
    line.abandon()
    assert line.to_forget.seen_from == {one: 256, two: 128}


# ------------------------------------------------------------------ leases


def test_a_relayed_result_renews_the_lease() -> None:
    line = in_flight()
    sent = line.begin(step(), now=5.0)
    assert line.next_deadline() == 15.0
    relayed(line, sent, 0, now=9.0)
    assert line.next_deadline() == 19.0


def test_the_first_lease_to_run_out() -> None:
    line = in_flight(links=(0, 1))
    first = line.begin(step(), now=1.0)
    line.begin(step(), now=3.0)
    assert line.next_deadline() == 11.0
    finish(line, first)
    assert line.next_deadline() == 13.0


def test_progress_renews_the_lease() -> None:
    line = in_flight()
    line.begin(step(), now=0.0)
    line.progress(PEERS[0], 1.0, now=8.0)
    assert line.next_deadline() == 17.0
    line.progress(PEERS[0], 30.0, now=9.0)  # old news
    assert line.next_deadline() == 17.0
    line.progress(STRANGER, 0.0, now=9.0)
    assert line.next_deadline() == 17.0


def test_progress_of_a_stage_that_cannot_hold_the_step_counts_for_nothing() -> None:
    """The step went through the second stage's hands here: the first has no part in it."""
    line = in_flight()
    relayed(line, line.begin(step(), now=0.0), 0, now=0.0)
    line.progress(PEERS[0], 0.0, now=5.0)
    assert line.next_deadline() == 10.0
    line.progress(PEERS[1], 0.0, now=5.0)
    assert line.next_deadline() == 15.0
    line.progress(PEERS[2], 0.0, now=6.0)  # it may have been handed on
    assert line.next_deadline() == 16.0


def test_lease_that_runs_out_abandons_then_names_the_worker() -> None:
    line = in_flight(links=(0, 1))
    line.begin(step(), now=0.0)
    assert line.expire(now=9.999) is None
    assert line.expire(now=10.0) == "abandon"
    line.abandon()
    sent = line.begin(step(), now=10.0)
    assert sent.task.route == (False, False)
    relayed(line, sent, 0, now=12.0)
    assert line.expire(now=21.999) is None
    assert line.expire(now=22.0) == PEERS[1]


def test_the_oldest_late_step_names_the_worker() -> None:
    line = in_flight()
    line.begin(step(), now=0.0)
    assert line.expire(now=10.0) == "abandon"
    line.abandon()
    first, second = line.begin(step(), now=10.0), line.begin(step(), now=10.0)
    relayed(line, relayed(line, first, 0, now=11.0), 1, now=14.0)
    relayed(line, second, 0, now=11.0)
    assert line.expire(now=21.0) == PEERS[1]  # the other's lease runs on
    assert line.expire(now=24.0) == PEERS[2]


def test_a_step_that_ends_clears_the_workers_of_suspicion() -> None:
    line = in_flight(links=(0, 1))
    line.begin(step(), now=0.0)
    assert line.expire(now=10.0) == "abandon"
    line.abandon()
    sent = line.begin(step(), now=10.0)
    for stage in range(2):
        sent = relayed(line, sent, stage, now=10.0)
    finish(line, sent, now=10.0)
    line.begin(step(), now=10.0)
    assert line.expire(now=20.0) == "abandon"


def test_a_step_that_a_newer_one_comes_past_is_lost() -> None:
    """Whatever progress is made on others: on a route they keep their order."""
    line = in_flight(links=(0, 1))
    first, _, third = (line.begin(step(), now=0.0) for _ in range(3))
    finish(line, first)
    assert not line.has_overtaken
    finish(line, third)
    assert line.has_overtaken
    assert line.overtaken() == "abandon"
    assert len(line.abandon()) == 1
    assert not line.has_overtaken
    assert line.begin(step(), now=1.0).task.route == (False, False), "to see who has it next time"


def test_a_relayed_step_that_is_overtaken_names_the_worker() -> None:
    line = in_flight(links=(0, 1))
    line.begin(step(), now=0.0)
    finish(line, line.begin(step(), now=0.0))
    assert line.overtaken() == "abandon"
    line.abandon()
    first, second = (line.begin(step(), now=1.0) for _ in range(2))
    relayed(line, first, 0)
    assert not line.has_overtaken
    relayed(line, relayed(line, second, 0), 1)
    assert line.has_overtaken, "the second stage has let the second step pass"
    assert line.overtaken() == PEERS[1]


def test_a_step_that_has_gone_further_than_a_newer_one_is_not_lost() -> None:
    line = in_flight()
    first, second = (line.begin(step(), now=0.0) for _ in range(2))
    relayed(line, relayed(line, first, 0), 1)
    relayed(line, second, 0)
    assert not line.has_overtaken


def test_nothing_runs_out_while_nothing_is_under_way() -> None:
    line = in_flight()
    assert line.next_deadline() is None
    assert line.expire(now=1e6) is None


# ------------------------------------------------------------------ whatever comes


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    links=st.sets(st.integers(0, 1)),
    choices=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 99)), max_size=50),
)
def test_each_step_ends_once(links: set[int], choices: list[tuple[int, int]]) -> None:
    """Whatever is computed, refused, repeated or abandoned, of any task and by any stage."""
    line = in_flight(credits=3, links=links)
    sent: list[Task] = []
    open_steps: dict[int, Step] = {}
    for what, index in choices:
        task = sent[index % len(sent)] if sent else None
        if (what <= 4 or task is None) and line.num_steps < line.credits:
            going = step()
            begun = line.begin(going, now=0.0).task
            assert begun.step not in open_steps
            open_steps[begun.step] = going
            sent.append(begun)
        elif what <= 10 and task is not None:
            stage = index % 3
            outcome = run_stage(line, task, stage) if what <= 9 else None
            outcome = outcome or line.failed(PEERS[stage], refusal(task.step))
            if isinstance(outcome, SendTask):
                assert outcome.peer == PEERS[stage + 1]
                assert task.step in open_steps
            elif not isinstance(outcome, Dropped):
                assert outcome.step is open_steps.pop(task.step)
            else:
                assert outcome.reason == "late_result"
        elif what == 11:
            assert line.abandon() == list(open_steps.values())
            open_steps.clear()
        else:
            line.set_link(PEERS[index % 3], bool(index % 2))
        line.validate()
        assert line.steps == list(open_steps.values())
