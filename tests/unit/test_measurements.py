"""What is known of machines and links: from tasks, from reports, and from probes of idle ones."""

from collections.abc import Sequence
from dataclasses import astuple, replace
from statistics import median
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distributed_llm.common.messages import (
    Capabilities,
    LinkReport,
    SequenceSlice,
    StageTime,
    StageTrial,
)
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.measurements import Measurements
from distributed_llm.coordinator.speeds.work import Work, work_of
from distributed_llm.coordinator.speeds.worker_speed import Prior

COST = ModelCost((1_000_000, 3_000_000), 0, 400_000, 0, layer_kv_bytes=(1000, 1000))
ITEM_BYTES = 2
FOUND = Capabilities(
    device="cpu",
    device_name="A CPU",
    platform="none",
    memory_bytes=10_000_000,
    cores=2,
    threads=2,
    memory_bandwidth_bytes_per_s=1e9,
    flops_per_s=1e10,
)
A, B = WorkerId("a"), WorkerId("b")
STAGES = (
    PipelineStage(PeerId(b"a"), A, LayerRange(0, 1)),
    PipelineStage(PeerId(b"b"), B, LayerRange(1, 2)),
)
TOKEN = Work(1, 1)
HEAVY, LIGHT = 1.5, 0.5
"""Layers of mean size that a layer of `COST` is."""

LOAD = Work(1, 1, prompts=0.5, prompt_tokens=10, prompt_positions=200)
factors = st.floats(0.05, 20)


def found(faster: float = 1.0, *, flops_faster: float | None = None) -> Capabilities:
    """Return what the probe of a machine so many times faster than at the start finds."""
    return msgspec.structs.replace(
        FOUND,
        memory_bandwidth_bytes_per_s=faster * FOUND.memory_bandwidth_bytes_per_s,
        flops_per_s=(flops_faster or faster) * FOUND.flops_per_s,
    )


def two_workers() -> Measurements:
    """Return what is known once both have joined."""
    known = Measurements(COST, item_bytes=ITEM_BYTES, bytes_per_token=1000)
    known.joined(A, found())
    known.joined(B, found())
    return known


def decode(
    known: Measurements,
    *stages_s: float,
    took_s: float = 0.0,
    now: float = 0.0,
    stages: Sequence[PipelineStage] = STAGES,
) -> list[float | None]:
    """Have a step of one token observed, whose stages spend all their time in the layer.

    Returns what was expected of them.
    """
    part = SequenceSlice(sequence_id=SequenceId(1), start=0, num_tokens=1, sample=True)
    step = Step((), (part,), (7,))
    times = tuple(
        StageTime(compute_us=round(1e6 * s), layers_us=round(1e6 * s), queued_us=0)
        for s in stages_s
    )
    done = StepDone(step, [8], [None], times, 1, took_s or sum(stages_s))
    return known.observe(stages, done, now=now)


def layer_s(known: Measurements, worker: WorkerId, work: Work = TOKEN) -> float:
    """Return what a layer of mean size takes in a step that decodes."""
    return known.machines({worker: FOUND.memory_bytes}).speeds[worker].layer_s(work)


def after_tasks(seconds: float = 0.012) -> Measurements:
    """Return what is known after tasks in which a layer of mean size takes A so long."""
    known = two_workers()
    for at in range(100):
        decode(known, LIGHT * seconds, HEAVY * 0.02, now=0.1 * at)
    assert layer_s(known, A) == pytest.approx(seconds, rel=0.01)
    return known


def probe(known: Measurements, *speeds: float, worker: WorkerId = A) -> None:
    for faster in speeds:
        known.remeasured(worker, found(faster))


# ------------------------------------------------------------------ tasks


def test_layers_count_by_their_size() -> None:
    known = after_tasks(0.012)
    assert layer_s(known, B) == pytest.approx(0.02, rel=0.01)
    assert known.error(A) == pytest.approx(0.0, abs=0.01)


def test_a_worker_that_is_not_known_any_more_teaches_nothing() -> None:
    known = after_tasks()
    known.left(B)
    decode(known, 0.006, 0.03)
    assert known.error(B) is None
    probe(known, 2.0, worker=B)
    assert known.error(B) is None


