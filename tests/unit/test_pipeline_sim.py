"""How long steps take where some take longer, against a pipeline that is run step by step."""

import heapq
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.coordinator.planning.pipeline_sim import StepTimes, round_trip_s

GOLDEN = 0.618034


def walked(
    usual: Sequence[float],
    longer: Sequence[float],
    delays: Sequence[float],
    *,
    share: float,
    depth: int,
    overhead_s: float,
    steps: int = 3000,
) -> float:
    """Return the mean round trip by events: a stage serves steps in the order in which they come.

    Args:
        delays: after each stage or link.
    """
    free = [0.0] * len(usual)
    ready = [(0.0, number) for number in range(depth)]  # who waits for the first stage, and since
    heapq.heapify(ready)
    begun = depth
    ends: list[float] = []
    while len(ends) < steps:
        at, number = heapq.heappop(ready)
        times = longer if number * GOLDEN % 1.0 < share else usual
        for place, (busy, delay) in enumerate(zip(times, delays, strict=True)):
            at = max(at, free[place]) + busy
            free[place] = at
            at += delay
        ends.append(at)
        heapq.heappush(ready, (at + overhead_s, begun))
        begun += 1
    half = steps // 2
    return depth * (ends[-1] - ends[half - 1]) / (steps - half)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_steps_that_are_alike_wait_for_the_slowest_stage_or_for_nobody(
    depth: int, share: float
) -> None:
    times = StepTimes([0.3, 0.01, 0.2], [0.0, 0.04, 0.0])
    found = round_trip_s(times, times, share=share, depth=depth, overhead_s=0.05)
    assert found == pytest.approx(max(0.6, depth * 0.3))


def test_one_step_alone_takes_the_mean() -> None:
    usual, longer = StepTimes([0.1, 0.0, 0.1], [0.0] * 3), StepTimes([0.2, 0.0, 0.4], [0.0] * 3)
    found = round_trip_s(usual, longer, share=0.25, depth=1, overhead_s=0.1)
    assert found == pytest.approx(0.1 + 0.2 + 0.25 * 0.4, rel=0.02)


def test_two_stages_that_are_alike_wait_for_each_other() -> None:
    """Every second step takes 3 instead of 1: the other stage waits 2 of every 6 seconds."""
    usual, longer = StepTimes([1.0, 0.0, 1.0], [0.0] * 3), StepTimes([3.0, 0.0, 3.0], [0.0] * 3)
    found = round_trip_s(usual, longer, share=0.5, depth=2, overhead_s=0.0)
    assert found > 1.2 * 2 * 2.0


stages = st.integers(1, 5)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.data(), stages, st.integers(1, 8), st.floats(0, 1), st.floats(0, 0.5))
def test_it_is_what_a_walk_finds(
    data: st.DataObject, number: int, depth: int, share: float, overhead_s: float
) -> None:
    places = 2 * number - 1
    seconds = st.lists(st.floats(0.1, 1), min_size=places, max_size=places)
    usual, more = data.draw(seconds), data.draw(seconds)
    delays = [0.0 if place % 2 == 0 else 0.1 for place in range(places)]
    longer = [a + b for a, b in zip(usual, more, strict=True)]
    found = round_trip_s(
        StepTimes(usual, delays),
        StepTimes(longer, delays),
        share=share,
        depth=depth,
        overhead_s=overhead_s,
    )
    expected = walked(usual, longer, delays, share=share, depth=depth, overhead_s=overhead_s)
    assert found == pytest.approx(expected, rel=0.08)
