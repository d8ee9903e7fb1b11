"""What a worker takes: learnt from its tasks, steady under noise, and quick when it changes."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import product, repeat
from statistics import pstdev
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.messages import Capabilities, StageTime, StageTrial
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.tables import WorkerTimes
from distributed_llm.coordinator.speeds.work import Work, work_of_trial
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed

PRIOR = Prior(
    layer_s=1e-3,
    token_s=5e-5,
    position_s=4e-8,
    prompt_position_s=1e-8,
    head_s=2e-3,
    head_token_s=1e-4,
)
Cost = tuple[float, float, float]
"""Seconds: base, per token, per position."""

AS_PRIOR: Cost = (1e-3, 5e-5, 4e-8)
FLAT: Cost = (3e-3, 2e-5, 4e-8)  # a slow start of every layer, then hardly more per token
STEEP: Cost = (8e-4, 4e-4, 3e-7)
TRUTHS = pytest.mark.parametrize("truth", [AS_PRIOR, FLAT, STEEP], ids=["prior", "flat", "steep"])

TASK_S = 7e-4
LAYERS = 4.5


def seconds(cost: Cost, work: Work, prompt: tuple[float, float] = (0.0, 0.0)) -> float:
    """Return what a work takes.

    Args:
        prompt: seconds per token of prompts, and per position.
    """
    decoding = cost[0] + cost[1] * work.tokens + cost[2] * work.positions
    return decoding + prompt[0] * work.prompt_tokens + prompt[1] * work.prompt_positions


def decoding(tokens: int, length: int = 500) -> Work:
    return Work(tokens, tokens * length)


def chunk(tokens: int, start: int = 0) -> Work:
    """Return a part of a prompt in a step of its own."""
    return Work.of_prompt(tokens, tokens * start + tokens * (tokens + 1) / 2)


def both(answers: Work, prompt: Work) -> Work:
    """Return a step with both."""
    return replace(prompt, tokens=answers.tokens, positions=answers.positions)


@dataclass
class Worker:
    """A worker that takes exactly what its attributes say, times what each task is given.

    Attributes:
        rate: tasks a second.
        slower: how many times slower it has become.
    """

    decode: Cost = AS_PRIOR
    prompt: tuple[float, float] = (5e-5, 1e-8)
    head: Cost = (0.0, 0.0, 0.0)
    rate: float = 20.0
    slower: float = 1.0
    now: float = 0.0
    speed: WorkerSpeed = field(default_factory=lambda: WorkerSpeed(PRIOR, half_life_s=30.0))

    def run(self, works: list[Work], factors: Iterable[float] = repeat(1.0)) -> None:
        """Do a task for every work; each takes `factor` times as long as it should."""
        for work, factor in zip(works, factors, strict=False):
            self.do(work, factor)

    def do(self, work: Work, factor: float = 1.0, *, last: bool = False) -> None:
        self.now += 1 / self.rate
        factor *= self.slower
        self.speed.observe(
            work,
            layers=LAYERS,
            is_last=last,
            layers_s=factor * LAYERS * seconds(self.decode, work, self.prompt),
            other_s=factor * (TASK_S + last * seconds(self.head, work)),
            now=self.now,
        )

    def off(self, work: Work) -> float:
        """Return predicted over true time of a layer."""
        true_s = self.slower * seconds(self.decode, work, self.prompt)
        return self.speed.layer_s(work) / true_s


def noise(seed: int, count: int, size: float = 0.2) -> list[float]:
    draw = random.Random(seed)
    return [1 + draw.uniform(-size, size) for _ in range(count)]


def mixed(seed: int, count: int, sizes: Sequence[int] = range(1, 33)) -> list[Work]:
    """Return batches of some sizes, of sequences of 100 to 2000 positions."""
    draw = random.Random(seed)
    return [decoding(draw.choice(sizes), draw.randint(100, 2000)) for _ in range(count)]


# ------------------------------------------------------------------ the prior


def capabilities() -> Capabilities:
    """Return a machine of 1 GB/s and 10 billion operations a second."""
    speeds = {"memory_bandwidth_bytes_per_s": 1e9, "flops_per_s": 1e10}
    size = {"memory_bytes": 0, "cores": 1, "threads": 1}
    names = dict.fromkeys(("device", "device_name", "platform"), "cpu")
    return msgspec.convert({**names, **size, **speeds}, Capabilities)


def test_the_prior_follows_from_bandwidth_and_operations() -> None:
    cost = ModelCost((1_000_000, 3_000_000), 9, 400_000, 600_000, layer_kv_bytes=(1000, 1000))
    prior = astuple(Prior.from_capabilities(capabilities(), cost, item_bytes=2))
    assert prior == (*(pytest.approx(s) for s in (2e-3, 2e-4, 1e-6, 4e-7, 1e-3, 1e-4)), False)


def test_the_head_reads_no_matrix_that_only_the_stacks_embed_by() -> None:
    cost = ModelCost((1000,) * 4, 9, 400_000, 600_000, layer_kv_bytes=(0, 0, 10, 10))
    stacks = replace(cost, encoder_layers=2, shared_by=(0, 2))
    tied = replace(stacks, shared_by=(0, 2, 3))
    head_s = [
        Prior.from_capabilities(capabilities(), one, item_bytes=2).head_s for one in (stacks, tied)
    ]
    assert head_s == pytest.approx([400e-6, 1000e-6])


def test_before_anything_is_measured_there_is_the_prior_in_the_scale_of_others() -> None:
    speed = WorkerSpeed(PRIOR)
    assert (speed.measured, speed.first_scale(decoding(1)), speed.error) == (False, None, None)
    load = Work(10, 5000, prompts=0.5, prompt_tokens=50, prompt_positions=5000)
    plain, scaled = speed.times(load), speed.times(load, scale=3.0)
    assert plain.layer_s == pytest.approx(1e-3 + 5e-4 + 2e-4 + 0.5 * (5e-3 + 1e-4))
    assert plain.last_s == pytest.approx(2e-3 + 1e-3 + 0.5 * 1e-4)
    assert scaled.layer_s == pytest.approx(3 * plain.layer_s)
    assert scaled.last_s == pytest.approx(3 * plain.last_s)
    assert scaled.task_s == plain.task_s == pytest.approx(5e-4)


# ------------------------------------------------------------------ sizes of steps


@TRUTHS
def test_learns_what_sizes_cost(truth: Cost) -> None:
    worker = Worker(truth)
    worker.run(mixed(1, 300))
    for work in (decoding(1, 100), decoding(1, 4000), decoding(32, 100), decoding(64, 2000)):
        assert worker.off(work) == pytest.approx(1, abs=0.02)


@TRUTHS
@pytest.mark.parametrize("seed", range(5))
def test_predicts_sizes_it_never_saw_under_noise(truth: Cost, seed: int) -> None:
    worker = Worker(truth)
    worker.run(mixed(seed, 300, sizes=[1, 2, 4, 8, 16]), noise(seed, 300))
    for size, length in product((1, 3, 6, 12, 16, 24), (100, 1000, 2000)):
        assert worker.off(decoding(size, length)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_other_sizes_follow_the_prior_while_all_are_the_same(seed: int) -> None:
    """Noise at one size tells nothing about others, however long it goes on."""
    worker = Worker()
    worker.slower = 3.0
    worker.run([decoding(4)] * 10, noise(seed + 5, 10))
    assert worker.off(decoding(32)) == pytest.approx(worker.off(decoding(4)), rel=5e-3)
    worker.run([decoding(4)] * 3000, noise(seed, 3000))
    assert worker.speed._layers.scale(decoding(4)) == pytest.approx(3, rel=0.08)
    for work in (decoding(1), decoding(32), decoding(4, 4000)):
        assert worker.off(work) == pytest.approx(1, abs=0.12)


def test_what_was_learnt_of_sizes_stays_known_while_all_are_the_same() -> None:
    worker = Worker(STEEP)
    worker.run(mixed(1, 300))
    worker.run([decoding(1)] * 3000, noise(1, 3000))
    assert worker.off(decoding(32)) == pytest.approx(1, abs=0.1)
    worker.slower = 4.0
    worker.run([decoding(1)] * 300, noise(2, 300))
    assert worker.off(decoding(32)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("token_s", [1e-3, 4e-3])
def test_a_size_that_costs_more_than_expected_is_no_change_of_speed(token_s: float) -> None:
    """Here a token costs many times what it should; sizes come one after another."""
    worker = Worker((1e-3, token_s, 0.0))
    for size in (1, 16, 4):
        worker.run([decoding(size)] * 40, noise(size, 40))
    for size in (1, 4, 16, 32):
        assert worker.off(decoding(size)) == pytest.approx(1, abs=0.15)


# ------------------------------------------------------------------ noise, outliers, changes


def spread(rate: float) -> float:
    """Return the standard deviation of what is predicted under +-20 %, of the truth."""
    worker = Worker(rate=rate)
    found = []
    for factor in noise(1, 3000):
        worker.do(decoding(8), factor)
        found.append(worker.off(decoding(8)))
    return pstdev(found[100:])


def test_is_steady_under_noise() -> None:
    assert spread(rate=1000.0) < 0.02
    assert spread(rate=20.0) < 0.025
    assert spread(rate=1.0) < 0.045


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0.8, 1.2), st.integers(2, 100)), min_size=20, max_size=20),
    st.integers(1, 64),
    st.sampled_from([1.0, 20.0, 1000.0]),
)
def test_noise_of_a_fifth_is_never_taken_for_a_change(
    parts: list[tuple[float, int]], size: int, rate: float
) -> None:
    """Whatever pattern it has; the worst is long at one bound, then long at the other."""
    worker = Worker(rate=rate)
    worker.run([decoding(size)] * 40)
    before = 1.0
    for factor in (factor for factor, count in parts for _ in range(count)):
        worker.do(decoding(size), factor)
        after = worker.off(decoding(size))
        assert 0.79 < after < 1.21
        assert abs(after / before - 1) < 0.07
        before = after


def test_from_one_bound_of_the_noise_to_the_other_is_no_change() -> None:
    worker = Worker()
    worker.run([decoding(8)] * 200, [0.8] * 200)
    for _ in range(8):
        before = worker.off(decoding(8))
        worker.do(decoding(8), 1.2)
        assert worker.off(decoding(8)) < 1.03 * before


@pytest.mark.parametrize("factor", [0.0, 0.1, 3.0, 10.0, 1000.0])
def test_a_task_far_off_hardly_counts(factor: float) -> None:
    worker = Worker()
    worker.run([decoding(8)] * 100)
    worker.do(decoding(8), factor)
    assert worker.off(decoding(8)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("factors", [[10.0] * 3 + [1.0] * 7, [10.0, 0.1, 10.0, 0.1] + [1.0] * 9])
def test_tasks_far_off_now_and_then_are_no_change(factors: list[float]) -> None:
    worker = Worker()
    worker.run([decoding(8)] * 100)
    for factor in factors * 6:
        worker.do(decoding(8), factor)
        assert worker.off(decoding(8)) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("slower", [4.0, 0.25, 2.5, 0.4, 100.0, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_follows_a_change_within_five_tasks(slower: float, seed: int) -> None:
    worker = Worker(STEEP)
    works, factors = mixed(seed, 235, sizes=[4, 8, 16]), noise(seed, 235)
    for begin, stop, worker.slower in ((0, 200, 1.0), (200, 205, slower), (205, 230, slower)):
        worker.run(works[begin:stop], factors[begin:stop])
        for size in (4, 8, 16):
            assert worker.off(decoding(size)) == pytest.approx(1, abs=0.2)
    worker.slower = 1.0
    worker.run(works[230:], factors[230:])
    for size in (4, 8, 16, 32):
        assert worker.off(decoding(size)) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("slower", [1.4, 0.7])
def test_follows_a_small_change_within_some_tens_of_tasks(slower: float) -> None:
    worker = Worker()
    worker.run([decoding(8)] * 200)
    worker.slower = slower
    worker.run([decoding(8)] * 40)
    assert worker.off(decoding(8)) == pytest.approx(1, abs=0.1)


def test_a_slow_first_task_is_soon_forgotten() -> None:
    worker = Worker()
    worker.do(decoding(8), 20.0)
    worker.run([decoding(8)] * 5)
    assert worker.off(decoding(8)) == pytest.approx(1, abs=0.15)


def test_after_a_half_life_a_task_counts_as_much_as_all_before() -> None:
    weights = []
    for pause_s in (0.0, 30.0, 1e6):
        worker = Worker(rate=1000.0)
        worker.run([decoding(8)] * 500)
        worker.now += pause_s
        worker.do(decoding(8), 1.2)
        weights.append((worker.off(decoding(8)) - 1) / 0.2)
    assert weights[0] == pytest.approx(1 / 32, rel=0.3)
    assert weights[1] == pytest.approx(1 / 2, rel=0.05)
    assert weights[2] == weights[1]


# ------------------------------------------------------------------ prompts


def test_parts_of_prompts_are_learnt_from_steps_that_decode_as_well() -> None:
    worker = Worker(decode=FLAT, prompt=(2e-4, 5e-8))
    draw = random.Random(1)
    for _ in range(200):
        worker.do(decoding(draw.randint(1, 32)))
        part = chunk(draw.randint(16, 512), draw.choice([0, 512]))
        worker.do(both(decoding(draw.randint(1, 32)), part))
    for size in (1, 32):
        assert worker.off(decoding(size)) == pytest.approx(1, abs=0.03)
        assert worker.off(chunk(16 * size, 512)) == pytest.approx(1, abs=0.05)
        assert worker.off(both(decoding(32), chunk(16 * size))) == pytest.approx(1, abs=0.05)


def test_steps_with_prompts_tell_nothing_wrong_of_larger_batches() -> None:
    """All steps have 8 sequences that decode, and every other one a prompt."""
    worker = tried(Worker(decode=STEEP))
    for factor in noise(4, 200):
        worker.do(decoding(8), factor)
        worker.do(both(decoding(8), chunk(64)), factor)
    for size in (1, 8, 32):
        assert worker.off(decoding(size)) == pytest.approx(1, abs=0.12)


def test_how_far_the_prior_was_off_at_first_does_not_change() -> None:
    worker = tried(Worker(slower=3.0))
    assert worker.speed.first_scale(decoding(16, 9)) == pytest.approx(3, rel=0.05)
    worker.slower = 12.0
    worker.run([decoding(8)] * 50)
    assert worker.off(decoding(8)) == pytest.approx(1, abs=0.05)
    assert worker.speed.first_scale(decoding(16, 9)) == pytest.approx(3, rel=0.05)


def test_what_was_not_measured_is_scaled_like_what_was() -> None:
    worker = Worker(slower=3.0)
    worker.run([decoding(64)] * 20)
    assert worker.speed._layers.scale(decoding(64)) == pytest.approx(3, rel=0.05)
    assert worker.off(chunk(200)) == pytest.approx(1, abs=0.05)


def test_a_change_that_steps_show_that_decode_is_one_of_prompts_as_well() -> None:
    worker = Worker()
    for _ in range(100):
        worker.do(decoding(8))
        worker.do(chunk(256))
    worker.slower = 4.0
    worker.run([decoding(8)] * 5)
    assert worker.off(chunk(256)) == pytest.approx(1, abs=0.1)


# ------------------------------------------------------------------ beside the layers


HEAD: Cost = (5e-3, 3e-4, 0.0)


def speed_of(worker: Worker, work: Work) -> WorkerTimes:
    return worker.speed.times(work)


def test_the_head_of_a_worker_that_was_last_and_was_not() -> None:
    worker = Worker(head=HEAD)
    for index, work in enumerate(mixed(1, 400)):
        worker.do(work, last=index % 2 == 1)
    for work in (decoding(1), decoding(32)):
        found = speed_of(worker, work)
        assert found.task_s == pytest.approx(TASK_S, rel=0.02)
        assert found.last_s == pytest.approx(seconds(HEAD, work), rel=0.02)


def test_the_head_of_a_worker_that_was_never_last_is_as_much_slower_as_its_layers() -> None:
    worker = Worker()
    worker.slower = 3.0
    worker.run(mixed(1, 100))
    found = speed_of(worker, decoding(10))
    assert found.task_s == pytest.approx(3 * TASK_S, rel=0.02)
    assert found.last_s == pytest.approx(3 * (2e-3 + 10 * 1e-4), rel=0.02)


def test_a_worker_that_was_only_last_takes_a_little_for_a_task_and_the_rest_as_last() -> None:
    worker = Worker(head=HEAD)
    for work in mixed(1, 200):
        worker.do(work, last=True)
    found = speed_of(worker, decoding(32))
    assert found.task_s == pytest.approx(5e-4)
    assert found.task_s + found.last_s == pytest.approx(TASK_S + seconds(HEAD, decoding(32)), 0.02)


def test_a_last_stage_that_takes_less_than_a_task_by_default() -> None:
    worker = Worker(head=(1e-4 - TASK_S, 0.0, 0.0))
    for _ in range(20):
        worker.do(decoding(4), last=True)
    found = speed_of(worker, decoding(4))
    assert found.task_s == pytest.approx(1e-4)
    assert found.last_s == 0


def test_a_load_is_an_average_step() -> None:
    worker = Worker(head=HEAD)
    for last in [False, True] * 50:
        worker.do(decoding(8), last=last)
        worker.do(both(decoding(8), chunk(256)), last=last)
    part = chunk(256)
    load = Work(8, 4000, 0.25, part.prompt_tokens / 4, part.prompt_positions / 4)
    found = worker.speed.times(load)
    layer_s = seconds(worker.decode, load, worker.prompt)
    expected = (TASK_S, layer_s, seconds(HEAD, decoding(8)), 0.0, 0.0)
    assert astuple(found) == pytest.approx(expected, rel=0.03)


def test_the_head_gets_slower_with_the_layers_though_it_is_not_seen() -> None:
    worker = Worker(head=HEAD)
    worker.run(mixed(1, 50))
    for work in mixed(2, 50):
        worker.do(work, last=True)
    worker.run(mixed(3, 50))
    before = speed_of(worker, decoding(8))
    worker.slower = 4.0
    worker.run(mixed(4, 30))
    after = speed_of(worker, decoding(8))
    assert after.layer_s == pytest.approx(4 * before.layer_s, rel=0.1)
    assert after.task_s == pytest.approx(4 * before.task_s, rel=0.1)
    assert after.last_s == pytest.approx(4 * before.last_s, rel=0.1)


# ------------------------------------------------------------------ error, whatever comes


def test_the_error_is_that_of_predictions_made_before() -> None:
    worker = Worker()
    worker.do(decoding(4))
    assert worker.speed.error is None
    worker.do(decoding(4), 1.25)
    assert worker.speed.error == pytest.approx(0.2)
    worker.run([decoding(4)] * 100)
    assert worker.speed.error == pytest.approx(0.0, abs=1e-3)
    worker.run([decoding(4)] * 100, noise(1, 100))
    assert worker.speed.error == pytest.approx(0.1, abs=0.05)


def test_same_tasks_same_answer_however_often_it_is_asked() -> None:
    found = []
    for asked in (0, 3):
        worker = Worker(STEEP)
        for work, factor in zip(mixed(1, 100), noise(1, 100), strict=True):
            worker.do(work, factor)
            for _ in range(asked):
                assert worker.speed.times(work).layer_s > 0
        found.append((speed_of(worker, decoding(5)), worker.speed.error))
    assert found[0] == found[1]


anything = st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e9))
amounts = st.integers(0, 1_000_000).map(float)
spans = st.one_of(st.just(0.0), st.floats(0, 1e10))
works = st.builds(Work, amounts, spans, st.sampled_from([0.0, 0.3, 1.0]), amounts, spans)
numbers = dict.fromkeys(("layers_s", "other_s", "now"), anything)
observations = st.fixed_dictionaries(
    {"work": works, "layers": st.floats(1e-3, 1e3), "is_last": st.booleans(), **numbers}
)


# ------------------------------------------------------------------ another speed, without tasks


@TRUTHS
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_all_that_was_measured_is_rescaled_in_proportion(truth: Cost, factor: float) -> None:
    worker = Worker(truth)
    for work in mixed(1, 200):
        worker.do(work)
        worker.do(work, last=True)
        worker.do(chunk(64))
    before, other = worker.speed, worker.speed.rescaled(factor)
    for load in (decoding(1), both(decoding(16), chunk(64))):
        was, now = before.times(load), other.times(load)
        assert now.layer_s == pytest.approx(factor * was.layer_s)
        assert now.task_s == pytest.approx(factor * was.task_s)
        assert now.last_s == pytest.approx(factor * was.last_s)
    assert other.first_scale(decoding(1)) == before.first_scale(decoding(1))
    assert other.error == before.error


def test_what_is_rescaled_is_another_one() -> None:
    worker = Worker()
    worker.run(mixed(1, 50))
    before = worker.speed.layer_s(decoding(1))
    worker.speed.rescaled(4.0)
    assert worker.speed.layer_s(decoding(1)) == before


def test_what_was_not_measured_is_not_rescaled() -> None:
    speed = WorkerSpeed(PRIOR).rescaled(4.0)
    assert not speed.measured
    assert speed.times(decoding(1)) == WorkerSpeed(PRIOR).times(decoding(1))


@pytest.mark.parametrize("slower", [0.6, 1.0, 1.6])
def test_a_few_tasks_count_more_than_a_rescaling_that_was_wrong(slower: float) -> None:
    worker = Worker()
    worker.run(mixed(1, 200))
    worker.speed = worker.speed.rescaled(1.0)
    worker.slower = slower
    worker.run(mixed(2, 8))
    assert worker.off(decoding(4)) == pytest.approx(1, abs=0.12)


def test_tasks_that_were_suspect_before_are_forgotten_with_the_speed_of_then() -> None:
    worker = Worker()
    worker.run(mixed(1, 200))
    worker.run(mixed(2, 3), [4.0, 4.0, 4.0])
    worker.speed = worker.speed.rescaled(4.0)
    before = worker.speed.layer_s(decoding(4))
    worker.run([decoding(4)], [40.0])
    assert worker.speed.layer_s(decoding(4)) >= before


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(observations, max_size=30), works, works)
def test_is_sane_whatever_is_observed(seen: list[dict[str, Any]], work: Work, more: Work) -> None:
    speed = WorkerSpeed(PRIOR)
    for each in seen:
        speed.observe(**each)
    larger = Work(*(a + b for a, b in zip(astuple(work), astuple(more), strict=True)))
    small, large = (speed.layer_s(at) for at in (work, larger))
    assert 0 <= small <= large * (1 + 1e-9) < math.inf
    found, beyond = (speed.times(at) for at in (work, larger))
    assert 0 <= found.layer_s <= beyond.layer_s * (1 + 1e-9) < math.inf
    assert min(found.task_s, found.last_s) >= 0
    assert max(found.task_s, found.last_s, beyond.task_s, beyond.last_s) < math.inf
    assert speed.error is None or 0 <= speed.error < math.inf
    scale = speed.first_scale(work)
    assert scale is None or 0 < scale < math.inf


# ------------------------------------------------------------------ trials


def trials(
    worker: Worker, factors: Iterable[float] = repeat(1.0), *, last: bool = False
) -> list[StageTrial]:
    """Return what a worker with LAYERS layers would report of larger and larger steps."""
    sizes = [
        size for n in (1, 4, 16, 64) for size in ((n, 8, 1), (1, 0, 8 * n), (1, 8 * n, 1))
    ]  # (sequences, start, tokens of each)
    found = []
    for (sequences, start, num_tokens), factor in zip(sizes, factors, strict=False):
        bare = StageTime(compute_us=0, layers_us=0, queued_us=0)
        trial = StageTrial(sequences=sequences, start=start, num_tokens=num_tokens, time=bare)
        work = work_of_trial(trial)
        layers_s = worker.slower * factor * LAYERS * seconds(worker.decode, work, worker.prompt)
        other_s = worker.slower * factor * TASK_S + last * seconds(worker.head, work)
        time = StageTime(
            compute_us=round(1e6 * (layers_s + other_s)),
            layers_us=round(1e6 * layers_s),
            queued_us=0,
        )
        found.append(msgspec.structs.replace(trial, time=time))
    return found


def tried(worker: Worker, factors: Iterable[float] = repeat(1.0)) -> Worker:
    worker.speed.try_out(trials(worker, factors), layers=LAYERS, is_last=False, now=worker.now)
    return worker


@TRUTHS
@pytest.mark.parametrize("slower", [0.2, 1.0, 7.0])
def test_trials_tell_all_sizes(truth: Cost, slower: float) -> None:
    worker = tried(Worker(decode=truth, prompt=(truth[1] / 3, truth[2]), slower=slower))
    for sequences in (1, 2, 8, 32, 64):
        assert worker.off(decoding(sequences, 10)) == pytest.approx(1.0, abs=0.05)
        assert worker.off(decoding(sequences, 300)) == pytest.approx(1.0, abs=0.2)
        assert worker.off(chunk(8 * sequences)) == pytest.approx(1.0, abs=0.07)
        step = both(decoding(sequences, 10), chunk(64))
        assert worker.off(step) == pytest.approx(1.0, abs=0.07)


@TRUTHS
def test_after_trials_the_tasks_of_one_size_tell_the_speed_at_all_sizes(truth: Cost) -> None:
    """The trials were slowed down by others; then all steps have the size 6."""
    worker = tried(Worker(decode=truth, slower=3.0))
    worker.slower = 1.0
    worker.run([decoding(6)] * 60, noise(3, 60))
    for sequences in (1, 6, 16, 40):
        assert worker.off(decoding(sequences)) == pytest.approx(1.0, abs=0.2)


def test_a_task_tells_the_speed_better_than_all_trials() -> None:
    worker = tried(Worker(slower=1.5))
    worker.slower = 1.0
    worker.run([decoding(8, 10)])
    assert worker.off(decoding(8, 10)) < 1.1
    assert worker.off(decoding(32, 10)) < 1.1


def test_trials_that_differ_from_the_prior_are_no_change_of_speed() -> None:
    worker = tried(Worker(decode=STEEP))
    assert worker.off(decoding(64, 10)) == pytest.approx(1.0, abs=0.05)
    assert worker.off(decoding(1, 10)) == pytest.approx(1.0, abs=0.05)


def test_what_trials_foretell_is_a_guess_until_there_are_tasks() -> None:
    worker = Worker()
    assert worker.speed.error is None
    tried(worker)
    assert worker.speed.measured
    assert worker.speed.error is None
    assert worker.speed.doubt == 2.0
    worker.run([decoding(8, 10)] * 5)
    assert worker.speed.error is not None
    assert worker.speed.doubt == worker.speed.error < 0.2


def test_trials_of_the_last_stage_tell_the_head() -> None:
    worker = Worker(head=(2e-3, 1e-4, 0.0))
    some = trials(worker, last=True)
    worker.speed.try_out(some, layers=LAYERS, is_last=True, now=0.0)
    found = worker.speed.times(decoding(32, 10))
    assert found.task_s + found.last_s == pytest.approx(TASK_S + 2e-3 + 32e-4, rel=0.1)


def test_no_trials_tell_nothing() -> None:
    speed = WorkerSpeed(PRIOR)
    speed.try_out([], layers=LAYERS, is_last=False, now=0.0)
    assert not speed.measured
    assert speed.error is None


def test_a_snapshot_does_not_change_and_changes_nothing() -> None:
    def task(speed: WorkerSpeed, now: float, layers_s: float) -> None:
        speed.observe(
            decoding(4), layers=2.0, is_last=False, layers_s=layers_s, other_s=1e-4, now=now
        )

    speed = WorkerSpeed(PRIOR)
    for number in range(10):
        task(speed, float(number), 0.01 if number % 2 else 0.03)  # some look like a change
    before, kept = speed.snapshot(), speed.times(decoding(4))
    for number in range(10, 40):
        task(speed, float(number), 0.08)
    assert before.times(decoding(4)) == kept
    assert speed.times(decoding(4)) != kept
    after, doubt = speed.times(decoding(4)), speed.doubt
    task(before, 50.0, 0.5)
    before.rescaled(3.0)
    assert (speed.times(decoding(4)), speed.doubt) == (after, doubt)
