"""Measures a cluster that serves: how fast it answers one request, and many at once."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psutil

from benchmarks.common import Answer, ask, fresh_prompts, gather
from benchmarks.tuning.figures import Heard, LoadFigures, Run, WorkerFacts, load_figures, turns_of
from distributed_llm import AsyncDistributedClient, DistributedLLMError
from distributed_llm.common.messages import ClusterStatus

_CHECK_PROMPTS, _CHECK_TOKENS = 2, 16
_WARM_UP_TOKENS = 8
_SETTLING = 5
"""Bursts to wait at most for layers that still move."""
_LOOPBACK = ("lo", "lo0")


@dataclass(frozen=True)
class Workload:
    """What is asked for.

    Attributes:
        loads: numbers of requests at once, ascending.
        prompt_tokens: of each request; `new_tokens` of its answer.
        vocab_size: token ids are below.
        local: all workers are on this machine, so its loopback carries all there is.
    """

    loads: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    vocab_size: int
    local: bool


async def measure(address: str, workload: Workload) -> Run:
    """Return what a cluster shows that serves at `address`: check, warm up, then each load.

    Raises:
        DistributedLLMError: a request failed.
    """
    async with AsyncDistributedClient(address) as client:
        try:
            return await _measure(client, workload)
        except* DistributedLLMError as group:
            raise _first(group) from None


def _first(group: BaseExceptionGroup[DistributedLLMError]) -> DistributedLLMError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, DistributedLLMError)
    return error


async def _measure(client: AsyncDistributedClient, workload: Workload) -> Run:
    answers = [
        tuple((await ask(client, prompt, _CHECK_TOKENS)).generation.token_ids)
        for prompt in _check_prompts(workload.vocab_size)
    ]
    await _warm_up(client, workload)
    loads: dict[int, LoadFigures] = {}
    alone: list[Answer] = []
    for count in workload.loads:
        loads[count], asked = await _load(client, count, workload)
        alone = alone or asked
    status = await client.status()
    return Run(
        loads=loads,
        stages=_stages(status),
        workers=_facts(status, alone),
        answers=tuple(answers),
    )


def _check_prompts(vocab_size: int) -> list[list[int]]:
    draw = random.Random(1)
    top = max(4, min(vocab_size, 1 << 30))
    return [draw.choices(range(3, top), k=_CHECK_TOKENS) for _ in range(_CHECK_PROMPTS)]


async def _warm_up(client: AsyncDistributedClient, workload: Workload) -> None:
    """Ask until a burst has passed in which no layer has moved."""
    for _ in range(_SETTLING):
        before = await client.status()
        few = min(_WARM_UP_TOKENS, workload.new_tokens)
        await gather(_ask(client, few, workload) for _ in range(max(workload.loads)))
        after = await client.status()
        if before.epoch == after.epoch and _stages(before) == _stages(after):
            return


async def _load(
    client: AsyncDistributedClient, count: int, workload: Workload
) -> tuple[LoadFigures, list[Answer]]:
    before, sent_before, began = await client.status(), _bytes_sent(), time.perf_counter()
    askers = await gather(
        _ask_again_and_again(client, turns_of(count), workload) for _ in range(count)
    )
    took_s = time.perf_counter() - began
    sent, after = _bytes_sent(), await client.status()
    answers = [answer for asker in askers for answer in asker]
    tokens = len(answers) * (workload.prompt_tokens + workload.new_tokens - 1)
    figures = load_figures(
        [[Heard(answer.sent_at, answer.times) for answer in asker] for asker in askers],
        outside_share=median(map(_outside_share, answers)) if count == 1 else None,
        wire_bytes_per_token=(sent - sent_before) / tokens
        if workload.local and sent is not None and sent_before is not None
        else None,
        busy=_busy(before, after, took_s),
    )
    return figures, answers


async def _ask_again_and_again(
    client: AsyncDistributedClient, turns: int, workload: Workload
) -> list[Answer]:
    return [await _ask(client, workload.new_tokens, workload) for _ in range(turns)]


async def _ask(client: AsyncDistributedClient, new_tokens: int, workload: Workload) -> Answer:
    prompts = fresh_prompts(1, workload.prompt_tokens, vocab_size=workload.vocab_size)
    return await ask(client, prompts[0], new_tokens)


def _outside_share(answer: Answer) -> float:
    timings = answer.generation.timings
    computed = sum(stage.compute_s for stage in timings.stages)
    return max(0.0, 1 - computed / max(timings.first_token_s + timings.decode_s, 1e-9))


def _busy(before: ClusterStatus, after: ClusterStatus, took_s: float) -> dict[str, float]:
    computed = {worker.name: worker.compute_s for worker in before.workers}
    return {
        worker.name: max(0.0, worker.compute_s - computed.get(worker.name, 0.0)) / took_s
        for worker in after.workers
        if worker.layers is not None
    }


def _stages(status: ClusterStatus) -> tuple[tuple[str, str], ...]:
    serving = [worker for worker in status.workers if worker.layers is not None]
    serving.sort(key=lambda worker: (worker.layers, worker.name))
    return tuple((worker.name, str(worker.layers)) for worker in serving)


def _facts(status: ClusterStatus, alone: Sequence[Answer]) -> tuple[WorkerFacts, ...]:
    """Return the workers, with the seconds per layer that the answers asked alone took."""
    spent: dict[str, list[float]] = {}
    for answer in alone:
        for stage in answer.generation.timings.stages:
            each_s = stage.compute_s / max(1, stage.tasks) / len(stage.layers)
            spent.setdefault(stage.worker, []).append(each_s)
    return tuple(
        WorkerFacts(
            worker.name,
            worker.capabilities,
            median(spent[worker.name]) if worker.name in spent else None,
        )
        for worker in sorted(status.workers, key=lambda worker: worker.name)
    )


def _bytes_sent() -> int | None:
    """Return the bytes that this machine's loopback has carried, None where that is not counted."""
    counters = psutil.net_io_counters(pernic=True)
    return next((counters[name].bytes_sent for name in _LOOPBACK if name in counters), None)


def run_measurement(address: str, workload: Workload) -> Run:
    """Do as `measure`, outside of any event loop."""
    return asyncio.run(measure(address, workload))
