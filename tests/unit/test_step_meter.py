"""What is measured of a pipeline's steps, against schedules that are known."""

import pytest

from distributed_llm.common.messages import SequenceSlice, StageTime
from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.step_meter import StepMeter
from distributed_llm.coordinator.serving.steps import StepDone


def done(
    *compute_s: float, round_trip_s: float, tokens: int = 1, queued_s: float = 0.0
) -> StepDone:
    times = tuple(
        StageTime(
            compute_us=round(seconds * 1e6),
            layers_us=0,
            queued_us=round(queued_s * 1e6),
        )
        for seconds in compute_s
    )
    part = SequenceSlice(sequence_id=SequenceId(1), start=0, num_tokens=tokens, sample=True)
    return StepDone(Step((), (part,), (0,) * tokens), [], [], times, 1, round_trip_s)


def test_one_step_at_a_time_leaves_the_other_stages_idle() -> None:
    meter = StepMeter(2)
    assert meter.bubble_ratio is None
    for number in range(1, 50):  # a second of idleness between steps is no bubble
        meter.observe(done(0.2, 0.2, round_trip_s=0.4), [0.1, None], now=1.4 * number)
    assert meter.bubble_ratio == pytest.approx(0.5)
    assert meter.step_s == pytest.approx([0.2, 0.2])
    assert meter.predicted_s == [pytest.approx(0.1), None]
    assert meter.outside_s == pytest.approx(0.0)
    assert meter.compute_s == pytest.approx([49 * 0.2] * 2)
    assert meter.tokens == [49, 49]


def test_steps_that_overlap_fill_the_bubbles() -> None:
    meter = StepMeter(2)
    for number in range(2, 100):  # one ends every 0.2 s, and was under way for twice that
        meter.observe(done(0.2, 0.1, round_trip_s=0.4, queued_s=0.05), [None] * 2, now=0.2 * number)
    assert meter.bubble_ratio == pytest.approx(0.25, abs=0.01)
    assert meter.slowest == 0
    assert meter.queued_s == pytest.approx([0.05, 0.05])
    assert meter.outside_s == pytest.approx(0.0)


def test_prompts_count_in_sums_and_bubbles_only() -> None:
    meter = StepMeter(1)
    meter.observe(done(1.0, round_trip_s=1.25, tokens=7), [None], now=1.0)
    assert (meter.step_s, meter.round_trip_s, meter.slowest) == ([], None, None)
    assert (meter.compute_s, meter.tokens) == ([1.0], [7])
    assert meter.bubble_ratio == pytest.approx(0.2)


def test_a_change_is_followed() -> None:
    meter = StepMeter(1)
    for number in range(100):
        meter.observe(done(0.1, round_trip_s=0.1), [None], now=0.1 * number)
    for number in range(400):
        meter.observe(done(0.3, round_trip_s=0.3), [0.3], now=10.0 + 0.3 * number)
    assert meter.step_s == pytest.approx([0.3], rel=0.01)
    assert meter.predicted_s == pytest.approx([0.3])
