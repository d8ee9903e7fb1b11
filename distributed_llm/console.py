"""What the `dllm` command prints: data to stdout, the rest to stderr."""

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from distributed_llm import Chunk, Generation, LocalCluster
from distributed_llm.client.client import DistributedClient
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import ClusterStatus, WorkerStatus
from distributed_llm.common.types import size_text
from distributed_llm.coordinator.planner import ModelCost, Plan, describe

_out = Console(soft_wrap=True, highlight=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_answer(chunks: Iterator[Chunk], *, as_json: bool, stats: bool) -> Generation:
    """Print an answer as it comes, or all of it as JSON; return it.

    Raises:
        DistributedLLMError: as the client does.
    """
    generation, written = None, False
    try:
        for chunk in chunks:
            generation = chunk.generation or generation
            if not as_json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                written = True
    finally:
        close = getattr(chunks, "close", None)
        if close:
            close()
        if written:
            print(flush=True)
    if generation is None:
        raise DistributedLLMError("The answer ended before it was complete. Ask again.")
    if as_json:
        print_json(generation)
    if stats:
        print_stats(generation)
    return generation


def print_stats(generation: Generation) -> None:
    """Print to stderr who ran what for an answer, and how fast it was."""
    timings, usage = generation.timings, generation.usage
    table = Table("worker", "layers", "tasks", "compute", title="who ran what")
    for stage in timings.stages:
        table.add_row(
            stage.worker, str(stage.layers), str(stage.tasks), f"{stage.compute_s * 1000:.1f} ms"
        )
    _err.print(table)
    steps = max(1, usage.completion_tokens - 1)
    rate = f"{steps / timings.decode_s:.1f} tokens/s" if timings.decode_s else "one token"
    _err.print(
        f"{usage.prompt_tokens} tokens in, {usage.completion_tokens} out "
        f"({generation.finish_reason}); first token after {timings.first_token_s * 1000:.0f} ms, "
        f"then {rate}"
    )


def print_status(status: ClusterStatus, *, as_json: bool) -> None:
    """Print the state of the cluster."""
    if as_json:
        print_json(status)
        return
    _out.print(
        f"{status.model}: {status.state}, plan {status.epoch}, {status.num_layers} layers, "
        f"KV cache for {status.kv_tokens} positions"
    )
    if status.note:
        _out.print(status.note, style="yellow")
    table = Table("worker", "state", "layers", "memory", "weights", "KV", "tasks", "speed")
    for worker in status.workers:
        table.add_row(*_worker_row(worker))
    _out.print(table)
    _out.print(
        f"requests: {status.requests_running} running, {status.requests_waiting} waiting, "
        f"{status.requests_finished} finished, {status.requests_failed} failed; "
        f"{status.tokens_generated} tokens"
    )
    for worker in status.workers:
        if worker.note:
            _out.print(f"{worker.name}: {worker.note}", style="yellow")
    for event in status.events[-8:]:
        _out.print(f"  {event}", style="dim")


def _worker_row(worker: WorkerStatus) -> list[str]:
    speed = worker.seconds_per_token
    return [
        worker.name,
        worker.state,
        str(worker.layers) if worker.layers else "-",
        size_text(worker.capabilities.memory_bytes),
        size_text(worker.weight_bytes),
        size_text(worker.kv_bytes),
        str(worker.tasks_done),
        f"{speed * 1000:.2f} ms/token" if speed else "-",
    ]


def print_plan(plan: Plan, cost: ModelCost, *, as_json: bool) -> None:
    """Print who would get which layers."""
    if as_json:
        print_json({"num_layers": cost.num_layers, "stages": describe(plan, cost)})
        return
    table = Table("worker", "layers", "weights", "room for KV cache")
    for stage in plan:
        table.add_row(
            stage.worker,
            str(stage.layers),
            size_text(stage.weight_bytes),
            f"{stage.kv_tokens} positions",
        )
    _out.print(table)


def run_demo(prompt: str, workers: int) -> None:
    """Start a cluster of this machine alone, write a story, and show who ran what."""
    _err.print(f"Starting a coordinator and {workers} workers on this machine ...")
    with (
        LocalCluster(workers=workers) as cluster,
        closing(DistributedClient(cluster.address)) as client,
    ):
        status = client.status()
        for worker in status.workers:
            _err.print(f"  {worker.name} serves layers {worker.layers}")
        _err.print()
        sys.stdout.write(prompt)
        generation = print_answer(client.stream(prompt), as_json=False, stats=False)
        _err.print()
        print_stats(generation)