def test_a_worker_that_joins_again_is_a_stranger() -> None:
    known = after_tasks()
    known.left(A)
    known.joined(A, found())
    assert known.error(A) is None
    assert layer_s(known, A) == pytest.approx(unmeasured_s(1.0))


def test_work_is_tokens_and_the_positions_that_they_attend_to() -> None:
    parts = (
        SequenceSlice(sequence_id=SequenceId(1), start=10, num_tokens=1),
        SequenceSlice(sequence_id=SequenceId(2), start=4, num_tokens=3),
    )
    assert work_of(Step((), parts[:1], (0,))) == Work(1, 11)
    assert work_of(Step((), parts, (0, 0, 0, 0))) == Work(1, 11, 1, 3, 5 + 6 + 7)


# ------------------------------------------------------------------ trials


def tried(
    known: Measurements, worker: WorkerId, held: LayerRange, layer_s: float, away_s: float = 0.0
) -> None:
    """Say that a layer takes so long, and a tenth of that more for every token."""
    trials = [
        StageTrial(
            sequences=sequences,
            start=start,
            num_tokens=tokens,
            time=StageTime(compute_us=took_us + 1000, layers_us=took_us, queued_us=0),
        )
        for n in (1, 4, 16)
        for sequences, start, tokens in ((n, 8, 1), (1, 0, 8 * n))
        for took_us in [round(1e6 * layer_s * len(held) * (1 + sequences * tokens / 10))]
    ]
    known.tried(worker, held, trials, now=0.0, away_s=away_s)


def test_what_weights_take_that_are_away_is_no_part_of_a_speed() -> None:
    """Else it would count twice where layers are away, and once too often where none are."""
    known, away = two_workers(), (replace(STAGES[0], away_s=1.0), STAGES[1])
    for at in range(100):
        (expected, _) = decode(known, 1 + LIGHT * 0.3, HEAVY * 0.02, now=0.1 * at, stages=away)
    assert layer_s(known, A) == pytest.approx(0.3, rel=0.01)
    assert expected == pytest.approx(1.15, rel=0.01)
    assert known.error(A) == pytest.approx(0.0, abs=0.01)
    decode(known, LIGHT * 0.3, HEAVY * 0.02, now=11.0, stages=away)  # all came meanwhile
    assert 0.0 < layer_s(known, A) < 0.31


def test_what_weights_take_that_are_away_is_no_part_of_trials() -> None:
    known, plain = two_workers(), two_workers()
    tried(known, A, LayerRange(0, 1), 4.0, away_s=0.7)
    tried(plain, A, LayerRange(0, 1), 4.0)
    assert layer_s(plain, A) - layer_s(known, A) == pytest.approx(0.7 / LIGHT, rel=0.01)


def test_a_worker_is_untried_until_it_has_tried_or_done_something() -> None:
    known = two_workers()
    assert known.untried(A)
    assert known.untried(B)
    assert not known.untried(WorkerId("stranger"))
    tried(known, A, LayerRange(0, 1), 0.01)
    decode(known, 0.006, 0.03)
    assert not known.untried(A)
    assert not known.untried(B)


def test_trials_tell_what_layers_take() -> None:
    known = two_workers()
    tried(known, A, LayerRange(0, 2), 0.01)
    for tokens in (1, 8, 16):
        expected = pytest.approx(0.01 * (1 + tokens / 10), rel=0.05)
        assert layer_s(known, A, Work(tokens, 9 * tokens)) == expected
    assert layer_s(known, A, Work.of_prompt(64, 32 * 65)) == pytest.approx(0.074, rel=0.06)


def test_what_is_beside_the_last_layer_is_the_head_as_well() -> None:
    known = two_workers()
    tried(known, A, LayerRange(0, 1), 0.01)
    tried(known, B, LayerRange(1, 2), 0.01)
    first, last = (machines(known).speeds[worker].times(Work(1, 9)) for worker in (A, B))
    assert first.task_s == pytest.approx(0.001, rel=0.05)
    assert last.task_s == pytest.approx(0.0005, rel=0.05)
    assert last.task_s + last.last_s == pytest.approx(0.001, rel=0.05)


