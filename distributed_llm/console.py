"""What the `dllm` command prints: data to stdout, the rest to stderr."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Column, Table

from distributed_llm import Chunk, Generation, LocalCluster
from distributed_llm.client.client import DistributedClient
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import ClusterStatus, WorkerStatus
from distributed_llm.common.types import size_text
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.planner import Plan, describe

_UNBOUND_WIDTH = 200
"""Of what goes to a file or another program: nothing is cut."""

_out = Console(
    soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _UNBOUND_WIDTH
)
_err = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_answers(
    chunks: Iterator[Chunk], *, n: int | None, as_json: bool, stats: bool
) -> list[Generation]:
    """Print answers as they come, one after the other, or complete as JSON; return them.

    Args:
        chunks: a stream, closed in the end.
        n: how many answers were asked for; JSON is one document if it is None, else a list.

    Raises:
        DistributedLLMError: as the client does.
    """
    generations = []
    writer = _AnswerWriter(n or 1)
    try:
        for chunk in chunks:
            if chunk.generation:
                generations.append(chunk.generation)
            elif not as_json:
                writer.add(chunk)
    finally:
        close = getattr(chunks, "close", None)
        if close:
            close()
        writer.end_line()
    if len(generations) != (n or 1):
        raise DistributedLLMError("The answer ended before it was complete. Ask again.")
    if as_json:
        documents = [_document(generation) for generation in generations]
        print_json(documents[0] if n is None else documents)
    if stats:
        print_stats(generations)
    return generations


class _AnswerWriter:
    """Writes answers in the order of their choices; what comes early of a later one waits."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._choice = 0
        self._waiting = [""] * n
        self._ended = [False] * n
        self._in_line = False

    def add(self, chunk: Chunk) -> None:
        self._waiting[chunk.choice] += chunk.text
        self._ended[chunk.choice] = chunk.finish_reason is not None
        while self._choice < self._n and self._write():
            self._choice += 1

    def end_line(self) -> None:
        if self._in_line:
            print(flush=True)
        self._in_line = False

    def _write(self) -> bool:
        """Write what there is of the current answer; return whether that was its end."""
        if self._n > 1 and not self._in_line:
            _err.print(f"answer {self._choice + 1} of {self._n}:", style="dim")
        self._in_line = True
        sys.stdout.write(self._waiting[self._choice])
        sys.stdout.flush()
        self._waiting[self._choice] = ""
        if self._ended[self._choice]:
            self.end_line()
        return self._ended[self._choice]


def _document(generation: Generation) -> dict[str, Any]:
    """Return an answer as JSON shows it, with every log-probability named."""
    document: dict[str, Any] = msgspec.to_builtins(generation)
    if generation.logprobs is not None:
        document["logprobs"] = [
            {
                "token_id": token_id,
                "logprob": one.logprob,
                "top": [{"token_id": other, "logprob": logprob} for other, logprob in one.top],
            }
            for token_id, one in zip(generation.token_ids, generation.logprobs, strict=True)
        ]
    return document


def print_stats(generations: Sequence[Generation]) -> None:
    """Print to stderr who ran what for the answers to a prompt, and how fast that was."""
    timings, usage = generations[0].timings, generations[0].usage
    table = _table("worker", "layers", "tasks", "compute", title="who ran what")
    for stage in timings.stages:
        table.add_row(
            stage.worker, str(stage.layers), str(stage.tasks), f"{stage.compute_s * 1000:.1f} ms"
        )
    _err.print(table)
    decoded = usage.completion_tokens - len(generations)
    rate = f"then {decoded / timings.decode_s:.1f} tokens/s" if timings.decode_s else "no others"
    reasons = ", ".join(generation.finish_reason for generation in generations)
    _err.print(
        f"{usage.prompt_tokens} tokens in ({usage.cached_tokens} cached), "
        f"{usage.completion_tokens} out ({reasons}); queued {timings.queued_s * 1000:.0f} ms, "
        f"first token after {timings.first_token_s * 1000:.0f} ms, {rate}"
    )


def print_status(status: ClusterStatus, *, as_json: bool) -> None:
    """Print the state of the cluster."""
    if as_json:
        print_json(status)
        return
    _out.print(
        f"{status.model}: {status.state}, plan {status.epoch}, {status.num_layers} layers, "
        f"KV cache: {status.kv_tokens_used} of {status.kv_tokens} positions used"
    )
    if status.note:
        _out.print(status.note, style="yellow")
    table = _table(
        *("worker", "state", "plan", "layers", "link", "memory", "weights", "KV", "tasks", "speed")
    )
    for worker in status.workers:
        table.add_row(*_worker_row(worker))
    _out.print(table)
    _out.print(
        f"requests: {status.requests_running} running, {status.requests_waiting} waiting, "
        f"{status.requests_finished} finished, {status.requests_failed} failed; "
        f"{status.preemptions} preempted; {status.tokens_generated} tokens, "
        f"{status.prefix_hit_tokens} positions of prompts were in the KV cache already"
    )
    for worker in status.workers:
        if worker.note:
            _out.print(f"{worker.name}: {worker.note}", style="yellow")
    for event in status.events[-8:]:
        _out.print(f"  {event}", style="dim")


def _table(*names: str, title: str = "") -> Table:
    """Return a table that cuts nothing where the terminal is narrow, but folds it."""
    return Table(*(Column(name, overflow="fold") for name in names), title=title or None)


def _worker_row(worker: WorkerStatus) -> list[str]:
    speed = worker.seconds_per_token
    return [
        worker.name,
        worker.state,
        str(worker.epoch) if worker.layers else "-",
        str(worker.layers) if worker.layers else "-",
        worker.link or "-",
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
    table = _table("worker", "layers", "weights", "room for KV cache")
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
        generations = print_answers(client.stream(prompt), n=None, as_json=False, stats=False)
        _err.print()
        print_stats(generations)
