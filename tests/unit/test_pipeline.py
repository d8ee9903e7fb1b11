"""Steps on their way: credits, leases, and answers that nobody waits for."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.messages import SequenceSlice, TaskFailed, TaskResult
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.tensors import Frame, TensorSpec, frame_of_token_ids
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.coordinator.pipeline import (
    Dropped,
    Pipeline,
    SendTask,
    StepBroken,
    StepDone,
)
from distributed_llm.coordinator.requests import Request
from distributed_llm.coordinator.scheduler import Step

HIDDEN = 4
VOCAB = 50
PEERS = [PeerId(b"a"), PeerId(b"b"), PeerId(b"c")]
EPOCH = 7

Outcome = StepDone | StepBroken | Dropped | None


def pipeline(credits: int = 2, first_step: int = 0) -> Pipeline:
    stages = [(peer, LayerRange(i, i + 1), credits) for i, peer in enumerate(PEERS)]
    return Pipeline(
        EPOCH,
        stages,
        dtype="float32",
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        first_step=first_step,
        task_timeout_s=10.0,
    )


def step(number: int = 0, tokens: int = 3, *, samples: bool = True) -> Step:
    key = (PeerId(b"client"), f"r{number}", number)
    request = Request(key, number, SamplingParams(), arrived_at=0.0)
    part = SequenceSlice(
        sequence_id=number,
        start=0,
        num_tokens=tokens,
        sampling=Sampling() if samples else None,
    )
    return Step((request,), (part,), tuple(range(tokens)))


def answer(send: SendTask, *, tokens: int = 3, **changes: object) -> tuple[TaskResult, list[Frame]]:
    """Return a stage's right answer to a task, with some fields changed."""
    shape = (tokens, HIDDEN)
    spec = TensorSpec("float32", shape)
    frame: Frame = bytes([send.task.step % 256]) * spec.nbytes
    if send.peer == PEERS[-1]:
        spec, frame = frame_of_token_ids([42])
    fields: dict[str, object] = {
        "epoch": EPOCH,
        "step": send.task.step,
        "attempt": send.task.attempt,
        "credits": 1,
        "compute_s": 0.1,
        "queued_s": 0.0,
        "tensors": (spec,),
    }
    result = TaskResult(**{**fields, **changes})  # type: ignore[arg-type]
    return result, [frame] if result.tensors else []


def give(
    line: Pipeline, send: SendTask, *, now: float = 0.0, **changes: object
) -> tuple[list[SendTask], Outcome]:
    """Give the pipeline an answer to a task."""
    result, frames = answer(send, **changes)  # type: ignore[arg-type]
    outcome = line.result(send.peer, result, tuple(frames), now=now)
    line.validate()
    return outcome


def credits(line: Pipeline) -> list[int]:
    return [stage.credits for stage in line._stages]


def refusal(send: SendTask, **changes: object) -> TaskFailed:
    fields: dict[str, object] = {
        "epoch": EPOCH,
        "step": send.task.step,
        "attempt": send.task.attempt,
        "credits": 1,
        "code": "stage_error",
        "message": "no",
    }
    return TaskFailed(**{**fields, **changes})  # type: ignore[arg-type]


# ------------------------------------------------------------------ the way through


def test_step_goes_from_stage_to_stage() -> None:
    line = pipeline(first_step=30)
    going = step()
    (first,) = line.begin(going, now=1.0)
    assert (first.peer, first.task.step, first.task.attempt, first.task.epoch) == (
        PEERS[0],
        30,
        0,
        EPOCH,
    )
    assert first.task.sequences == going.slices
    assert first.task.tensors == (TensorSpec("int32", (3,)),)
    (second,), outcome = give(line, first)
    assert outcome is None
    assert second.peer == PEERS[1]
    assert second.task.tensors == (TensorSpec("int32", (3,)), TensorSpec("float32", (3, HIDDEN)))
    assert second.frames[0] == first.frames[0]
    (third,), _ = give(line, second)
    assert third.peer == PEERS[2]
    assert line.steps == [going]
    sends, done = give(line, third)
    assert sends == []
    assert done == StepDone(going, [42])
    assert line.steps == []
    assert line.next_deadline() is None
    assert line.next_step == 31


def test_step_that_samples_nothing() -> None:
    line = pipeline()
    (send,) = line.begin(step(samples=False), now=0.0)
    (send,), _ = give(line, send)
    (send,), _ = give(line, send)
    _, done = give(line, send, tensors=())
    assert isinstance(done, StepDone)
    assert done.token_ids == []


# ------------------------------------------------------------------ credits


def test_tasks_wait_for_credits() -> None:
    line = pipeline(credits=2)
    sends = [send for n in range(4) for send in line.begin(step(n), now=0.0)]
    assert [s.task.step for s in sends] == [0, 1]
    line.validate()
    more, _ = give(line, sends[0])
    assert [(s.peer, s.task.step) for s in more] == [(PEERS[0], 2), (PEERS[1], 0)]