def test_a_layer_that_is_tried_counts_by_its_size() -> None:
    known = two_workers()
    tried(known, A, LayerRange(0, 1), 0.01 * LIGHT)
    tried(known, B, LayerRange(1, 2), 0.01 * HEAVY)
    for worker in (A, B):
        assert layer_s(known, worker, Work(4, 36)) == pytest.approx(0.014, rel=0.05)


def test_trials_of_somebody_who_left_tell_nothing() -> None:
    known = two_workers()
    known.left(A)
    tried(known, A, LayerRange(0, 1), 0.01)
    assert not known.untried(A)
    known.joined(A, found())
    assert known.untried(A)


def test_no_trials_leave_a_worker_untried() -> None:
    known = two_workers()
    known.tried(A, LayerRange(0, 1), (), now=0.0)
    assert known.untried(A)


def test_a_later_probe_changes_what_was_tried() -> None:
    known = two_workers()
    tried(known, A, LayerRange(0, 2), 0.01)
    before = layer_s(known, A)
    probe(known, 1.0, 0.25, 0.25)
    assert layer_s(known, A) == pytest.approx(4 * before, rel=0.01)


# ------------------------------------------------------------------ links and the rest


def test_what_is_neither_stage_nor_hop_is_overhead() -> None:
    known = two_workers()
    report = LinkReport(epoch=Epoch(1), up=True, rtt_s=0.02, bytes_per_s=1e6)
    known.observe_link(A, B, report)
    for at in range(50):
        decode(known, 0.01, 0.02, took_s=0.01 + 0.02 + 0.01 + 0.005, now=at)
    assert machines(known).overhead_s == pytest.approx(0.005, abs=1e-4)


@pytest.mark.parametrize("report", [{"up": False}, {"up": True, "rtt_s": 0.02}])
def test_links_are_known_once_their_speed_was_measured(report: dict[str, Any]) -> None:
    known = two_workers()
    before = known.link_bytes_per_s
    known.observe_link(A, B, LinkReport(epoch=Epoch(1), **report))
    assert known.link_bytes_per_s == before
    known.observe_link(A, B, LinkReport(epoch=Epoch(1), up=True, rtt_s=0.02, bytes_per_s=7e6))
    assert known.link_bytes_per_s == pytest.approx(7e6)
    assert machines(known).links(1000).hop(A, B).latency_s == pytest.approx(0.01)


def machines(known: Measurements) -> Machines:
    return known.machines({stage.worker: FOUND.memory_bytes for stage in STAGES})


def test_machines_stay_as_they_were_when_they_were_asked_for() -> None:
    known = after_tasks(0.012)
    before = machines(known)
    for at in range(50):
        decode(known, 0.06, 0.01, took_s=9.0, now=20.0 + at)
    known.observe_link(A, B, LinkReport(epoch=Epoch(1), up=True, rtt_s=4.0, bytes_per_s=1e6))
    assert before.speeds[A].layer_s(TOKEN) == pytest.approx(0.012, rel=0.01)
    assert before.overhead_s == pytest.approx(0.0, abs=1e-3)
    assert before.links(1).hop(A, B).latency_s < 0.1
    after = machines(known)
    assert after.speeds[A].layer_s(TOKEN) > 0.1
    assert after.overhead_s > 1.0
    assert after.links(1).hop(A, B).latency_s == 2.0
    probe(known, 1.0, 9.0, 9.0)
    assert after.speeds[A].layer_s(TOKEN) > 0.1


# ------------------------------------------------------------------ probes


def unmeasured_s(faster: float) -> float:
    """Return what a layer should take by its probe."""
    prior = Prior.from_capabilities(found(faster), COST, ITEM_BYTES)
    return prior.layer_s + prior.token_s + prior.position_s


def test_the_first_probe_after_the_tasks_changes_nothing() -> None:
    known = after_tasks()
    probe(known, 0.1)
    assert layer_s(known, A) == pytest.approx(0.012, rel=0.01)


