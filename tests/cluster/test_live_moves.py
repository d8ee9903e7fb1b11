"""Layers move between real workers while answers are written, and no answer shows it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed_llm import (
    DistributedClient,
    Generation,
    LocalCluster,
    NotEnoughMemory,
    NotReady,
    WorkerLost,
)
from distributed_llm.common.messages import ClusterStatus, WorkerStatus
from distributed_llm.common.types import LayerRange
from distributed_llm.local_process import LocalProcess
from tests.checkpoints import make_checkpoint
from tests.fault_proxy import FaultProxy, Faults
from tests.reference import check_greedy, reference_ids
from tests.waiting import eventually
from tests.warm import checked

pytestmark = pytest.mark.timeout(120)

NUM_LAYERS = 8
PROMPTS = tuple((3 + n, *((7 * i + n) % 90 + 3 for i in range(n))) for n in (4, 11, 30))
NUM_TOKENS = 900
"""Tokens of each answer at most: more than any test waits for before it ends the answers."""

OPEN_END: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SLOWDOWN = 2.5
SETTINGS: dict[str, Any] = {
    "strategy": "speed",
    "objective": "throughput",
    "replicas": 1,
    "max_batch_tokens": 16,
}
WORKER: dict[str, Any] = {"threads": 1, "leave_timeout_s": 60, "max_memory": "512MiB"}
KV_BYTES = 2 * 2 * 96 * 4
"""KV cache of one position in one layer: keys and values of two heads of 96 float32 numbers."""

LONG_PROMPT = [(11 * i) % 250 + 3 for i in range(600)]
LIMIT_S = 60.0
"""Time limit of whatever is awaited, seconds; four times what any takes on a quiet machine."""


def make_movable_checkpoint(folder: Path) -> Path:
    return checked(
        make_checkpoint(
            folder,
            num_layers=NUM_LAYERS,
            tokenizer=True,
            tie=False,
            seed=10,
            hidden_size=384,  # so that weights are seen in the memory of a process
            intermediate_size=1024,
            max_position_embeddings=1024,
        )
    )


@pytest.fixture(scope="module")
def movable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_movable_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")


# ------------------------------------------------------------------ answers


class Answer:
    """An answer that comes while the test goes on; read in a thread of its own."""

    def __init__(self, client: DistributedClient, prompt: Sequence[int], **asked: Any) -> None:
        self.token_ids: list[int] = []
        self.generation: Generation | None = None
        self.error: Exception | None = None
        self._enough = threading.Event()
        self._stream = client.stream(
            list(prompt), **{"max_new_tokens": NUM_TOKENS, **OPEN_END, **asked}
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            with closing(self._stream) as stream:  # type: ignore[type-var]
                for chunk in stream:
                    self.token_ids += chunk.token_ids
                    self.generation = chunk.generation
                    if self._enough.is_set():
                        return
        except Exception as exc:
            self.error = exc

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def end(self, *, complete: bool) -> None:
        """Wait for its end, or end it."""
        if not complete:
            self._enough.set()
        self._thread.join(LIMIT_S)
        assert self.has_ended


class Answers:
    """Answers to all prompts that are under way; a context manager that ends them."""

    def __init__(self, client: DistributedClient, checkpoint: Path, **asked: Any) -> None:
        self._checkpoint = checkpoint
        self._answers = [Answer(client, prompt, **asked) for prompt in PROMPTS]

    def __enter__(self) -> "Answers":
        try:
            self.go_on()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def errors(self) -> list[Exception | None]:
        return [answer.error for answer in self._answers]

    def go_on(self, num_tokens: int = 3) -> None:
        """Wait until each has got so many more tokens; none may have ended."""
        wanted = [len(answer.token_ids) + num_tokens for answer in self._answers]

        def have_got_them() -> bool:
            self.check_under_way()
            return all(
                len(answer.token_ids) >= number
                for answer, number in zip(self._answers, wanted, strict=True)
            )

        eventually(have_got_them, limit_s=LIMIT_S)

    def check_under_way(self) -> None:
        """Fail if one has failed, or has ended before the test had seen what it waits for."""
        assert self.errors == [None] * len(PROMPTS)
        assert not any(answer.has_ended for answer in self._answers)

    def end(self, *, complete: bool = False) -> None:
        for answer in self._answers:
            answer.end(complete=complete)

    def check(self) -> None:
        """End them; fail if one is not what transformers answers."""
        self.end()
        assert self.errors == [None] * len(PROMPTS)
        for prompt, answer in zip(PROMPTS, self._answers, strict=True):
            check_greedy(self._checkpoint, prompt, answer.token_ids)

    def finish(self) -> list[Generation]:
        """Wait until they are complete, and check them."""
        self.end(complete=True)
        self.check()
        whole = [answer.generation for answer in self._answers if answer.generation]
        assert len(whole) == len(PROMPTS)
        return whole


# ------------------------------------------------------------------ kinds of requests

Ask = Callable[[DistributedClient], list[Generation]]


def kind(prompt: str, **asked: Any) -> Ask:
    asked = {"max_new_tokens": 80, "n": 1, "ignore_eos": True, **asked}
    return lambda client: client.generate(prompt, details=True, **asked)


SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
SHARED = "A worker holds its layers and the cache of those layers. " * 3
KINDS: dict[str, Ask] = {
    "sampled": kind("The quick brown fox", **SAMPLED),
    "two of a prompt": kind("Viktor", **{**SAMPLED, "n": 2}),
    "penalties": kind("lazy dog", temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5),
    "log-probabilities": kind("Deich", temperature=0.0, logprobs=3),
    "a prefix": kind(SHARED + "One", temperature=0.0),
    "the same prefix": kind(SHARED + "Two", **SAMPLED),
}


def assert_same(alone: list[Generation], moving: list[Generation]) -> None:
    """Fail unless the answers to a request are the same; numbers may differ in the last digits."""
    for one, other in zip(alone, moving, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert one.finish_reason == other.finish_reason
        assert [pick.logprob for pick in one.logprobs or ()] == pytest.approx(
            [pick.logprob for pick in other.logprobs or ()], abs=1e-3
        )


# ------------------------------------------------------------------ clusters


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Fail if child processes, open files or threads are there at the end that were not before."""
    me = psutil.Process()

    def held() -> tuple[int, int, int]:
        return len(me.children(recursive=True)), me.num_fds(), threading.active_count()

    before = held()
    yield
    eventually(lambda: all(now <= was for now, was in zip(held(), before, strict=True)))


