"""How many steps are under way: as many as a simulated pipeline shows to be best."""

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_llm.common.messages import StageTime
from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.plan import PipelineStage, num_machines
from distributed_llm.coordinator.serving.depth_estimator import DepthEstimator
from distributed_llm.coordinator.serving.depth_policy import DepthPolicy
from tests.unit.stage_pipeline import (
    EQUAL,
    LONG,
    ONE_SLOW,
    PROPORTIONAL,
    SINGLE,
    Cost,
    Pipeline,
    linear,
)


@cache
def best_of_all(
    costs: tuple[Cost, ...], sequences: int, *, shared: bool = False, noise: float = 0.0
) -> float:
    """Return the throughput of the best depth that does not change."""
    depths = range(1, min(8, sequences) + 1)
    runs = [Pipeline(costs, sequences, shared, noise, fixed_depth=depth) for depth in depths]
    return max(run.run(8.0) for run in runs)


SHAPES = pytest.mark.parametrize(
    "costs",
    [EQUAL, ONE_SLOW, PROPORTIONAL, LONG, SINGLE],
    ids=["equal", "one slow", "proportional", "long", "single"],
)
MACHINES = pytest.mark.parametrize("shared", [False, True], ids=["own machines", "one machine"])


@SHAPES
@MACHINES
@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("sequences", [2, 64])
def test_comes_near_the_best_depth_and_stays(
    costs: tuple[Cost, ...], shared: bool, sequences: int, noise: float
) -> None:
    pipeline = Pipeline(costs, sequences, shared, noise)
    pipeline.run(8.0)
    changes = pipeline.changes
    best = best_of_all(costs, sequences, shared=shared, noise=noise)
    assert pipeline.run(30.0) > 0.9 * best
    assert pipeline.changes - changes <= 12  # others are tried again, briefly


def test_what_is_best_on_machines_of_their_own_and_on_one() -> None:
    depths = []
    for shared in (False, True):
        pipeline = Pipeline(EQUAL, 16, shared, noise=0.1)
        pipeline.run(30.0)
        depths.append(Counter(pipeline.choices).most_common(1)[0][0])
    assert depths == [3, 1]


@pytest.mark.parametrize(
    ("before", "after"),
    [(EQUAL, ONE_SLOW), (ONE_SLOW, EQUAL), (EQUAL, PROPORTIONAL[:3]), (PROPORTIONAL[:3], EQUAL)],
)
@MACHINES
def test_follows_a_change_of_speed(
    before: tuple[Cost, ...], after: tuple[Cost, ...], shared: bool
) -> None:
    pipeline = Pipeline(before, 16, shared, noise=0.1)
    pipeline.run(30.0)
    pipeline.costs = after
    pipeline.run(60.0)
    assert pipeline.run(20.0) > 0.93 * best_of_all(after, 16, shared=shared, noise=0.1)


@MACHINES
def test_follows_stages_that_begin_or_end_to_share_a_machine(shared: bool) -> None:
    pipeline = Pipeline(EQUAL, 16, shared, noise=0.1)
    pipeline.run(30.0)
    pipeline.shared = not shared
    pipeline.run(80.0)
    assert pipeline.run(20.0) > 0.93 * best_of_all(EQUAL, 16, shared=not shared, noise=0.1)


def test_follows_the_number_of_sequences() -> None:
    pipeline = Pipeline(PROPORTIONAL, 16)
    for sequences in (16, 1, 32, 2, 16):
        pipeline.idle += sequences - pipeline.sequences
        pipeline.sequences = sequences
        pipeline.run(20.0)
        assert pipeline.run(10.0) > 0.93 * best_of_all(PROPORTIONAL, sequences)


@pytest.mark.parametrize(("sequences", "limit"), [(1, 8), (2, 8), (9, 2), (9, 8), (0, 8)])
def test_before_any_measurement_there_is_one_step_per_stage(sequences: int, limit: int) -> None:
    depth = DepthEstimator(4).best_depth(sequences, limit=limit, now=0.0)
    assert depth == max(1, min(sequences, limit, 4))


def steady(
    seconds: float, *, stages: int = 2, depth: int = 1, sequences: int = 4, tasks: int = 20
) -> DepthEstimator:
    """Return the times of equal stages, one task a second."""
    times = DepthEstimator(stages)
    for now in range(tasks):
        for stage in range(stages):
            times.observe(stage, sequences, seconds, depth=depth, now=float(now))
    return times


