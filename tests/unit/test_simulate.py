"""The simulation for benchmarks: every request ends, and its figures add up."""

from dataclasses import replace

import pytest

from benchmarks.scenario import Scenario
from benchmarks.simulate import Run, report, simulate
from benchmarks.virtual_client import jain
from benchmarks.virtual_cluster import VirtualCluster

SMALL = Scenario(workers=4, pipelines=2, requests=24, clients=3, prompt=20, answer=8, batch=4)


@pytest.fixture(scope="module")
def run() -> Run:
    return simulate(SMALL)


def test_all_requests_finish(run: Run) -> None:
    assert dict(run.cluster.seen.ended) == {"finished": SMALL.requests}
    assert len(run.cluster.seen.ttft_s) == SMALL.requests


def test_steps_go_through_every_stage_once(run: Run) -> None:
    assert run.cluster.relays == 0
    assert run.cluster.tasks == 2 * run.cluster.steps
    assert [len(group) for group in run.cluster.busy] == [2, 2]
    assert all(0 < share <= 1 for group in run.cluster.busy for share in group)


def test_same_seed_same_run(run: Run) -> None:
    again = simulate(SMALL)
    assert again.cluster.seen.gaps_s == run.cluster.seen.gaps_s
    assert again.serving.count == run.serving.count


def test_workers_that_reach_no_other_are_relayed() -> None:
    run = simulate(replace(SMALL, relayed=1.0))
    assert run.cluster.relays == run.cluster.steps


def test_workers_may_die_and_others_come() -> None:
    run = simulate(replace(SMALL, workers=8, requests=48, lifetime_s=20.0, rejoin_s=2.0))
    assert run.cluster.deaths > 0
    assert run.cluster.seen.ended.total() == 48


def test_layers_leave_a_worker_that_becomes_slow_while_requests_run() -> None:
    cluster = VirtualCluster(
        replace(
            SMALL,
            workers=3,
            pipelines=1,
            requests=400,
            spread=0.0,
            spare=4.0,
            strategy="speed",
            objective="throughput",
        )
    )
    cluster.start()
    cluster.begin_asking()
    slow, *others = cluster.workers.values()
    changes_at = cluster.now + 5.0
    cluster.run(lambda: cluster.now >= changes_at, limit_s=10)
    assert cluster.core.status(now=cluster.now).moves == 0
    slow.slowness *= 4

    def held() -> list[int]:
        orders = (worker.served for worker in (slow, *others))
        return [len(order.layers) if order else 0 for order in orders]

    whole = cluster.scenario.num_layers
    cluster.run(lambda: held()[0] < min(held()[1:]) and sum(held()) == whole, limit_s=20)
    cluster.run(lambda: cluster.seen.ended.total() == 400, limit_s=1000)
    assert dict(cluster.seen.ended) == {"finished": 400}


def test_what_exceeds_the_queue_is_refused() -> None:
    run = simulate(replace(SMALL, waiting=8))
    ended = run.cluster.seen.ended
    assert ended["overloaded"] > 0
    assert ended["finished"] + ended["overloaded"] == SMALL.requests


def test_a_stage_is_idle_while_requests_are_few(run: Run) -> None:
    alone = simulate(replace(SMALL, pipelines=1, requests=1))
    assert max(alone.cluster.busy[0]) < 0.5
    gap_s = sum(alone.cluster.seen.gaps_s) / len(alone.cluster.seen.gaps_s)
    assert gap_s > 4 * SMALL.stage_ms / 1000 * 0.8


def test_report_names_what_was_measured(run: Run) -> None:
    text = report(run)
    for line in ("| requests | 24 finished |", "µs per task", "| serving | TaskResult |", "Jain"):
        assert line in text


@pytest.mark.parametrize(
    ("shares", "index"), [([1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([0, 0], 1.0), ([1, 2], 0.9)]
)
def test_jain(shares: list[float], index: float) -> None:
    assert jain(shares) == pytest.approx(index)