def test_refusal_grants_credits_too() -> None:
    line = pipeline(credits=1)
    (send,) = line.begin(step(0), now=0.0)
    assert line.begin(step(1), now=0.0) == []
    (more,), outcome = line.failed(send.peer, refusal(send), now=0.0)
    assert isinstance(outcome, StepBroken)
    assert more.task.step == 1


def test_answer_without_credits_grants_none() -> None:
    line = pipeline(credits=1)
    (send,) = line.begin(step(0), now=0.0)
    line.begin(step(1), now=0.0)
    sends, _ = give(line, send, credits=0)
    assert [s.peer for s in sends] == [PEERS[1]]


def test_credits_have_a_ceiling() -> None:
    line = pipeline(credits=2)
    (send,) = line.begin(step(), now=0.0)
    give(line, send, credits=64)
    assert credits(line) == [64, 1, 2]
    line.validate()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    choices=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=60),
    granted=st.integers(1, 3),
)
def test_no_stage_has_more_tasks_than_credits(choices: list[tuple[int, int]], granted: int) -> None:
    """Whatever is answered, refused, repeated or sent again, in whatever order."""
    line = pipeline(credits=granted)
    sent: list[SendTask] = []
    numbers = itertools.count()
    now = 0.0
    for what, index in choices:
        new: list[SendTask] = []
        if what <= 3 or not sent:
            new = line.begin(step(next(numbers)), now=now)
        elif what <= 7:  # of any task ever sent: most are late
            send = sent[index % len(sent)]
            new, _ = give(line, send, now=now)
        elif what == 8:
            send = sent[index % len(sent)]
            new, _ = line.failed(send.peer, refusal(send), now=now)
        else:
            now += 10.0
            new, _ = line.on_timer(now=now)
        line.validate()
        sent += new
        for i, peer in enumerate(PEERS):
            assert len(line.steps_at(peer)) + credits(line)[i] == granted


# ------------------------------------------------------------------ leases


def test_lease_runs_out_and_the_task_is_sent_once_more() -> None:
    line = pipeline()
    (send,) = line.begin(step(), now=5.0)
    assert line.next_deadline() == 15.0
    assert line.on_timer(now=14.999) == ([], [])
    (again,), given_up = line.on_timer(now=15.0)
    assert given_up == []
    assert again.task.attempt == 1
    assert (again.peer, again.frames) == (send.peer, send.frames)
    assert again.task.sequences == send.task.sequences
    assert line.next_deadline() == 25.0
    assert line.on_timer(now=25.0) == ([], [PEERS[0]])


def test_every_stage_gets_two_attempts() -> None:
    line = pipeline()
    (send,) = line.begin(step(), now=0.0)
    (again,), _ = line.on_timer(now=10.0)
    (second,), _ = give(line, again, now=11.0)
    assert second.task.attempt == 0
    assert line.next_deadline() == 21.0
    (second,), given_up = line.on_timer(now=21.0)
    assert (second.task.attempt, given_up) == (1, [])
    assert send.task.step == second.task.step


@pytest.mark.parametrize("answered", [0, 1])
def test_either_attempt_may_answer(answered: int) -> None:
    line = pipeline()
    (first,) = line.begin(step(), now=0.0)
    (again,), _ = line.on_timer(now=10.0)
    attempts = [first, again]
    (second,), outcome = give(line, attempts[answered])
    assert (outcome, second.peer) == (None, PEERS[1])
    sends, outcome = give(line, attempts[1 - answered])
    assert (sends, outcome) == ([], Dropped("late_result"))
    assert credits(line) == [2, 1, 2]


def test_progress_extends_the_lease() -> None:
    line = pipeline()
    line.begin(step(), now=0.0)
    line.progress(PEERS[0], 1.0, now=8.0)
    assert line.next_deadline() == 17.0
    line.progress(PEERS[0], 30.0, now=9.0)  # old news
    assert line.next_deadline() == 17.0
    line.progress(PEERS[1], 0.0, now=9.0)  # of another stage
    assert line.next_deadline() == 17.0
    line.progress(PeerId(b"?"), 0.0, now=9.0)
    assert line.next_deadline() == 17.0


def test_task_that_waits_has_no_lease() -> None:
    line = pipeline(credits=0)
    assert line.begin(step(), now=0.0) == []
    assert line.next_deadline() is None
    assert line.steps_at(PEERS[0]) == []
    line.progress(PEERS[0], 0.0, now=1.0)
    assert line.next_deadline() is None
    line.validate()


def test_steps_at_a_worker() -> None:
    line = pipeline()
    one, two = step(0), step(1)
    (send,) = line.begin(one, now=0.0)
    line.begin(two, now=0.0)
    assert line.steps_at(PEERS[0]) == [one, two]
    give(line, send)
    assert line.steps_at(PEERS[0]) == [two]
    assert line.steps_at(PEERS[1]) == [one]
    assert line.steps_at(PeerId(b"?")) == []