def predicted_s(times: DepthEstimator, tokens: int, depth: int) -> float | None:
    """Return the round trip that decisions are made from, or None before anything is known."""
    known = times._known(times._latest.seen_at) if times._latest else ()
    return times._predict(tokens, depth, known) if known else None


@given(sequences=st.integers(1, 100), limit=st.integers(1, 64), depth=st.integers(1, 64))
def test_never_more_steps_than_allowed_or_than_sequences(
    sequences: int, limit: int, depth: int
) -> None:
    times = steady(1.0, depth=depth, tasks=5)
    assert 1 <= times.best_depth(sequences, limit=limit, now=5.0) <= min(limit, sequences)


def test_a_slow_task_now_and_then_changes_nothing() -> None:
    times = steady(1.0)
    before = predicted_s(times, 4, 1)
    times.observe(0, 4, 1000.0, depth=1, now=20.0)
    after = predicted_s(times, 4, 1)
    assert before == pytest.approx(2.0)
    assert after == pytest.approx(2.0, rel=0.1)


def test_predictions_and_time_per_token() -> None:
    times = DepthEstimator(2)
    assert predicted_s(times, 4, 1) is None
    assert times.seconds_per_token(0) is None
    for now in range(40):
        for stage, cost in enumerate((linear(1.0, 0.5), linear(2.0, 0.25))):
            sequences = 2 + 6 * (now % 2)
            times.observe(stage, sequences, cost(sequences), depth=1, now=now / 10)
        times.observe_overhead(0.5, now / 10)
    assert predicted_s(times, 8, 1) == pytest.approx(5.0 + 4.0 + 0.5, rel=0.05)
    assert predicted_s(times, 2, 1) == pytest.approx(2.0 + 2.5 + 0.5, rel=0.05)
    assert predicted_s(times, 8, 3) == pytest.approx(3 * 5.0, rel=0.05)
    assert times.seconds_per_token(0) == pytest.approx((2.0 + 5.0) / 10, rel=0.05)


def test_an_untried_depth_is_as_good_as_its_neighbours_allow() -> None:
    times = DepthEstimator(8)
    for now in range(5):
        for stage in range(8):
            times.observe(stage, 16, 5.0, depth=1, now=float(now))
            times.observe(stage, 2, 1.5, depth=8, now=float(now))
    assert predicted_s(times, 16, 1) == pytest.approx(8 * 5.0)
    assert predicted_s(times, 2, 8) == pytest.approx(8 * 1.5)
    # as at 1, at best in proportion to the sequences
    assert predicted_s(times, 8, 2) == pytest.approx(8 * 2.5)
    # as at 8, at best the same for more sequences and half as slowed down
    assert predicted_s(times, 3, 4) == pytest.approx(max(8 * 5.0 * 3 / 16, 8 * 1.5 / 2))
    assert predicted_s(times, 1, 4) == pytest.approx(max(8 * 5.0 / 16, 8 * 1.5 / 4))


def test_old_measurements_fade() -> None:
    times = steady(1.0)
    times.observe(0, 4, 2.0, depth=1, now=110.0)  # three half-lives later
    mean = (19 * 0.125 * 1.0 + 2.0) / (19 * 0.125 + 1)
    assert times.seconds_per_token(0) == pytest.approx(mean / 4, rel=0.05)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 100), st.floats(0, 100), st.integers(1, 2)),
        min_size=20,
        max_size=60,
    ),
    st.integers(1, 100),
    st.integers(1, 8),
)
def test_predictions_are_sane_whatever_was_measured(
    tasks: list[tuple[int, int, float, int]], tokens: int, depth: int
) -> None:
    times = DepthEstimator(2)
    for now, (stage, sequences, seconds, at) in enumerate(tasks):
        times.observe(stage, sequences, seconds, depth=at, now=float(now))
    found = predicted_s(times, tokens, depth), predicted_s(times, tokens + 1, depth)
    if found[0] is not None and found[1] is not None:
        assert -1e-6 <= found[0] <= found[1] + 1e-6 < math.inf
    assert 1 <= times.best_depth(tokens, limit=depth, now=100.0) <= depth


# ------------------------------------------------------------------ chunks of prompts


def chunks_over_time(
    stages: int, seconds: Callable[[int], float], *, frugal: bool, try_up_to: int = 16
) -> list[int]:
    """Return what was chosen again and again where a stage takes `seconds(depth)`."""
    times = DepthEstimator(stages)
    seen = []
    for now in range(40):
        depth = times.best_chunks(512, limit=16, try_up_to=try_up_to, frugal=frugal, now=float(now))
        seen.append(depth)
        for stage in range(stages):
            times.observe(stage, 512, seconds(depth), depth=depth, now=float(now))
    return seen


