"""Workers, coordinators and parents die, freeze and leave; answers stay, or fail clearly."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed_llm import (
    CoordinatorLost,
    DistributedClient,
    Generation,
    LocalCluster,
    NotReady,
    Overloaded,
    WorkerLost,
)
from distributed_llm.common.messages import ClusterStatus
from tests.checkpoints import make_checkpoint
from tests.reference import check_varied, reference_ids
from tests.waiting import eventually
from tests.warm import checked

PROMPT = [5, 17, 42, 99, 7]
OPEN_END: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
QUICK: dict[str, Any] = {"heartbeat_interval_s": 0.2, "silence_timeout_s": 1.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checked(
        make_checkpoint(
            tmp_path_factory.mktemp("checkpoint"), num_layers=6, tokenizer=True, tie=False, seed=10
        )
    )


@contextmanager
def serving(
    checkpoint: Path, workers: int = 3, **settings: Any
) -> Iterator[tuple[LocalCluster, DistributedClient]]:
    settings = {"strategy": "memory", **settings}
    slow = [{"slowdown": 5.0}] * workers  # or an answer is complete before the deed is done
    with (
        LocalCluster(checkpoint, slow, coordinator=settings) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        yield cluster, client


def stage_of(status: ClusterStatus, name: str) -> int:
    order = sorted(worker.layers for worker in status.workers if worker.layers)
    held = next(worker.layers for worker in status.workers if worker.name == name)
    assert held is not None
    return order.index(held)


def test_each_stage_may_die_in_the_middle_of_an_answer(checkpoint: Path) -> None:
    expected = reference_ids(checkpoint, PROMPT, 60)
    check_varied(expected)
    with serving(checkpoint, workers=4) as (cluster, client):
        for turn, victim in enumerate(cluster.workers[:3]):
            got: list[int] = []
            for chunk in client.stream(PROMPT, max_new_tokens=60, **OPEN_END):
                if len(got) == 5 + 10 * turn:
                    victim.kill()
                got += chunk.token_ids
            assert got == expected
        status = client.status()
        assert [worker.name for worker in status.workers] == ["worker-4"]
        assert status.requests_failed == 0


def test_many_answers_survive_a_death(checkpoint: Path) -> None:
    prompts = [[10 + i] * (1 + 9 * i) for i in range(8)]
    with serving(checkpoint) as (cluster, client):
        streams = [client.stream(p, max_new_tokens=40, **OPEN_END) for p in prompts]
        for stream in streams:
            next(stream)
        cluster.workers[1].kill()
        answers = [list(stream)[-1].generation for stream in streams]
    assert [answer.token_ids for answer in answers if answer] == [
        reference_ids(checkpoint, prompt, 40) for prompt in prompts
    ]


def test_a_frozen_worker_is_replaced_and_comes_back(checkpoint: Path) -> None:
    expected = reference_ids(checkpoint, PROMPT, 60)
    with serving(checkpoint, **QUICK) as (cluster, client):
        frozen = cluster.workers[0]
        got: list[int] = []
        for chunk in client.stream(PROMPT, max_new_tokens=60, **OPEN_END):
            if len(got) == 10:
                os.kill(frozen.pid, signal.SIGSTOP)
            got += chunk.token_ids
        assert got == expected
        assert "worker-1" not in {worker.name for worker in client.status().workers}
        os.kill(frozen.pid, signal.SIGCONT)
        cluster.wait_until_serving(num_workers=3)
        answer = client.generate(PROMPT, max_new_tokens=60, details=True, **OPEN_END)
        assert answer.token_ids == expected


def test_a_worker_that_leaves_on_purpose_fails_nothing(checkpoint: Path) -> None:
    with serving(checkpoint) as (cluster, client):
        got: list[int] = []
        for chunk in client.stream(PROMPT, max_new_tokens=60, **OPEN_END):
            if len(got) == 10:
                cluster.workers[2].terminate()
            got += chunk.token_ids
        assert got == reference_ids(checkpoint, PROMPT, 60)
        assert cluster.workers[2].wait(20) == 0


def test_a_late_worker_is_used_once_the_cluster_is_idle(checkpoint: Path) -> None:
    with serving(checkpoint, workers=1) as (cluster, client):
        cluster.add_worker(name="late")
        status = cluster.wait_until_serving(num_workers=2)
        assert {worker.name for worker in status.workers} == {"worker-1", "late"}
        answer = client.generate(PROMPT, max_new_tokens=20, details=True, **OPEN_END)
        assert {stage.worker for stage in answer.timings.stages} == {"worker-1", "late"}
        assert answer.token_ids == reference_ids(checkpoint, PROMPT, 20)


def test_without_workers_requests_fail_clearly_and_a_new_worker_heals(checkpoint: Path) -> None:
    with serving(checkpoint, workers=1) as (cluster, client):
        stream = client.stream(PROMPT, max_new_tokens=200, **OPEN_END)
        next(stream)
        cluster.workers[0].kill()
        with pytest.raises(WorkerLost, match=r"worker-1 serves its layers no longer.*Start one"):
            list(stream)
        with pytest.raises(NotReady, match="No worker is there"):
            client.generate(PROMPT)
        cluster.add_worker(name="healer")
        cluster.wait_until_serving()
        answer = client.generate(PROMPT, max_new_tokens=20, details=True, **OPEN_END)
        assert answer.token_ids == reference_ids(checkpoint, PROMPT, 20)


def test_a_coordinator_that_dies_is_noticed_and_its_successor_found(checkpoint: Path) -> None:
    with serving(checkpoint, workers=2) as (cluster, client):
        stream = client.stream(PROMPT, max_new_tokens=200, **OPEN_END)
        next(stream)
        cluster.coordinator.kill()
        with pytest.raises(CoordinatorLost, match="ask again"):
            list(stream)
        port = cluster.address.rpartition(":")[2]
        with LocalCluster(
            checkpoint,
            workers=0,
            coordinator={"strategy": "memory", "bind": f"127.0.0.1:{port}", "min_workers": 2},
        ) as successor:
            successor.wait_until_serving(num_workers=2)
            answer = client.generate(PROMPT, max_new_tokens=20, details=True, **OPEN_END)
            assert answer.token_ids == reference_ids(checkpoint, PROMPT, 20)


def test_a_frozen_coordinator_is_noticed(checkpoint: Path) -> None:
    with serving(checkpoint, workers=1, **QUICK) as (cluster, client):
        stream = client.stream(PROMPT, max_new_tokens=200, **OPEN_END)
        next(stream)
        os.kill(cluster.coordinator.pid, signal.SIGSTOP)
        with pytest.raises(CoordinatorLost, match="silent"):
            list(stream)
        os.kill(cluster.coordinator.pid, signal.SIGCONT)


def test_closing_a_cluster_leaves_nothing_behind(checkpoint: Path) -> None:
    me = psutil.Process()
    before = (me.num_fds(), threading.active_count())
    with serving(checkpoint, workers=2) as (cluster, client):
        client.generate(PROMPT, max_new_tokens=3)
        pids = [cluster.coordinator.pid, *[worker.pid for worker in cluster.workers]]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    eventually(lambda: (me.num_fds(), threading.active_count()) <= before, limit_s=5)


def test_more_requests_than_the_queue_holds_are_refused_and_the_rest_answered(
    checkpoint: Path,
) -> None:
    prompts = [[10 + i, 7, 5 + i] for i in range(20)]
    limits = {"max_waiting_requests": 4, "max_batch_sequences": 2}
    with serving(checkpoint, workers=1, **limits) as (_, client):

        def ask(prompt: list[int]) -> list[int] | Overloaded:
            try:
                answer: Generation = client.generate(
                    prompt, max_new_tokens=20, details=True, **OPEN_END
                )
                return answer.token_ids
            except Overloaded as exc:
                return exc

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(ask, prompts))
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        assert refused
        assert all(error.retry_after_s > 0 for error in refused)
        answered = [(p, a) for p, a in zip(prompts, answers, strict=True) if isinstance(a, list)]
        assert answered
        assert all(ids == reference_ids(checkpoint, prompt, 20) for prompt, ids in answered)
        eventually(lambda: client.status().answers_running == 0)
        assert client.status().kv_tokens_used == 0
