"""What the `dllm` command prints: data to stdout, the rest to stderr."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from distributed_llm import Chunk, Generation, LocalCluster
from distributed_llm.client.client import DistributedClient
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import ClusterStatus, WorkerStatus
from distributed_llm.common.streams import writes_unicode
from distributed_llm.common.types import size_text
from distributed_llm.coordinator.plan import describe
from distributed_llm.coordinator.planning.advice import Advice, rate_text
from distributed_llm.coordinator.planning.dry_run import MANY, DryRun

_UNBOUND_WIDTH = 200
"""Characters per line of what goes to a file or another program, so that nothing is cut."""

_NARROW = 100
"""Characters per line of the terminal below which the columns of tables stand closer together."""

_LONG_WORD = 24
"""Characters of the longest word that a table does not break."""

_out = Console(
    soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _UNBOUND_WIDTH
)
_err = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII where the output cannot write every character."""
    document = msgspec.json.encode(value)
    if writes_unicode():
        print(msgspec.json.format(document, indent=2).decode())
    else:
        print(json.dumps(json.loads(document), indent=2))


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
    """Writes answers one after the other; text of a later answer is kept until its turn."""

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
    rows = [
        [stage.worker, str(stage.layers), str(stage.tasks), f"{stage.compute_s * 1000:.1f} ms"]
        for stage in timings.stages
    ]
    _err.print(_table(("worker", "layers", "tasks", "compute"), rows, title="who ran what"))
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
    names = ["worker", "state", "plan", "layers", "link", "memory", "weights", "KV", "tasks"]
    _out.print(_table([*names, "speed"], [_worker_row(worker) for worker in status.workers]))
    _out.print(
        f"requests: {status.requests_running} running, {status.requests_waiting} waiting, "
        f"{status.requests_finished} finished, {status.requests_failed} failed; "
        f"{status.preemptions} preempted; {status.tokens_generated} tokens, "
        f"{status.prefix_hit_tokens} positions of prompts were in the KV cache already"
    )
    if status.moves:
        _out.print(
            f"layers moved {'once' if status.moves == 1 else f'{status.moves} times'} while "
            f"requests ran; the latest move stopped them "
            f"for {status.move_stall_s * 1000:.0f} ms"
        )
    for worker in status.workers:
        if worker.note:
            _out.print(f"{worker.name}: {worker.note}", style="yellow")
        if worker.advice:
            _out.print(f"{worker.name}: {worker.advice}")
    for event in status.events[-8:]:
        _out.print(f"  {event}", style="dim")


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> Table:
    """Return a table that cuts nothing where the terminal is narrow, but folds between words."""
    gap = 1 if _out.width < _NARROW else 2
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, gap, 0, 0))
    for name, *cells in zip(names, *rows, strict=True):
        longest = max(len(word) for cell in (name, *cells) for word in cell.split())
        table.add_column(name, overflow="fold", min_width=min(longest, _LONG_WORD))
    for row in rows:
        table.add_row(*row)
    return table


def _worker_row(worker: WorkerStatus) -> list[str]:
    return [
        worker.name,
        worker.state,
        str(worker.epoch) if worker.layers else "-",
        _layers_text(worker),
        worker.link or "-",
        size_text(worker.capabilities.memory_bytes),
        size_text(worker.weight_bytes),
        size_text(worker.kv_bytes),
        str(worker.tasks_done),
        _speed_text(worker),
    ]


def _layers_text(worker: WorkerStatus) -> str:
    now = str(worker.layers) if worker.layers else "-"
    return f"{now} -> {worker.next_layers}" if worker.next_layers else now


def _speed_text(worker: WorkerStatus) -> str:
    """Return the measured time per token, and how far predictions of it are off."""
    if not worker.seconds_per_token:
        return "-"
    error = worker.prediction_error
    off = "" if error is None else f" ±{100 * error:.0f} %"
    return f"{worker.seconds_per_token * 1000:.2f} ms/token{off}"


def print_plan(run: DryRun, *, as_json: bool) -> None:
    """Print who would get which layers, and how fast that would be."""
    if as_json:
        print_json(_plan_document(run))
        return
    for number, plan in enumerate(run.plans, 1):
        title = f"pipeline {number} of {len(run.plans)}" if len(run.plans) > 1 else ""
        rows = [
            [
                stage.worker,
                str(stage.layers),
                size_text(run.memory[stage.worker]),
                size_text(stage.weight_bytes),
                f"{stage.kv_tokens} positions",
            ]
            for stage in plan
        ]
        names = ("worker", "layers", "memory", "weights", "room for KV cache")
        _out.print(_table(names, rows, title=title))
    used = {stage.worker for plan in run.plans for stage in plan}
    idle = [worker for worker in run.memory if worker not in used]
    if idle:
        _out.print(f"without layers: {', '.join(idle)}")
    _out.print(
        f"expected: {rate_text(run.one_tokens_per_s)} tokens/s for one request, "
        f"{rate_text(run.many_tokens_per_s)} for {MANY} at once"
    )
    for worker, advice in run.advice.items():
        _out.print(f"{worker}: {advice.text}")
    _out.print(f"assumed: {'; '.join(run.assumed)}", style="dim")


def _plan_document(run: DryRun) -> dict[str, Any]:
    """Return a dry run as JSON shows it."""
    return {
        "num_layers": run.cost.num_layers,
        "stages": [
            {"pipeline": number, **stage}
            for number, plan in enumerate(run.plans)
            for stage in describe(plan, run.cost)
        ],
        "one_tokens_per_s": run.one_tokens_per_s,
        "many_tokens_per_s": run.many_tokens_per_s,
        "many": MANY,
        "workers": {
            worker: {"memory_bytes": size, "advice": _advice_document(run.advice.get(worker))}
            for worker, size in run.memory.items()
        },
        "assumed": run.assumed,
    }


def _advice_document(advice: Advice | None) -> dict[str, Any] | None:
    return None if advice is None else asdict(advice)


def drain(client: DistributedClient, name: str, *, as_json: bool) -> None:
    """Have a worker leave, wait for it, and print what happened.

    Raises:
        DistributedLLMError: as the client does.
    """
    layers = {worker.name: worker.layers for worker in client.status().workers}.get(name)
    if layers is not None:
        _err.print(f"waiting until others serve layers {layers} of {name} ...", style="dim")
    client.drain_worker(name)
    if as_json:
        print_json({"worker": name, "layers": layers and [layers.start, layers.stop]})
    elif layers is None:
        _out.print(f"{name}, which had no layers, has left")
    else:
        _out.print(f"{name} has left, and others serve its layers")


def run_demo(prompt: str, workers: int) -> None:
    """Start a cluster of this machine alone, write a story, and show who ran what."""
    _err.print(f"Starting a coordinator and {workers} workers on this machine ...")
    with (
        LocalCluster(workers=workers, coordinator={"strategy": "even"}) as cluster,
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
