"""How a cluster on this machine serves many requests at once.

    python -m benchmarks.serving batch       16 requests against transformers and against one
    python -m benchmarks.serving pipeline    how busy stages are whose time is made of waiting
    python -m benchmarks.serving prefill     gaps in answers while a long prompt is read
    python -m benchmarks.serving prefix      time to first token with a prompt that begins the same
    python -m benchmarks.serving overload    500 requests against a short queue

The tables show medians over the rounds. No prompt is sent twice unless that is what is measured:
the cluster would know it.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import Answer, ask, fresh_prompts, gather, print_table, until
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.split_generation import MIB, NEW_TOKENS, PROMPT_TOKENS, WORKERS, Baseline
from distributed_llm import AsyncDistributedClient, LocalCluster, Overloaded
from tests import checkpoints
from tests.reference import reference_ids
from tests.unhurried_worker import unhurried_workers

STAGGER_S = 0.05
DELAY_S = 0.020
STAGES = (2, 4, 8)
STAGE_MEMORY = "2GiB"
PER_STEP = 2
WARM_UP_S, WINDOW_S = 10.0, 20.0
CHUNK_TOKENS, LONG_PROMPT = 512, 2000
PREFIX_TOKENS, QUESTION_TOKENS = 1000, 16
REQUESTS, QUEUE, SENDERS, RUNNING = 500, 64, 10, 32
WORKER_MEMORY = 8 * 2**20


def large_checkpoint(folder: Path | None) -> Path:
    """Return the checkpoint in the shape of a 1.1 B model; it is written if it is not there."""
    return make_checkpoint(folder or Path(tempfile.gettempdir()) / "dllm-llama-1.1b")


# ------------------------------------------------------------------ 16 requests at once


async def batch(folder: Path, rounds: int) -> None:
    """Compare decoding 16 requests with transformers' padded batch, and with one request.

    Each rate is of the tokens after the first, over the time by which answers of all tokens take
    longer than answers of one; so no rate counts the prompts, whose order differs.
    """
    rates: dict[str, list[float]] = {"16 requests": [], "1 request": [], "transformers, 16": []}
    with LocalCluster(folder, workers=WORKERS, coordinator={"strategy": "memory"}) as cluster:
        baseline = Baseline(folder)
        async with AsyncDistributedClient(cluster.address) as client:
            for turn in range(rounds + 1):
                found = (
                    await decode_rate(client, 16),
                    await decode_rate(client, 1),
                    (await asyncio.to_thread(baseline.measure, 16)).decode_tokens_per_s,
                )
                for name, rate in zip(rates, found, strict=True):
                    rates[name] += [rate] if turn else []  # the first is for warming up
        baseline.close()
    ours, one, theirs = (statistics.median(values) for values in rates.values())
    print_table(
        (f"decode, {PROMPT_TOKENS} tokens in, {NEW_TOKENS} out", "tokens/s", "ours / this"),
        [
            ("16 requests, staggered", ours, ""),
            ("transformers, 16 as one padded batch", theirs, ours / theirs),
            ("1 request", one, ours / one),
        ],
    )


async def decode_rate(client: AsyncDistributedClient, count: int) -> float:
    """Return the decoded tokens per second of `count` requests that come one by one."""
    took = [await _staggered(client, count, new) for new in (1, NEW_TOKENS)]
    return count * (NEW_TOKENS - 1) / (took[1] - took[0])


async def _staggered(client: AsyncDistributedClient, count: int, new_tokens: int) -> float:
    started = time.perf_counter()
    prompts = fresh_prompts(count, PROMPT_TOKENS)
    await gather(ask(client, p, new_tokens, after_s=STAGGER_S * i) for i, p in enumerate(prompts))
    return time.perf_counter() - started


# ------------------------------------------------------------------ stages that wait


async def pipeline(_: Path, rounds: int) -> None:
    """Compare steady throughput with what the slowest stage allows; show the latency of one."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.make_checkpoint(
            Path(folder), num_layers=max(STAGES), max_position_embeddings=1 << 16
        )
        for stages in STAGES:
            found = [await _waiting_stages(model, stages) for _ in range(rounds)]
            rate, nominal, measured, gap_s = (
                statistics.median(values) for values in zip(*found, strict=True)
            )
            allowed_s = stages * (DELAY_S + 0.002)
            rows.append((stages, rate, nominal, measured, gap_s * 1000, allowed_s * 1000))
    head = ("stages", "tokens/s", "of ideal, by 20 ms", "of ideal, as measured")
    print_table((*head, "one request, ms per token", "allowed, ms"), rows)