# ------------------------------------------------------------------ answers nobody waits for


def test_repeated_answer_moves_nothing_twice() -> None:
    line = pipeline()
    (send,) = line.begin(step(), now=0.0)
    give(line, send)
    before = credits(line)
    assert give(line, send) == ([], Dropped("late_result"))
    assert credits(line) == before
    assert len(line.steps) == 1


def test_repeated_last_answer_ends_nothing_twice() -> None:
    line = pipeline()
    (send,) = line.begin(step(), now=0.0)
    for _ in range(2):
        (send,), _ = give(line, send)
    assert isinstance(give(line, send)[1], StepDone)
    assert give(line, send) == ([], Dropped("late_result"))
    assert credits(line) == [2, 2, 2]


def test_answers_of_others() -> None:
    line = pipeline()
    (send,) = line.begin(step(), now=0.0)
    result, frames = answer(send)
    for peer in (PEERS[1], PEERS[2]):  # not at this stage yet
        sends, outcome = line.result(peer, result, tuple(frames), now=0.0)
        assert (sends, outcome) == ([], Dropped("late_result"))
    sends, outcome = line.result(PeerId(b"?"), result, tuple(frames), now=0.0)
    assert (sends, outcome) == ([], Dropped("foreign_result"))
    assert give(line, send, epoch=EPOCH - 1) == ([], Dropped("foreign_result"))
    assert give(line, send, step=99) == ([], Dropped("late_result"))
    assert credits(line) == [1, 2, 2]
    assert line.steps_at(PEERS[0])


def test_refusals_of_others() -> None:
    line = pipeline()
    (send,) = line.begin(step(), now=0.0)
    for peer, changes, reason in (
        (PeerId(b"?"), {}, "foreign_result"),
        (PEERS[0], {"epoch": EPOCH + 1}, "foreign_result"),
        (PEERS[1], {}, "late_result"),
        (PEERS[0], {"step": 5}, "late_result"),
    ):
        assert line.failed(peer, refusal(send, **changes), now=0.0) == ([], Dropped(reason))
    assert line.steps


# ------------------------------------------------------------------ broken steps


def test_refusal_breaks_the_step() -> None:
    line = pipeline()
    going = step()
    (send,) = line.begin(going, now=0.0)
    said = refusal(send)
    assert line.failed(PEERS[0], said, now=0.0) == ([], StepBroken(going, said))
    assert line.steps == []
    line.validate()


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (TensorSpec("float32", (2, HIDDEN)),),
        (TensorSpec("float32", (3, HIDDEN + 1)),),
        (TensorSpec("float32", (3 * HIDDEN,)),),
        (TensorSpec("float32", (3, HIDDEN)), TensorSpec("int32", (1,))),
    ],
)
def test_activations_of_the_wrong_shape_break_the_step(tensors: tuple[TensorSpec, ...]) -> None:
    line = pipeline()
    (send,) = line.begin(step(), now=0.0)
    sends, outcome = give(line, send, tensors=tensors)
    assert sends == []
    assert isinstance(outcome, StepBroken)
    assert outcome.failure.code == "shape_mismatch"
    assert "expected float32[3, 4]" in outcome.failure.message
    assert line.steps == []
    assert credits(line) == [2, 2, 2]


@pytest.mark.parametrize(
    "tensors",
    [(), (TensorSpec("int32", (2,)),), (TensorSpec("float32", (1,)),)],
)
def test_wrong_token_ids_break_the_step(tensors: tuple[TensorSpec, ...]) -> None:
    line = pipeline()
    (send,) = line.begin(step(), now=0.0)
    (send,), _ = give(line, send)
    (send,), _ = give(line, send)
    sends, outcome = give(line, send, tensors=tensors)
    assert sends == []
    assert isinstance(outcome, StepBroken)
    assert "expected 1" in outcome.failure.message


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_breaks_the_step(token: int) -> None:
    line = pipeline()
    (task,) = line.begin(step(), now=0.0)
    for peer in PEERS[:2]:
        result, frames = answer(task)
        (task,), _ = line.result(peer, result, tuple(frames), now=0.0)
    result, frames = answer(task, tensors=(TensorSpec("int32", (1,)),))
    _, broken = line.result(PEERS[2], result, (frame_of_token_ids([token])[1],), now=0.0)
    assert isinstance(broken, StepBroken)
    assert "vocabulary" in broken.failure.message


def test_activations_of_another_dtype_break_the_step() -> None:
    line = pipeline()
    (task,) = line.begin(step(), now=0.0)
    result, frames = answer(task, tensors=(TensorSpec("bfloat16", (3, HIDDEN)),))
    _, broken = line.result(PEERS[0], result, tuple(frames), now=0.0)
    assert isinstance(broken, StepBroken)
    assert "float32" in broken.failure.message