@pytest.mark.parametrize("faster", [0.25, 4.0])
def test_a_large_change_shows_with_the_second_probe_of_it(faster: float) -> None:
    known = after_tasks()
    probe(known, 0.7, 0.7, 0.7, 0.7 * faster)
    probe(known, 0.7 * faster)
    assert layer_s(known, A) == pytest.approx(0.012 / faster, rel=0.01)


@given(first=factors, now=factors)
def test_costs_change_as_probes_do(first: float, now: float) -> None:
    assume(not 1 / 1.51 < first / now < 1.51)
    known = after_tasks()
    probe(known, first, now, now, now)
    assert layer_s(known, A) == pytest.approx(0.012 * first / now, rel=0.01)
    assert layer_s(known, B) == pytest.approx(0.02, rel=0.01)


@given(
    noise=st.lists(st.floats(0.81, 1.19), min_size=2, max_size=30),
    wild=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_neither_noise_nor_one_probe_that_is_far_off_count(noise: list[float], wild: float) -> None:
    known = after_tasks()
    probe(known, *noise, wild)
    assert layer_s(known, A) == pytest.approx(0.012, rel=0.01)


@given(st.lists(factors, min_size=3, max_size=10))
def test_the_latest_three_count(speeds: list[float]) -> None:
    known = after_tasks()
    probe(known, *speeds)
    usual_s = 0.012 * speeds[0] / median(speeds[-3:])
    assert 0.99 / 1.5 < layer_s(known, A) / usual_s < 1.01 * 1.5


@pytest.mark.parametrize("slower", [1.0, 20.0])
def test_operations_count_for_as_much_as_they_do_for_a_token(slower: float) -> None:
    known = after_tasks()
    known.remeasured(A, found(1.0))
    for _ in range(3):
        known.remeasured(A, found(1.0, flops_faster=1 / slower))
    prior = Prior.from_capabilities(found(), COST, ITEM_BYTES)
    change = (prior.layer_s + slower * prior.token_s) / (prior.layer_s + prior.token_s)
    assert change < 3.0 if slower > 1.0 else change == 1.0
    assert layer_s(known, A) == pytest.approx(0.012 * change, rel=0.01)


def test_tasks_tell_more_than_probes_and_the_next_probe_is_a_first_one() -> None:
    known = after_tasks()
    probe(known, 1.0, 4.0, 4.0)
    assert layer_s(known, A) == pytest.approx(0.003, rel=0.01)
    for at in range(8):
        decode(known, LIGHT * 0.005, HEAVY * 0.02, now=60.0 + 0.1 * at)
    assert layer_s(known, A) == pytest.approx(0.005, rel=0.1)
    before = layer_s(known, A)
    probe(known, 0.5, 0.5, 0.5)
    assert layer_s(known, A) == pytest.approx(before)
    probe(known, 1.0, 1.0)
    assert layer_s(known, A) == pytest.approx(before / 2)


def test_sizes_of_steps_compare_as_they_were_measured() -> None:
    known = after_tasks()
    before = layer_s(known, A, Work(20, 400)) / layer_s(known, A)
    probe(known, 1.0, 4.0, 4.0)
    assert layer_s(known, A, Work(20, 400)) / layer_s(known, A) == pytest.approx(before)


def test_who_never_had_a_task_is_expected_to_take_what_its_latest_probes_say() -> None:
    known = two_workers()
    assert layer_s(known, A) == pytest.approx(unmeasured_s(1.0))
    probe(known, 4.0)
    assert layer_s(known, A) == pytest.approx(unmeasured_s(1.0))  # of two the slower
    probe(known, 4.0)
    assert layer_s(known, A) == pytest.approx(unmeasured_s(4.0))
    probe(known, 0.25, 0.25)
    assert layer_s(known, A) == pytest.approx(unmeasured_s(0.25))
    assert layer_s(known, B) == pytest.approx(unmeasured_s(1.0))
    assert known.error(A) is None


def test_the_same_probes_teach_the_same() -> None:
    taught = []
    for _ in range(2):
        known = after_tasks()
        probe(known, 1.0, 3.0, 0.5, 2.0)
        taught.append((layer_s(known, A), astuple(machines(known).speeds[A].times(LOAD))))
    assert taught[0] == taught[1]