def serving(status: ClusterStatus) -> dict[str, LayerRange]:
    """Return who serves which layers, in their order."""
    held = {w.name: w.layers for w in status.workers if w.layers and w.state != "loading"}
    return dict(sorted(held.items(), key=lambda item: item[1]))


def check_whole(status: ClusterStatus) -> None:
    """Fail unless every layer is served by one worker."""
    layers = serving(status).values()
    assert [n for held in layers for n in range(held.start, held.stop)] == [*range(NUM_LAYERS)]


def worker_of(status: ClusterStatus, name: str) -> WorkerStatus:
    return next(worker for worker in status.workers if worker.name == name)


def is_idle(client: DistributedClient) -> bool:
    """Return whether nothing is asked, and no KV cache in use, on any worker."""
    status = client.status()
    return status.answers_running == status.answers_waiting == status.kv_tokens_used == 0


def holds_only_prefixes(status: ClusterStatus) -> bool:
    """Return whether no worker has KV cache but of the prefixes that are kept."""
    return all(
        worker.kv_bytes <= status.kv_tokens_cached * KV_BYTES * len(worker.layers or ())
        for worker in status.workers
    )


@dataclass
class PacedWorker:
    """A worker whose speed changes when told; its probe never tells (see the benchmarks)."""

    name: str
    process: "subprocess.Popen[str]"

    @classmethod
    def start(cls, name: str, address: str, slowdown: float, log: Path) -> "PacedWorker":
        settings = {**WORKER, "name": name, "coordinator": address, "slowdown": slowdown}
        environment = {f"DLLM_WORKER__{key.upper()}": str(v) for key, v in settings.items()}
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.paced_worker"],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stderr=stderr,
                text=True,
                bufsize=1,
            )
        return cls(name, process)

    @property
    def memory_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def pace(self, slowdown: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{slowdown}\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@dataclass
class Crew:
    """A cluster that tests take workers from, and give new ones."""

    cluster: LocalCluster
    client: DistributedClient
    checkpoint: Path

    def answers(self, **asked: Any) -> Answers:
        return Answers(self.client, self.checkpoint, **asked)

    def need(self, number: int) -> None:
        """Start workers until there are so many, and wait until all have joined."""
        while self.num_alive < number:
            self.cluster.add_worker(**WORKER, slowdown=SLOWDOWN)
        eventually(lambda: len(self.client.status().workers) == number, limit_s=LIMIT_S)

    @property
    def num_alive(self) -> int:
        return sum(worker.exit_code is None for worker in self.cluster.workers)

    def process(self, name: str) -> LocalProcess:
        return next(worker for worker in self.cluster.workers if worker.name == name)

    def wait_until(self, seen: Callable[[ClusterStatus], bool], answers: Answers) -> ClusterStatus:
        """Return the status in which something is seen, while all answers go on."""

        def look() -> ClusterStatus | None:
            answers.check_under_way()
            status = self.client.status()
            check_whole(status)
            return status if seen(status) else None

        status = eventually(look, limit_s=LIMIT_S)
        assert status is not None
        return status


@pytest.fixture(scope="module")
def one_crew(movable: Path) -> Iterator[Crew]:
    workers = [{**WORKER, "slowdown": SLOWDOWN}] * 3
    with (
        nothing_left_behind(),
        LocalCluster(movable, workers, coordinator=SETTINGS) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        yield Crew(cluster, client, movable)


@pytest.fixture
def crew(one_crew: Crew) -> Iterator[Crew]:
    """A crew of three workers at rest; nothing may be in use after a test."""
    one_crew.need(3)
    # A worker that ended with the test before may have had layers, which others are loading.
    eventually(lambda: one_crew.client.status().state == "serving", limit_s=LIMIT_S)
    assert is_idle(one_crew.client)
    check_whole(one_crew.client.status())
    yield one_crew
    eventually(lambda: is_idle(one_crew.client), limit_s=LIMIT_S)
    eventually(lambda: holds_only_prefixes(one_crew.client.status()), limit_s=LIMIT_S)


# ------------------------------------------------------------------ by speed


def test_layers_move_to_a_worker_that_joins_and_away_from_it_once_it_is_slow(
    crew: Crew, tmp_path: Path
) -> None:
    before = crew.client.status()
    with ExitStack() as stack:
        answers = stack.enter_context(crew.answers())
        late = PacedWorker.start("late", crew.cluster.address, 1.5, tmp_path / "late.log")
        stack.callback(late.close)
        with_late = crew.wait_until(lambda status: "late" in serving(status), answers)
        held = serving(with_late)["late"]
        answers.go_on()
        held_bytes = late.memory_bytes
        late.pace(40.0)
        after = crew.wait_until(
            lambda status: len(serving(status).get("late", ())) < len(held), answers
        )
        answers.go_on()
        answers.check()
        assert after.moves >= before.moves + 2
        assert after.preemptions == before.preemptions
        freed_bytes = (
            worker_of(with_late, "late").weight_bytes - worker_of(after, "late").weight_bytes
        )
        assert freed_bytes > 0
        eventually(lambda: late.memory_bytes < held_bytes - freed_bytes / 2, limit_s=LIMIT_S)


# ------------------------------------------------------------------ leaving


def test_a_worker_is_drained_while_answers_are_written(crew: Crew) -> None:
    before = crew.client.status()
    leaver, left = [*serving(before).items()][-1]
    with crew.answers(max_new_tokens=80) as answers:
        crew.client.drain_worker(leaver)
        answers.check_under_way()
        after = crew.client.status()
        assert leaver not in {worker.name for worker in after.workers}
        check_whole(after)
        assert after.moves > before.moves
        assert crew.process(leaver).wait(LIMIT_S) == 0
        first, *_ = answers.finish()
        moves = crew.client.status().moves - before.moves  # those left may share out anew
    assert first.token_ids == reference_ids(crew.checkpoint, list(PROMPTS[0]), 80)
    for layer in range(NUM_LAYERS):
        tasks = [s.tasks for s in first.timings.stages if s.layers.start <= layer < s.layers.stop]
        assert (
            1 + (left.start <= layer < left.stop) <= len(tasks) <= 1 + moves
        )  # others may keep their layers
        assert sum(tasks) in (80, 81)  # its prompt may share a step with part of another one


def test_a_worker_that_leaves_moves_all_kinds_of_answers(crew: Crew) -> None:
    with ThreadPoolExecutor(len(KINDS)) as pool:
        alone = dict(
            zip(KINDS, pool.map(lambda ask: ask(crew.client), KINDS.values()), strict=True)
        )
    leaver = next(iter(serving(crew.client.status())))
    process = crew.process(leaver)
    moves = crew.client.status().moves
    with ThreadPoolExecutor(len(KINDS)) as pool, crew.answers() as answers:
        while_moving = {kind: pool.submit(ask, crew.client) for kind, ask in KINDS.items()}
        asked = len(PROMPTS) + len(KINDS)
        eventually(lambda: crew.client.status().answers_running >= asked, limit_s=LIMIT_S)
        running = crew.client.status().answers_running
        long = Answer(crew.client, LONG_PROMPT, max_new_tokens=10)
        eventually(lambda: crew.client.status().answers_running > running, limit_s=LIMIT_S)
        process.terminate()
        crew.wait_until(lambda status: status.moves > moves, answers)
        assert long.token_ids == []
        assert not any(request.done() for request in while_moving.values())
        assert process.wait(LIMIT_S) == 0
        assert "leaving" in process.log_tail()
        for name, request in while_moving.items():
            assert_same(alone[name], request.result(LIMIT_S))
        long.end(complete=True)
        answers.check()
    assert long.error is None
    assert len(long.token_ids) == 10
    check_greedy(crew.checkpoint, LONG_PROMPT, long.token_ids)
    check_whole(crew.client.status())


# ------------------------------------------------------------------ where nobody can have them


@dataclass
class Pair:
    """Two workers of which each can hold hardly more than half of the model.

    Attributes:
        lifeline: from the second one to the coordinator.
    """

    cluster: LocalCluster
    client: DistributedClient
    lifeline: FaultProxy

    def add_second(self) -> LocalProcess:
        """Start the second worker, and wait until the cluster serves."""
        worker = self.cluster.add_worker(**SMALL, coordinator=self.lifeline.address)
        self.cluster.wait_until_serving(num_workers=2)
        return worker


SMALL: dict[str, Any] = {**WORKER, "max_memory": "42MiB", "slowdown": SLOWDOWN}


@pytest.fixture(scope="module")
def pair(movable: Path) -> Iterator[Pair]:
    settings = {**SETTINGS, "min_workers": 2, "min_kv_tokens": 256}
    with (
        nothing_left_behind(),
        LocalCluster(movable, 0, coordinator=settings) as cluster,
        DistributedClient(cluster.address) as client,
        FaultProxy(cluster.address) as lifeline,
    ):
        cluster.add_worker(**SMALL, name="first")
        yield Pair(cluster, client, lifeline)


def test_a_worker_whose_layers_fit_nowhere_else_stays_or_ends_soon(pair: Pair) -> None:
    second = pair.add_second()
    with Answers(pair.client, Path()) as answers:
        with pytest.raises(NotEnoughMemory, match=r"Add a worker"):
            pair.client.drain_worker(second.name)
        answers.go_on()
        second.terminate()
        assert second.wait(LIMIT_S) == 0
        answers.end(complete=True)
    assert "leaving: Nobody can have its layers" in second.log_tail()
    for error in answers.errors:
        assert isinstance(error, WorkerLost)
        assert f"{second.name} serves its layers no longer" in str(error)
    with pytest.raises(NotReady, match="Add a worker"):
        pair.client.generate("Hi")


def test_a_second_signal_ends_a_worker_that_waits_for_others(pair: Pair) -> None:
    second = pair.add_second()
    with Answers(pair.client, Path()) as answers:
        pair.lifeline.degrade(to_client=Faults(black_hole=True))  # it never hears that it may leave
        second.terminate()
        eventually(lambda: "a second signal ends at once" in second.log_tail(), limit_s=LIMIT_S)
        assert second.exit_code is None
        second.terminate()
        assert second.wait(LIMIT_S) == 0
        assert "The coordinator is" not in second.log_tail()  # which would end it as well
        answers.end(complete=True)
    assert all(isinstance(error, WorkerLost) for error in answers.errors)
    pair.lifeline.heal()
