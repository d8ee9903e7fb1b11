"""What is asked of a pipeline, as its steps show."""

import pytest

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import PeerId, SequenceId
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Answer, Request
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.demand import DemandMeter


def step(*slices: tuple[int, int, bool]) -> StepDone:
    """A step that has ended, of slices with (start, tokens, whether the last is sampled)."""
    parts = tuple(
        SequenceSlice(sequence_id=SequenceId(i), start=start, num_tokens=count, sample=sample)
        for i, (start, count, sample) in enumerate(slices)
    )
    tokens = tuple(range(sum(count for _, count, _ in slices)))
    done = Step(answers=(ANSWER,) * len(parts), slices=parts, token_ids=tokens)
    return StepDone(done, [], [], (), depth=1, round_trip_s=0.1)


def answer_of(prompt: int, new_tokens: int) -> Answer:
    request = Request((PeerId(b"client"), "r", 0), SamplingParams(), 0.0, client="client")
    request.accept(range(prompt), Limits((Sampling(),), new_tokens, ()), number=0)
    return request.answers[0]


ANSWER = answer_of(80, 40)


def test_nothing_is_known_before_a_token_is_answered() -> None:
    meter = DemandMeter()
    assert meter.demand is None
    meter.observe(step((0, 64, False)), decoding=0, now=1.0)
    assert meter.demand is None
    meter.observe(step((64, 36, True)), decoding=1, now=2.0)
    assert meter.demand is not None


def test_steps_of_an_even_load() -> None:
    """Four sequences decode at 100 positions; every tenth step has 80 tokens of a prompt, too."""
    meter = DemandMeter(half_life_s=1000.0)
    for at in range(100):
        decodes = [(99, 1, True)] * 4
        prompt = [(0, 80, False)] if at % 10 == 0 else []
        meter.observe(step(*decodes, *prompt), decoding=4, now=0.1 * at)
    demand = meter.demand
    assert demand is not None
    assert demand.sequences == pytest.approx(4.0)
    assert demand.positions == pytest.approx(100.0)
    assert demand.prompt_tokens == pytest.approx(2.0, rel=0.01)  # 80 of 40 answered
    assert demand.chunk_tokens == pytest.approx(80.0)


def test_sequences_are_counted_by_the_time_that_they_were_there() -> None:
    """One for nine seconds in a single step, then eleven for a second in a hundred of them."""
    meter = DemandMeter(half_life_s=1000.0)
    meter.observe(step((9, 1, True)), decoding=0, now=0.0)
    meter.observe(step((10, 1, True)), decoding=1, now=9.0)
    for at in range(100):
        meter.observe(step((10, 1, True)), decoding=11, now=9.01 + 0.01 * at)
    assert meter.demand is not None
    assert meter.demand.sequences == pytest.approx(2.0, rel=0.01)


def test_what_was_is_forgotten() -> None:
    meter = DemandMeter(half_life_s=10.0)
    for at in range(100):
        meter.observe(step(*[(499, 1, True)] * 8), decoding=8, now=float(at))
    for at in range(100, 160):
        meter.observe(step((9, 1, True)), decoding=1, now=float(at))
    demand = meter.demand
    assert demand is not None
    assert demand.sequences == pytest.approx(1.0, abs=0.15)
    assert demand.positions < 10.0 + 0.15 * 490


def test_at_least_one_sequence_is_planned_for() -> None:
    meter = DemandMeter()
    for at in range(10):
        meter.observe(step((9, 1, True)), decoding=0, now=float(at))
    assert meter.demand is not None
    assert meter.demand.sequences == 1.0


def test_the_clock_may_have_run_for_long_before() -> None:
    """Clocks count from when the machine was started."""
    meter = DemandMeter()
    for at in range(100):
        meter.observe(step(*[(99, 1, True)] * 8), decoding=8, now=1e6 + at)
    assert meter.demand is not None
    assert meter.demand.sequences == pytest.approx(8.0)


def test_clients_that_all_begin_at_once_are_not_taken_for_many_prompts() -> None:
    """Eight prompts of 80 tokens, to which 40 are answered each, in the first second."""
    meter = DemandMeter()
    for at in range(8):
        meter.observe(step((0, 80, True)), decoding=at, now=100.0 + 0.1 * at)
    meter.observe(step(*[(80, 1, True)] * 8), decoding=8, now=101.0)
    assert meter.demand is not None
    assert meter.demand.prompt_tokens == pytest.approx(2.0)


def test_in_the_long_run_it_counts_what_was_answered() -> None:
    """Answers end after 10 of the 40 tokens that they may have."""
    meter = DemandMeter()
    for at in range(500):
        meter.observe(step((0, 80, True)), decoding=1, now=0.1 * (10 * at))
        for then in range(1, 10):
            meter.observe(step((79 + then, 1, True)), decoding=1, now=0.1 * (10 * at + then))
    assert meter.demand is not None
    assert meter.demand.prompt_tokens == pytest.approx(8.0, rel=0.05)
