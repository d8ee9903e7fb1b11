"""What the `dllm` command prints: data to stdout, the rest to stderr."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from distributed_llm import Chunk, Generation, LocalCluster, summary
from distributed_llm.client.client import DistributedClient
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import ClusterMembers, ClusterStatus
from distributed_llm.common.streams import writes_unicode
from distributed_llm.coordinator.plan import describe
from distributed_llm.coordinator.planning.advice import Advice
from distributed_llm.coordinator.planning.dry_run import MANY, DryRun
from distributed_llm.weights.cache.contents import Contents

_UNBOUND_WIDTH = 10_000
"""Characters per line of what goes to a file or another program, so that nothing is broken."""

_GAP = 2
"""Spaces between two columns of a table."""

_out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _UNBOUND_WIDTH)
_err = Console(
    stderr=True,
    highlight=False,
    markup=False,
    width=None if sys.stderr.isatty() else _UNBOUND_WIDTH,
)


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII where the output cannot write every character."""
    document = msgspec.json.encode(value)
    if writes_unicode():
        print(msgspec.json.format(document, indent=2).decode())
    else:
        print(json.dumps(json.loads(document), indent=2))


def print_answers(
    chunks: Iterator[Chunk],
    *,
    n: int | None,
    as_json: bool,
    stats: bool,
    as_ids: bool = False,
) -> list[Generation]:
    """Print answers as they come, one after the other, or complete as JSON; return them.

    Args:
        chunks: a stream, closed in the end.
        n: how many answers were asked for; JSON is one document if it is None, else a list.
        as_json: print JSON.
        stats: tell who ran what, on stderr.
        as_ids: print token ids, separated by spaces, in place of text.

    Raises:
        DistributedLLMError: as the client does.
    """
    generations = []
    writer = _AnswerWriter(n or 1, as_ids)
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
        print_json(generations[0] if n is None else generations)
    if stats:
        print_stats(generations)
    return generations


class _AnswerWriter:
    """Writes answers one after the other; text of a later answer is kept until its turn."""

    def __init__(self, n: int, as_ids: bool) -> None:
        self._n = n
        self._as_ids = as_ids
        self._choice = 0
        self._waiting = [""] * n
        self._ended = [False] * n
        self._in_line = False

    def add(self, chunk: Chunk) -> None:
        ids = "".join(f"{token_id} " for token_id in chunk.token_ids)
        self._waiting[chunk.choice] += ids if self._as_ids else chunk.text
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


def print_stats(generations: Sequence[Generation]) -> None:
    """Print to stderr who ran what for the answers to a prompt, and how fast that was."""
    rows = [summary.timing_row(stage) for stage in generations[0].timings.stages]
    _print_table(_err, summary.TIMING_COLUMNS, rows, title="who ran what")
    _err.print(summary.answers_line(generations))


def print_status(status: ClusterStatus, *, as_json: bool) -> None:
    """Print the state of the cluster."""
    if as_json:
        print_json(status)
        return
    _out.print(summary.headline(status))
    if status.note:
        _out.print(status.note, style="yellow")
    if status.workers:
        rows = [summary.worker_row(worker, status.encoder_layers) for worker in status.workers]
        _print_table(_out, summary.WORKER_COLUMNS, rows)
    for line in summary.request_lines(status):
        _out.print(line)
    for line in (*summary.fetch_lines(status), *summary.kernel_lines(status)):
        _out.print(line)
    for worker in status.workers:
        if worker.note:
            _out.print(f"{worker.name}: {worker.note}", style="yellow")
        if worker.advice:
            _out.print(f"{worker.name}: {worker.advice}")
    for event in status.events[-8:]:
        _out.print(
            Padding(Text(summary.event_line(event), style="dim"), (0, 0, 0, 2), expand=False)
        )