def test_chunks_keep_all_stages_busy_from_the_beginning() -> None:
    """Nobody waits for anything else, so fewer are not tried."""
    assert set(chunks_over_time(8, lambda depth: 1.0, frugal=False)) == {8}


def test_chunks_are_fewer_where_somebody_waits_if_that_is_as_fast() -> None:
    seen = chunks_over_time(8, lambda depth: 1.0, frugal=True)
    assert seen[0] == 8
    assert seen.count(1) <= 3  # tried
    assert seen[-1] == 8  # so many keep all stages busy; more would only wait


def test_chunks_on_one_machine_come_one_after_another_where_somebody_waits() -> None:
    seen = chunks_over_time(3, lambda depth: 1.0 * depth, frugal=True)
    assert seen[0] == 3
    assert seen.count(3) <= 3
    assert set(seen[3:]) == {1}
    assert set(chunks_over_time(3, lambda depth: 1.0 * depth, frugal=True, try_up_to=1)) == {1}


def test_chunks_that_slow_each_other_down_are_few_where_somebody_waits() -> None:
    """On shared cores: three of them are faster by a third, but each takes twice as long."""
    shared = {1: 1.0, 2: 1.6, 3: 2.25}
    waiting = chunks_over_time(3, lambda d: shared.get(d, d), frugal=True, try_up_to=3)
    assert set(waiting[12:]) == {1}
    alone = chunks_over_time(3, lambda d: shared.get(d, d), frugal=False, try_up_to=3)
    assert set(alone) == {3}


def test_chunks_are_not_tried_beyond_what_is_allowed_but_used_if_measured() -> None:
    times = DepthEstimator(8)

    def best(now: float) -> int:
        return times.best_chunks(512, limit=16, try_up_to=1, frugal=True, now=now)

    assert best(0.0) == 1
    for now in range(10):
        for stage in range(8):
            times.observe(stage, 512, 1.0, depth=1, now=float(now))
    assert best(10.0) == 1
    for stage in [*range(8)] * 4:
        times.observe(stage, 512, 1.0, depth=4, now=11.0)
    assert best(12.0) == 4


# ------------------------------------------------------------------ stages that share cores


def seen(policy: DepthPolicy, *, depth: int, between_s: float, decodes: bool) -> None:
    """Let three stages take 0.1 s each for some steps, and the way between them so long."""
    for at in range(12):
        done: Any = SimpleNamespace(
            step=SimpleNamespace(decodes=decodes, token_ids=range(16)),
            timings=[StageTime(compute_us=100_000, layers_us=0, queued_us=0)] * 3,
            first=0,
            depth=depth,
            round_trip_s=0.3 + between_s,
        )
        policy.observe(done, now=0.1 * at)


@pytest.mark.parametrize(
    ("machines", "between_s", "wanted"),
    [
        (1, 0.0, 1),
        (1, 0.1, 1),
        (1, 0.35, 2),  # the cores would have nothing to do for half of the time
        (2, 0.0, 2),
        (2, 0.2, 3),
        (3, 0.0, 3),
    ],
)
def test_no_more_steps_than_machines_unless_these_would_be_idle(
    machines: int, between_s: float, wanted: int
) -> None:
    policy = DepthPolicy(3, num_machines=machines, max_tokens=256)
    first = min(machines, 3)
    assert policy.decode_depth(16, limit=6, now=0.0) == first
    assert policy.prefill_depth(0, limit=6, now=0.0) == first
    seen(policy, depth=first, between_s=between_s, decodes=True)
    seen(policy, depth=first, between_s=between_s, decodes=False)
    most = policy.decode_depth(64, limit=6, now=2.0), policy.prefill_depth(0, limit=6, now=2.0)
    assert max(most) <= (6 if machines == 3 else wanted)
    assert most[1] >= min(first, wanted)


def test_machines_are_counted_by_the_cores_that_are_shared() -> None:
    def stages(*shares: str) -> list[PipelineStage]:
        return [
            PipelineStage(PeerId(b"x"), WorkerId(f"w{at}"), LayerRange(at, at + 1), own)
            for at, own in enumerate(shares)
        ]

    assert num_machines(stages("", "", "")) == 3
    assert num_machines(stages("a", "a", "a")) == 1
    assert num_machines(stages("a", "", "a", "b")) == 3
