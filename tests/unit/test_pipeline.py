"""Steps on their way: routes, leases, answers that nobody waits for, and wrong ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.messages import (
    MAX_RELEASED,
    SequenceSlice,
    StageTime,
    TaskFailed,
    TaskResult,
    TokenLogprobs,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.tensors import Frame, TensorSpec, frame_of_token_ids
from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.pipeline import (
    Dropped,
    Pipeline,
    SendTask,
    StepBroken,
    StepDone,
)
from distributed_llm.coordinator.requests import Request, Seat, Ticket
from distributed_llm.coordinator.scheduler import Step

HIDDEN = 4
VOCAB = 50
PEERS = [PeerId(b"a"), PeerId(b"b"), PeerId(b"c")]
STRANGER = PeerId(b"?")
EPOCH = 7
TIMEOUT_S = 10.0

Outcome = StepDone | SendTask | StepBroken | Dropped


def pipeline(stages: int = 3, *, credits: int = 4) -> Pipeline:
    seats = [
        Seat(peer, WorkerId(f"w{i}"), LayerRange(i, i + 1)) for i, peer in enumerate(PEERS[:stages])
    ]
    return Pipeline(
        EPOCH,
        seats,
        credits=credits,
        wire_dtype="bfloat16",
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        task_timeout_s=TIMEOUT_S,
    )


def step(tokens: int = 3, *, samples: bool = True, logprobs: Sequence[int | None] = ()) -> Step:
    """Return a step of one sequence, or of one per entry of `logprobs`."""
    requests, slices = [], []
    for number, asked in enumerate(logprobs or [None]):
        ticket = Ticket((PeerId(b"client"), f"r{number}", number), SamplingParams(), 0.0)
        sampling = Sampling(logprobs=asked)
        requests.append(Request(ticket, number, 0, [1] * tokens, tokens, sampling))
        part = SequenceSlice(sequence_id=number, start=0, num_tokens=tokens, sample=samples)
        slices.append(part)
    return Step(tuple(requests), tuple(slices), tuple(range(len(slices) * tokens)))


def begin(line: Pipeline, going: Step | None = None, *, now: float = 0.0) -> SendTask:
    send = line.begin(going or step(), now=now)
    line.validate()
    return send


def times(count: int) -> tuple[StageTime, ...]:
    return tuple(StageTime(compute_us=100 * (i + 1), queued_us=i) for i in range(count))


def activations(tokens: int = 3) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
    spec = TensorSpec("bfloat16", (tokens, HIDDEN))
    return (spec,), (bytes(range(spec.nbytes)),)


def token_ids(*ids: int) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
    spec, frame = frame_of_token_ids(ids)
    return (spec,), (frame,)


def answer(
    line: Pipeline,
    number: int,
    stage: int,
    tensors: tuple[tuple[TensorSpec, ...], tuple[Frame, ...]] | None = None,
    *,
    now: float = 0.0,
    **changes: Any,
) -> Outcome:
    """Give the right answer of a stage to a step, or one with some fields changed."""
    last = stage == len(line.seats) - 1
    specs, frames = tensors or (token_ids(42) if last else activations())
    fields = {"epoch": EPOCH, "step": number, "timings": times(stage + 1), "tensors": specs}
    peer = changes.pop("peer", PEERS[stage])
    outcome = line.result(peer, TaskResult(**{**fields, **changes}), frames, now=now)
    line.validate()
    return outcome


def refusal(number: int, **changes: Any) -> TaskFailed:
    fields = {"epoch": EPOCH, "step": number, "code": "stage_error", "message": "no"}
    return TaskFailed(**{**fields, **changes})


# ------------------------------------------------------------------ the way through


def test_the_first_task() -> None:
    line = pipeline()
    going = step()
    send = begin(line, going)
    task = send.task
    assert send.peer == PEERS[0]
    assert (task.epoch, task.step, task.oldest) == (EPOCH, 1, 1)
    assert task.sequences == going.slices
    assert task.tensors == (TensorSpec("int32", (3,)),)
    assert send.frames == (frame_of_token_ids([0, 1, 2])[1],)
    assert (task.timings, task.released) == ((), ())
    assert line.steps == [going]
    assert line.num_steps == 1


def test_relayed_from_stage_to_stage() -> None:
    line = pipeline()
    going = step()
    first = begin(line, going)
    assert first.task.route == (False, False)
    second = answer(line, 1, 0)
    assert isinstance(second, SendTask)
    assert second.peer == PEERS[1]
    assert second.task.tensors == (TensorSpec("int32", (3,)), TensorSpec("bfloat16", (3, HIDDEN)))
    assert second.frames == (first.frames[0], activations()[1][0])
    assert second.task.sequences == going.slices
    assert (second.task.route, second.task.timings) == ((False,), times(1))
    third = answer(line, 1, 1)
    assert isinstance(third, SendTask)
    assert third.peer == PEERS[2]
    assert (third.task.route, third.task.timings) == ((), times(2))
    done = answer(line, 1, 2, now=2.5)
    assert done == StepDone(going, [42], [None], times(3), depth=1, round_trip_s=2.5)
    assert line.steps == []
    assert line.next_deadline() is None


def test_handed_on_by_the_stages_themselves() -> None:
    line = pipeline()
    assert not line.set_link(PEERS[0], True)
    assert not line.set_link(PEERS[1], True)
    assert begin(line).task.route == (True, True)
    assert isinstance(answer(line, 1, 2), StepDone)


@pytest.mark.parametrize("linked", [0, 1])
def test_relayed_only_where_there_is_no_link(linked: int) -> None:
    line = pipeline()
    line.set_link(PEERS[linked], True)
    assert begin(line).task.route == (linked == 0, linked == 1)
    stage = 1 - linked
    relayed = answer(line, 1, stage)
    assert isinstance(relayed, SendTask)
    assert relayed.peer == PEERS[stage + 1]
    assert relayed.task.route == ((True,) if stage == 0 else ())
    assert relayed.task.timings == times(stage + 1)
    assert isinstance(answer(line, 1, 2), StepDone)


def test_what_a_stage_could_not_hand_on_is_relayed() -> None:
    """The link broke before the coordinator heard of it."""
    line = pipeline()
    line.set_link(PEERS[0], True)
    line.set_link(PEERS[1], True)
    begin(line)
    relayed = answer(line, 1, 0)
    assert isinstance(relayed, SendTask)
    assert (relayed.peer, relayed.task.route) == (PEERS[1], (True,))


def test_a_link_is_not_used_before_those_that_are_relayed_have_passed() -> None:
    """A step that is handed on directly would overtake one that goes through the coordinator."""
    line = pipeline()
    begin(line)
    line.set_link(PEERS[0], True)
    line.set_link(PEERS[1], True)
    assert begin(line).task.route == (False, False)
    relayed = answer(line, 1, 0)
    assert isinstance(relayed, SendTask)
    assert relayed.task.route == (False,)
    for number in (1, 2):
        for stage in (1, 2) if number == 1 else (0, 1, 2):
            answer(line, number, stage)
    assert begin(line).task.route == (True, True)


def test_links_that_matter() -> None:
    line = pipeline()
    assert not line.set_link(PEERS[0], False)
    line.set_link(PEERS[0], True)
    assert not line.set_link(PEERS[0], False), "nothing is under way"
    line.set_link(PEERS[0], True)
    begin(line)
    assert not line.set_link(PEERS[0], True)
    assert not line.set_link(PEERS[1], False), "it was not up"
    assert not line.set_link(PEERS[2], True), "after the last stage there is none"
    assert not line.set_link(STRANGER, True)
    assert line.set_link(PEERS[0], False)
    line.abandon()
    assert begin(line).task.route == (False, False)


def test_one_stage() -> None:
    line = pipeline(stages=1)
    assert begin(line).task.route == ()
    assert not line.set_link(PEERS[0], True)
    assert isinstance(answer(line, 1, 0), StepDone)


def test_several_steps_under_way() -> None:
    line = pipeline()
    steps = [step(tokens) for tokens in (1, 2, 3)]
    sends = [begin(line, going, now=float(i)) for i, going in enumerate(steps)]
    assert [send.task.step for send in sends] == [1, 2, 3]
    assert line.steps == steps
    for number, going in enumerate(steps, 1):
        tokens = len(going.token_ids)
        answer(line, number, 0, activations(tokens))
        answer(line, number, 1, activations(tokens))
        done = answer(line, number, 2, now=10.0)
        assert isinstance(done, StepDone)
        assert (done.step, done.depth) == (going, number)
        assert done.round_trip_s == 10.0 - (number - 1)


# ------------------------------------------------------------------ sequences to free


def test_the_next_task_says_what_is_to_be_freed() -> None:
    line = pipeline()
    line.release([3, 5])
    line.release([5, 4])
    assert line.to_release == [3, 5, 4]
    assert begin(line).task.released == (3, 5, 4)
    relayed = answer(line, 1, 0)
    assert isinstance(relayed, SendTask)
    assert relayed.task.released == (3, 5, 4), "every stage is told"
    assert line.to_release == []
    assert begin(line).task.released == ()


def test_no_more_than_a_message_holds() -> None:
    line = pipeline()
    line.release(range(MAX_RELEASED + 2))
    assert begin(line).task.released == tuple(range(MAX_RELEASED))
    assert begin(line).task.released == (MAX_RELEASED, MAX_RELEASED + 1)


def test_what_some_stages_may_not_have_heard_is_said_again() -> None:
    line = pipeline()
    line.release([1, 2])
    begin(line)
    line.release([3])
    begin(line)
    line.failed(PEERS[0], refusal(1))
    assert line.to_release == [1, 2]
    line.abandon()
    assert line.to_release == [1, 2, 3]
    assert begin(line).task.released == (1, 2, 3)
    for stage in range(3):
        answer(line, 3, stage)
    line.abandon()
    assert line.to_release == []


# ------------------------------------------------------------------ giving up


def test_abandoned_steps_are_void_for_stages_and_their_answers_dropped() -> None:
    line = pipeline()
    steps = [step(), step()]
    for going in steps:
        begin(line, going)
    assert line.abandon() == steps
    assert (line.num_steps, line.next_deadline()) == (0, None)
    for number in (1, 2):
        for stage in range(3):
            assert answer(line, number, stage) == Dropped("late_result")
        assert line.failed(PEERS[0], refusal(number)) == Dropped("late_result")
    task = begin(line).task
    assert (task.step, task.oldest) == (3, 3)
    assert begin(line).task.oldest == 3
    assert len(line.abandon()) == 2
    assert begin(line).task.oldest == 5


def test_oldest_stays_while_nothing_is_abandoned() -> None:
    line = pipeline()
    for number in (1, 2, 3):
        assert begin(line).task.oldest == 1
        for stage in range(3):
            answer(line, number, stage)


def test_relayed_tasks_say_what_is_abandoned_too() -> None:
    line = pipeline()
    begin(line)
    line.abandon()
    begin(line)
    relayed = answer(line, 2, 0)
    assert isinstance(relayed, SendTask)
    assert relayed.task.oldest == 2


# ------------------------------------------------------------------ answers nobody waits for


def test_answers_of_others() -> None:
    line = pipeline()
    begin(line)
    assert answer(line, 1, 0, peer=STRANGER) == Dropped("foreign_result")
    assert answer(line, 1, 0, epoch=EPOCH - 1) == Dropped("foreign_result")
    assert answer(line, 1, 0, epoch=EPOCH + 1) == Dropped("foreign_result")
    assert answer(line, 9, 0) == Dropped("late_result")
    assert answer(line, 1, 0, timings=times(2)) == Dropped("foreign_result")
    assert answer(line, 1, 2, timings=times(2)) == Dropped("foreign_result")
    assert line.num_steps == 1
    assert isinstance(answer(line, 1, 0), SendTask)


def test_repeated_answers_move_nothing_twice() -> None:
    line = pipeline()
    begin(line)
    assert isinstance(answer(line, 1, 0), SendTask)
    assert answer(line, 1, 0) == Dropped("late_result")
    assert isinstance(answer(line, 1, 1), SendTask)
    assert answer(line, 1, 0) == Dropped("late_result")
    assert isinstance(answer(line, 1, 2), StepDone)
    for stage in range(3):
        assert answer(line, 1, stage) == Dropped("late_result")


def test_refusals() -> None:
    line = pipeline()
    going = step()
    begin(line, going)
    for peer, said, reason in (
        (STRANGER, refusal(1), "foreign_result"),
        (PEERS[0], refusal(1, epoch=EPOCH + 1), "foreign_result"),
        (PEERS[0], refusal(2), "late_result"),
    ):
        assert line.failed(peer, said) == Dropped(reason)
    said = refusal(1)
    assert line.failed(PEERS[1], said) == StepBroken(going, said)
    assert line.num_steps == 0
    assert line.failed(PEERS[1], said) == Dropped("late_result")


# ------------------------------------------------------------------ wrong answers


@pytest.mark.parametrize(
    "specs",
    [
        (),
        (TensorSpec("bfloat16", (2, HIDDEN)),),
        (TensorSpec("bfloat16", (3, HIDDEN + 1)),),
        (TensorSpec("bfloat16", (3 * HIDDEN,)),),
        (TensorSpec("float16", (3, HIDDEN)),),
        (TensorSpec("bfloat16", (3, HIDDEN)), TensorSpec("int32", (1,))),
    ],
)
def test_wrong_activations_break_the_step(specs: tuple[TensorSpec, ...]) -> None:
    line = pipeline()
    going = step()
    begin(line, going)
    broken = answer(line, 1, 0, (specs, tuple(bytes(spec.nbytes) for spec in specs)))
    assert isinstance(broken, StepBroken)
    assert broken.step is going
    assert (broken.failure.code, broken.failure.step) == ("shape_mismatch", 1)
    assert "expected bfloat16[3, 4]" in broken.failure.message
    assert line.num_steps == 0


@pytest.mark.parametrize(
    "specs",
    [(), (TensorSpec("int32", (2,)),), (TensorSpec("float32", (1,)),)],
)
def test_wrong_token_ids_break_the_step(specs: tuple[TensorSpec, ...]) -> None:
    line = pipeline()
    begin(line)
    broken = answer(line, 1, 2, (specs, tuple(bytes(spec.nbytes) for spec in specs)))
    assert isinstance(broken, StepBroken)
    assert "expected int32[1]" in broken.failure.message


@pytest.mark.parametrize(("token", "known"), [(-1, False), (VOCAB, False), (VOCAB - 1, True)])
def test_a_token_outside_the_vocabulary_breaks_the_step(token: int, known: bool) -> None:
    line = pipeline()
    begin(line)
    outcome = answer(line, 1, 2, token_ids(token))
    assert isinstance(outcome, StepDone if known else StepBroken)


def test_a_step_that_samples_nothing() -> None:
    line = pipeline()
    begin(line, step(samples=False))
    begin(line, step(samples=False, logprobs=[3]))
    done = answer(line, 1, 2, ((), ()))
    assert isinstance(done, StepDone)
    assert (done.token_ids, done.logprobs) == ([], [])
    assert isinstance(answer(line, 2, 2, ((), ())), StepDone)
    begin(line, step(samples=False))
    assert isinstance(answer(line, 3, 2, token_ids(1)), StepBroken)


# ------------------------------------------------------------------ log-probabilities


def with_logprobs(
    ids: Sequence[int], values: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]
) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
    specs, frames = token_ids(*ids)
    shape = np.shape(values)
    return (
        (*specs, TensorSpec("float32", shape), TensorSpec("int32", shape)),
        (
            *frames,
            np.asarray(values, dtype="<f4").tobytes(),
            np.asarray(tokens, dtype="<i4").tobytes(),
        ),
    )


def test_each_gets_as_many_as_it_asked_for() -> None:
    line = pipeline()
    begin(line, step(logprobs=[None, 2, 0, 1]))
    values = [[-1.0, -0.5, -2.0], [-1.5, -0.25, -0.75], [-3.0, -4.0, -5.0], [-6.0, -0.125, -9.0]]
    tokens = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    done = answer(line, 1, 2, with_logprobs([1, 4, 7, 10], values, tokens))
    assert isinstance(done, StepDone)
    assert done.token_ids == [1, 4, 7, 10]
    assert done.logprobs == [
        None,
        TokenLogprobs(logprob=-1.5, top=((5, -0.25), (6, -0.75))),
        TokenLogprobs(logprob=-3.0),
        TokenLogprobs(logprob=-6.0, top=((11, -0.125),)),
    ]


def test_only_those_that_sample_count() -> None:
    line = pipeline()
    going = step(logprobs=[20, 1])
    parts = list(going.slices)
    parts[0] = SequenceSlice(sequence_id=0, start=0, num_tokens=3)
    begin(line, Step(going.requests, tuple(parts), going.token_ids))
    done = answer(line, 1, 2, with_logprobs([4], [[-1.5, -0.25]], [[4, 5]]))
    assert isinstance(done, StepDone)
    assert done.logprobs == [TokenLogprobs(logprob=-1.5, top=((5, -0.25),))]


@pytest.mark.parametrize(
    ("value", "right"),
    [(0.0, True), (0.0009, True), (-1e8, True), (0.01, False), (-np.inf, False), (np.nan, False)],
)
def test_values_out_of_range_break_the_step(value: float, right: bool) -> None:
    line = pipeline()
    begin(line, step(logprobs=[1]))
    outcome = answer(line, 1, 2, with_logprobs([4], [[-1.5, value]], [[4, 5]]))
    assert isinstance(outcome, StepDone if right else StepBroken)


def test_tokens_outside_the_vocabulary_break_the_step() -> None:
    line = pipeline()
    begin(line, step(logprobs=[1]))
    broken = answer(line, 1, 2, with_logprobs([4], [[-1.5, -1.0]], [[4, VOCAB]]))
    assert isinstance(broken, StepBroken)
    assert f"token id {VOCAB} " in broken.failure.message


def test_missing_or_uncalled_for_log_probabilities_break_the_step() -> None:
    line = pipeline()
    begin(line, step(logprobs=[1]))
    broken = answer(line, 1, 2)
    assert isinstance(broken, StepBroken)
    assert "float32[1, 2]" in broken.failure.message
    begin(line)
    assert isinstance(answer(line, 2, 2, with_logprobs([4], [[-1.5, -1.0]], [[4, 5]])), StepBroken)
    begin(line, step(logprobs=[2]))
    assert isinstance(answer(line, 3, 2, with_logprobs([4], [[-1.5, -1.0]], [[4, 5]])), StepBroken)


# ------------------------------------------------------------------ leases


def test_a_lease_runs_from_the_beginning() -> None:
    line = pipeline()
    begin(line, now=5.0)
    begin(line, now=6.0)
    assert line.next_deadline() == 15.0
    assert line.expired(now=14.999) is None
    assert line.expired(now=15.0) == "abandon"


def test_an_answer_renews_the_lease_of_its_step() -> None:
    line = pipeline()
    begin(line, now=0.0)
    begin(line, now=1.0)
    answer(line, 1, 0, now=9.0)
    assert line.next_deadline() == 11.0
    assert line.expired(now=11.0) == "abandon"


def test_progress_renews_leases_of_what_a_stage_may_hold() -> None:
    line = pipeline()
    begin(line, now=0.0)
    answer(line, 1, 0, now=0.0)  # it is at the second stage, or beyond
    line.progress(PEERS[0], 0.0, now=8.0)
    line.progress(STRANGER, 0.0, now=8.0)
    assert line.next_deadline() == 10.0
    line.progress(PEERS[1], 1.0, now=8.0)
    assert line.next_deadline() == 17.0
    line.progress(PEERS[2], 0.0, now=8.0)
    assert line.next_deadline() == 18.0
    line.progress(PEERS[2], 30.0, now=9.0)  # old news
    assert line.next_deadline() == 18.0


def test_after_a_lease_ran_out_steps_are_relayed_to_know_where_they_are() -> None:
    line = pipeline()
    line.set_link(PEERS[0], True)
    line.set_link(PEERS[1], True)
    assert begin(line, now=0.0).task.route == (True, True)
    assert line.expired(now=10.0) == "abandon"
    line.abandon()
    assert begin(line, now=10.0).task.route == (False, False)
    relayed = answer(line, 2, 0, now=11.0)
    assert isinstance(relayed, SendTask)
    assert relayed.task.route == (False,)
    for stage in (1, 2):
        answer(line, 2, stage, now=12.0)
    assert begin(line, now=12.0).task.route == (True, True), "it was nothing that lasts"
    assert line.expired(now=22.0) == "abandon"


@pytest.mark.parametrize("stuck", [0, 1, 2])
def test_the_worker_that_holds_a_step_too_long_twice_is_given_up(stuck: int) -> None:
    line = pipeline()
    begin(line, now=0.0)
    assert line.expired(now=10.0) == "abandon"
    line.abandon()
    begin(line, now=10.0)
    for stage in range(stuck):
        answer(line, 2, stage, now=11.0)
    assert line.expired(now=19.0) is None
    assert line.expired(now=21.0) == PEERS[stuck]


def test_the_oldest_late_step_tells_who() -> None:
    """Those behind it wait in the same queue."""
    line = pipeline()
    begin(line, now=0.0)
    line.expired(now=10.0)
    line.abandon()
    begin(line, now=10.0)
    begin(line, now=10.0)
    answer(line, 2, 0, now=10.0)
    assert line.expired(now=20.0) == PEERS[1]


# ------------------------------------------------------------------ whatever is answered


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    choices=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 99), st.integers(0, 2)), max_size=60
    )
)
def test_every_step_ends_once(choices: list[tuple[int, int, int]]) -> None:
    """Answers come in any order, repeated, late and from any stage; links go up and down."""
    line = pipeline(credits=5)
    begun, ended, at = 0, set[int](), dict[int, int]()
    for what, index, stage in choices:
        if what <= 2 and line.num_steps < line.credits:
            begun += 1
            assert begin(line).task.step == begun
            at[begun] = 0
        elif what <= 7:
            number = 1 + index % (begun + 1)
            waited_for = number in at and at[number] <= stage
            outcome = answer(line, number, stage)
            if isinstance(outcome, StepDone):
                assert number not in ended
                ended.add(number)
                del at[number]
            elif isinstance(outcome, SendTask):
                at[number] = stage + 1
            assert isinstance(outcome, Dropped) != waited_for
        elif what == 8:
            line.set_link(PEERS[stage], index % 2 == 0)
        else:
            ended |= at.keys()
            assert len(line.abandon()) == len(at)
            at.clear()
        assert line.num_steps == len(at)
        line.validate()