def _print_table(
    console: Console, names: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = ""
) -> None:
    """Print a table; where the terminal is too narrow for it, each row as a paragraph."""
    if title:
        console.print(title, style="italic")
    columns = zip(names, *rows, strict=True)
    width = sum(max(map(cell_len, column)) + _GAP for column in columns) - _GAP
    if width > console.width:
        for first, *others in rows:
            said = ", ".join(f"{name} {cell}" for name, cell in zip(names[1:], others, strict=True))
            console.print(Padding(Text(f"{first}: {said}"), (0, 0, 0, 2), expand=False))
        return
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_plan(run: DryRun, *, as_json: bool) -> None:
    """Print who would get which layers, and how fast that would be."""
    if as_json:
        print_json(_plan_document(run))
        return
    for number, plan in enumerate(run.plans, 1):
        title = f"pipeline {number} of {len(run.plans)}" if len(run.plans) > 1 else ""
        rows = [summary.stage_row(stage, run.memory[stage.worker], run.cost) for stage in plan]
        _print_table(_out, summary.STAGE_COLUMNS, rows, title=title)
    for line in summary.plan_lines(run):
        _out.print(line)
    _out.print(f"assumed: {'; '.join(run.assumed)}", style="dim")


def _plan_document(run: DryRun) -> dict[str, Any]:
    """Return a dry run as JSON shows it."""
    return {
        "num_layers": run.cost.num_layers,
        "weight_bytes": run.cost.all_weight_bytes,
        "quantize": run.cost.quantize,
        "kv_dtype": run.kv_dtype,
        "formats": None if run.formats is None else asdict(run.formats),
        "stages": [
            {"pipeline": number, **stage}
            for number, plan in enumerate(run.plans)
            for stage in describe(plan, run.cost)
        ],
        "longest_tokens": run.longest_tokens,
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


def print_tokens(members: ClusterMembers, *, as_json: bool) -> None:
    """Print the tokens by which machines may still enrol."""
    if as_json:
        print_json(msgspec.to_builtins(members.tokens))
    elif not members.tokens:
        _err.print("there are no tokens; `dllm token create` makes one")
    else:
        rows = [summary.token_row(token, time.time()) for token in members.tokens]
        _print_table(_out, summary.TOKEN_COLUMNS, rows)


def print_machines(members: ClusterMembers, *, as_json: bool) -> None:
    """Print the machines that may connect."""
    if as_json:
        print_json(msgspec.to_builtins(members.machines))
        return
    rows = [summary.machine_row(machine, time.time()) for machine in members.machines]
    _print_table(_out, summary.MACHINE_COLUMNS, rows)


def print_cache(folder: Path, contents: Contents, *, as_json: bool) -> None:
    """Print of which models weights are kept in a folder."""
    if as_json:
        print_json({"folder": str(folder), **asdict(contents)})
        return
    if contents.models:
        rows = [summary.kept_model_row(model, time.time()) for model in contents.models]
        _print_table(_out, summary.CACHE_COLUMNS, rows)
    _out.print(summary.cache_line(folder, contents))


def drain(client: DistributedClient, name: str, *, as_json: bool) -> None:
    """Have a worker leave, wait for it, and print what happened.

    Raises:
        DistributedLLMError: as the client does.
    """
    status = client.status()
    held = next((worker for worker in status.workers if worker.name == name), None)
    waiting, done = summary.drain_lines(name, held, status.encoder_layers)
    if waiting:
        _err.print(waiting, style="dim")
    client.drain_worker(name)
    if as_json:
        print_json({"worker": name, "layers": held and held.layers})
    else:
        _out.print(done)


def run_demo(prompt: str, workers: int) -> None:
    """Start a cluster of this machine alone, write a story, and show who ran what."""
    with (
        LocalCluster(workers=workers, coordinator={"strategy": "even"}) as cluster,
        closing(DistributedClient(cluster.address)) as client,
    ):
        _err.print()
        sys.stdout.write(prompt)
        generations = print_answers(client.stream(prompt), n=None, as_json=False, stats=False)
        _err.print()
        print_stats(generations)
