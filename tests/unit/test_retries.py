"""Who is suspected when a step fails, how the culprit is found, and who fails in the end."""

import itertools

import pytest

from distributed_llm.common.errors import InvalidRequest, StageError
from distributed_llm.common.messages import Generate, RequestFailed, TaskFailed
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import frame_of_token_ids
from distributed_llm.common.types import Epoch, PeerId, SequenceId, StepNumber, WorkerId
from distributed_llm.coordinator.events import Send, Tokenized
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.serving.retries import step_broken
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.steps import StepDone
from tests.unit.fake_model import MODEL

CLIENT = PeerId(b"client")
TOKEN = 5


class Bench:
    """A number of requests that run on one pipeline, whose prompts are computed.

    Args:
        culprits: indices of the requests that break every step in which they are.
        names: whether the worker says which sequences they are.
        code: of the failure.
    """

    def __init__(
        self, count: int, culprits: set[int], *, names: bool = False, code: str = "stage_error"
    ) -> None:
        self.log = EventLog()
        self.book = RequestBook(MODEL.defaults, self.log, max_waiting=count, draw_seed=lambda: 1)
        self.book.set_capacity(100_000)
        self.scheduler = Scheduler(
            max_sequences=count,
            max_tokens=4096,
            kv_tokens=100_000,
            new_sequence_id=map(SequenceId, itertools.count(1)).__next__,
            on_change=lambda: None,
        )
        self.answers: list[Answer] = []
        self.failed: dict[str, RequestFailed] = {}
        self.steps: list[Step] = []
        self._names, self._code = names, code
        for index in range(count):
            spec, frame = frame_of_token_ids((index, index + 1))
            params = SamplingParams(max_new_tokens=40, ignore_eos=True)
            message = Generate(
                request_id=f"r{index}", prompt="token_ids", params=params, tensors=(spec,)
            )
            self.book.submit(CLIENT, message, (frame,), now=0.0)
            key = (CLIENT, message.request_id, index)
            self.book.tokenized(Tokenized(key, [index, index + 1]))
            waiting = self.book.waiting.next(1 << 30, now=0.0)
            assert waiting is not None
            self.answers.append(waiting)
            assert self.book.admit(self.scheduler, now=0.0)
        self.culprits = [self.answers[index] for index in sorted(culprits)]
        self.run(False)

    def run(self, breaks: bool = True) -> bool:
        """Run a step; return whether it broke."""
        step = self.scheduler.next_step(max_decodes=1000, prompts=True, idle=True)
        assert step is not None
        self.steps.append(step)
        named = [answer for answer in step.answers if answer in self.culprits]
        if named and breaks:
            self._break(step, named)
        else:
            are_current = self.scheduler.complete(step)
            tokens = [TOKEN] * len(step.answers)
            done = StepDone(step, tokens, [None] * len(tokens), (), depth=1, round_trip_s=0.1)
            self.book.step_done(done, are_current, now=1.0)
        self.scheduler.validate()
        self.book.validate()
        return bool(named and breaks)

    def _break(self, step: Step, named: list[Answer]) -> None:
        ids = tuple(a.sequence_id for a in named if a.sequence_id is not None)
        failure = TaskFailed(
            epoch=Epoch(1),
            step=StepNumber(1),
            code=self._code,
            message="it is broken.",
            sequence_ids=ids if self._names else (),
        )
        actions = step_broken(self.book, self.log, self.scheduler, step, failure, WorkerId("w"))
        self.scheduler.abandon(step)
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, RequestFailed):
                self.failed[action.message.request_id] = action.message

    def run_until_found(self) -> int:
        """Run until all culprits have failed and nobody is suspected; return how many steps."""
        for count in range(1, 200):
            self.run()
            done = len(self.failed) == len(self.culprits)
            if done and not any(answer.suspects for answer in self.scheduler.running):
                return count
        raise AssertionError("answers are suspected for ever")


@pytest.mark.parametrize("culprit", [0, 1, 31, 40, 63])
def test_a_culprit_is_found_in_halves(culprit: int) -> None:
    """At every level of six one half fails and the other gets its token; then it fails alone."""
    bench = Bench(64, {culprit})
    steps = bench.run_until_found()
    assert set(bench.failed) == {f"r{culprit}"}
    assert bench.failed[f"r{culprit}"].code == StageError.code
    assert "failed on this request 2 times: it is broken." in bench.failed[f"r{culprit}"].message
    assert steps <= 1 + 2 * 6 + 1
    assert sum(len(step.answers) == 1 for step in bench.steps) <= 3


def test_several_culprits_are_found() -> None:
    bench = Bench(16, {2, 3, 11})
    assert bench.run_until_found() <= 1 + 3 * 2 * 4 + 3
    assert set(bench.failed) == {"r2", "r3", "r11"}
    bench.culprits = []
    assert not bench.run()
    assert len(bench.steps[-1].answers) == 13


def test_all_are_culprits_and_all_fail() -> None:
    bench = Bench(4, {0, 1, 2, 3})
    while len(bench.failed) < 4:
        assert bench.run()
    assert len(bench.steps) <= 1 + 1 + 2 + 4 * 2


def test_only_those_that_the_worker_names_are_suspected() -> None:
    bench = Bench(64, {7, 40}, names=True)
    assert bench.run()
    suspected = [answer for answer in bench.answers if answer.suspects]
    assert suspected == bench.culprits
    bench.run()
    bench.run()
    assert set(bench.failed) == {"r7", "r40"}
    assert not bench.run()
    assert len(bench.steps[-1].answers) == 62


def test_parameters_that_allow_no_token_are_the_users_fault_at_once() -> None:
    bench = Bench(3, {1}, names=True, code=InvalidRequest.code)
    assert bench.run()
    assert bench.failed["r1"].code == InvalidRequest.code
    assert bench.failed["r1"].message == "it is broken."
    assert not bench.run()


def test_sequences_that_are_not_in_the_step_name_nobody() -> None:
    bench = Bench(4, {1}, names=True)
    step = bench.scheduler.next_step(max_decodes=9, prompts=True, idle=True)
    assert step is not None
    failure = TaskFailed(
        epoch=Epoch(1),
        step=StepNumber(1),
        code=InvalidRequest.code,
        message="no",
        sequence_ids=(SequenceId(999),),
    )
    actions = step_broken(bench.book, bench.log, bench.scheduler, step, failure, WorkerId("w"))
    bench.scheduler.abandon(step)
    assert not any(isinstance(action, Send) for action in actions)
    assert all(answer.suspects for answer in bench.answers)


def test_a_failure_that_passes_costs_nobody_anything() -> None:
    bench = Bench(8, {3})
    assert bench.run()
    bench.culprits = []
    for _ in range(2):
        assert not bench.run()
    assert not bench.failed
    assert not any(answer.suspects or answer.failures for answer in bench.answers)