async def _waiting_stages(model: Path, stages: int) -> tuple[float, float, float, float]:
    """Return tokens/s, its share of the ideal by nominal and by measured time, s per token."""
    settings = {"min_workers": stages, "strategy": "even"}
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(model, workers=0, coordinator=settings))
        coordinators = {f"worker-{number}": cluster.address for number in range(1, stages + 1)}
        workers = unhurried_workers(
            coordinators, min_task_s=DELAY_S, max_memory=STAGE_MEMORY, threads=1
        )
        stack.enter_context(workers)
        cluster.wait_until_serving(num_workers=stages)
        async with AsyncDistributedClient(cluster.address) as client:
            alone = await ask(client, _small_prompts(1)[0], 60)
            rate, slowest_s = await _steady(client, sequences=PER_STEP * stages)
    steps_per_s = rate / PER_STEP
    return rate, steps_per_s * DELAY_S, steps_per_s * slowest_s, statistics.median(alone.gaps_s)


async def _steady(client: AsyncDistributedClient, *, sequences: int) -> tuple[float, float]:
    """Return tokens/s of so many endless answers, and the slowest stage's seconds per task."""
    times: list[float] = []
    answers = [
        asyncio.create_task(ask(client, prompt, 60_000, times=times))
        for prompt in _small_prompts(sequences)
    ]
    await asyncio.sleep(WARM_UP_S)
    began, before = time.perf_counter(), (await client.status()).workers
    await asyncio.sleep(WINDOW_S)
    ended, after = time.perf_counter(), (await client.status()).workers
    for answer in answers:
        answer.cancel()
    await asyncio.gather(*answers, return_exceptions=True)
    spent = {worker.name: (worker.compute_s, worker.tasks_done) for worker in before}
    slowest_s = max(
        (worker.compute_s - spent[worker.name][0]) / (worker.tasks_done - spent[worker.name][1])
        for worker in after
    )
    return sum(began <= at < ended for at in times) / (ended - began), slowest_s


def _small_prompts(count: int) -> list[list[int]]:
    return fresh_prompts(count, 16, vocab_size=checkpoints.VOCAB_SIZE)


# ------------------------------------------------------------------ a long prompt beside answers


async def prefill(folder: Path, rounds: int) -> None:
    """Compare the worst gap in four answers, while a long prompt is read, with a chunk's time."""
    chunks = -(-LONG_PROMPT // CHUNK_TOKENS)
    rows = []
    with LocalCluster(
        folder,
        workers=WORKERS,
        coordinator={"strategy": "memory", "max_batch_tokens": CHUNK_TOKENS},
    ) as cluster:
        async with AsyncDistributedClient(cluster.address) as client:
            for turn in range(rounds + 1):
                alone = await ask(client, fresh_prompts(1, LONG_PROMPT)[0], 1)
                gap_s, usual_s, beside = await _gap_beside(client)
                if turn:
                    chunk_s = alone.first_token_s / chunks
                    rows.append((chunk_s, gap_s, gap_s / chunk_s, usual_s, beside.first_token_s))
    head = ("a chunk, s", "worst gap, s", "gap / chunk", "usual gap, s", "first token, s")
    medians = [statistics.median(values) for values in zip(*rows, strict=True)]
    print(f"\n{LONG_PROMPT} tokens in {chunks} chunks beside 4 answers")
    print_table(head, [medians])


async def _gap_beside(client: AsyncDistributedClient) -> tuple[float, float, Answer]:
    """Return worst gap, usual gap without the long prompt, and the answer to that."""
    times: list[list[float]] = [[] for _ in range(4)]
    running = [
        asyncio.create_task(ask(client, prompt, LONG_PROMPT, times=ticks))
        for prompt, ticks in zip(fresh_prompts(4, 16), times, strict=True)
    ]
    await until(lambda: all(len(ticks) > 10 for ticks in times))
    usual = [after - before for ticks in times for before, after in pairwise(ticks[5:])]
    answer = await ask(client, fresh_prompts(1, LONG_PROMPT)[0], 1)
    await until(lambda: all(ticks[-1] > answer.times[0] for ticks in times))
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    gaps = [
        after - before
        for ticks in times
        for before, after in pairwise(ticks)
        if after > answer.sent_at and before < answer.times[0]
    ]
    return max(gaps), statistics.median(usual), answer


# ------------------------------------------------------------------ prompts that begin the same


async def prefix(folder: Path, rounds: int) -> None:
    """Compare the time to the first token of two prompts that share their first 1,000 tokens."""
    rows = []
    with LocalCluster(folder, workers=WORKERS, coordinator={"strategy": "memory"}) as cluster:
        async with AsyncDistributedClient(cluster.address) as client:
            for turn in range(rounds + 1):
                shared = fresh_prompts(1, PREFIX_TOKENS)[0]
                pair = fresh_prompts(2, PREFIX_TOKENS + QUESTION_TOKENS, prefix=shared)
                first, second = [await ask(client, prompt, 4) for prompt in pair]
                if turn:
                    times = first.first_token_s, second.first_token_s
                    cached = second.generation.usage.cached_tokens
                    rows.append((*times, times[1] / times[0], float(cached)))
    head = ("first, s", "second, s", "second / first", "tokens that were kept")
    print(f"\nTime to first token, {PREFIX_TOKENS} + {QUESTION_TOKENS} tokens")
    print_table(head, [[statistics.median(values) for values in zip(*rows, strict=True)]])


# ------------------------------------------------------------------ more than fits


@dataclass(frozen=True)
class Held:
    """What the processes of a cluster hold."""

    memory_mib: float
    threads: int
    files_and_sockets: int
    kv_tokens: int
    kv_tokens_cached: int


@dataclass(frozen=True)
class Fate:
    """What became of a request: its answer, or how long it took to be refused."""

    prompt: list[int]
    token_ids: list[int] | None = None
    refused_s: float = 0.0


async def overload(_: Path, rounds: int) -> None:
    """Send 500 requests to a queue of 64, several times; check every answer and what is left."""
    fates: list[Fate] = []
    settings = {
        "strategy": "memory",
        "max_waiting_requests": QUEUE,
        "max_batch_sequences": RUNNING,
    }
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.make_checkpoint(Path(folder))
        with LocalCluster(model, workers=0, coordinator=settings) as cluster:
            for _worker in range(WORKERS):  # the first wave fills their prefix caches
                cluster.add_worker(max_memory=WORKER_MEMORY)
            cluster.wait_until_serving(num_workers=WORKERS)
            await _wave(cluster)  # warms up
            before = await _held(cluster)
            rows: list[tuple[object, ...]] = [("before", *vars(before).values(), "", "")]
            for turn in range(rounds):
                found = await _wave(cluster)
                refused = [fate.refused_s for fate in found if fate.token_ids is None]
                held = await _held(cluster)
                rows.append(
                    (turn + 1, *vars(held).values(), len(refused), max(refused, default=0.0) * 1000)
                )
                fates += found
        torch.set_num_threads(1)  # a tiny model is slower with more
        outcome = Counter(_verdict(model, fate) for fate in fates)
    head = ("wave", "memory, MiB", "threads", "files and sockets", "KV, tokens", "cached, tokens")
    print_table((*head, "refused", "slowest refusal, ms"), rows)
    print(f"\n{REQUESTS} requests a wave: {dict(outcome)}")


async def _wave(cluster: LocalCluster) -> list[Fate]:
    """Return what became of 500 requests of ten clients, sent within a second."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncDistributedClient(cluster.address))
            for _ in range(SENDERS)
        ]
        await gather(client.status() for client in clients)
        prompts = [
            prompt
            for size in (5, 9, 17, 33, 40)
            for prompt in fresh_prompts(REQUESTS // 5, size, vocab_size=checkpoints.VOCAB_SIZE)
        ]
        return await gather(
            _fate(clients[i % SENDERS], prompt, i / REQUESTS) for i, prompt in enumerate(prompts)
        )


async def _fate(client: AsyncDistributedClient, prompt: list[int], after_s: float) -> Fate:
    await asyncio.sleep(after_s)
    sent_at = time.perf_counter()
    try:
        answer = await client.generate(
            prompt, max_new_tokens=16, temperature=0.0, ignore_eos=True, details=True
        )
    except Overloaded:
        return Fate(prompt, refused_s=time.perf_counter() - sent_at)
    return Fate(prompt, answer.token_ids)


def _verdict(model: Path, fate: Fate) -> str:
    if fate.token_ids is None:
        return "refused within 100 ms" if fate.refused_s < 0.1 else "refused late"
    right = fate.token_ids == reference_ids(model, fate.prompt, 16)
    return "right answer" if right else "wrong answer"


async def _held(cluster: LocalCluster) -> Held:
    """Return what all processes hold once the clients' sessions are closed."""
    await asyncio.sleep(1.0)
    processes = [psutil.Process(one.pid) for one in (cluster.coordinator, *cluster.workers)]
    async with AsyncDistributedClient(cluster.address) as client:
        status = await client.status()
    await asyncio.sleep(0.5)
    return Held(
        memory_mib=sum(one.memory_info().rss for one in processes) / MIB,
        threads=sum(one.num_threads() for one in processes),
        files_and_sockets=sum(one.num_fds() for one in processes),
        kv_tokens=status.kv_tokens_used,
        kv_tokens_cached=status.kv_tokens_cached,
    )


# ------------------------------------------------------------------ command line

_KINDS: dict[str, Callable[[Path, int], Coroutine[Any, Any, None]]] = {
    "batch": batch,
    "pipeline": pipeline,
    "prefill": prefill,
    "prefix": prefix,
    "overload": overload,
}
_WITHOUT_FOLDER = ("pipeline", "overload")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one kind and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=_KINDS)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    folder = Path() if given.kind in _WITHOUT_FOLDER else large_checkpoint(given.folder)
    asyncio.run(_KINDS[given.kind](folder, given.rounds))


if __name__ == "__main__":
    main()
