"""What `benchmark.py` prints: progress to stderr, the table and the advice to stdout."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.tuning.recommendation import Pick
from benchmarks.tuning.rows import HEAD, number, rows_of, stages_text
from benchmarks.tuning.search import Step
from benchmarks.tuning.tuning_run import Tuned

_UNBOUND_WIDTH = 200
"""Of what goes to a file or another program: nothing is cut."""


class Screen:
    """Prints for people.

    Args:
        out: takes the results; None: stdout.
        err: takes the progress; None: stderr.
    """

    def __init__(self, out: Console | None = None, err: Console | None = None) -> None:
        self._out = out or Console(highlight=False)
        if not self._out.is_terminal:
            self._out = Console(highlight=False, width=_UNBOUND_WIDTH, file=self._out.file)
        self._err = err or Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self._err.status("starting")

    def start(self, what: str) -> None:
        """Say what begins."""
        self._err.print(Text(what))
        self._status.start()

    def stop(self) -> None:
        """End what moves on the screen."""
        self._status.stop()

    def waiting(self, there: int, wanted: int) -> None:
        """Say how many workers are there."""
        self._err.print(Text(f"{there} of {wanted} workers are there"))

    def step(self, step: Step) -> None:
        """Show a run that begins or has ended."""
        left = "" if step.left_s is None else f", about {_duration(step.left_s)} left"
        place = f"[{step.number}/{step.planned}]"
        title = step.configuration.title
        if step.outcome is None:
            self._status.update(Text(f"{place} {title}{left}"))
            return
        if step.outcome.failure:
            found = f"failed: {step.outcome.failure}"
        else:
            loads = step.outcome.runs[-1].loads
            found = ", ".join(
                f"{count} at once {number(figures.tokens_per_s)} tokens/s"
                for count, figures in loads.items()
            )
        self._err.print(Text(f"{place} {title}: {found}{left}"))

    def results(self, tuned: Tuned, picks: Sequence[Pick]) -> None:
        """Print the table and what is best."""
        self._out.print(_table(tuned))
        for one in tuned.outcomes:
            if one.failure:
                self._out.print(Text(f"failed: {one.configuration.title}: {one.failure}", "red"))
            elif one.note:
                self._out.print(Text(f"{one.configuration.title}: {one.note}"))
        if tuned.left_out:
            self._out.print(Text(f"Not tried: {'; '.join(tuned.left_out)}."))
        for pick in picks:
            goal = "latency and throughput" if pick.goal == "both" else pick.goal
            title = pick.outcome.configuration.title
            self._out.print()
            self._out.print(Text.assemble((f"Best for {goal}: {title}. ", "bold"), pick.why))

    def files(self, settings: Path, report: Path, kept: Path | None) -> None:
        """Say what was written, and where the settings that were there before are."""
        self._out.print()
        self._out.print(Text(f"{settings}: for dllm coordinator --config {settings}"))
        self._out.print(Text(f"{report}: the same with plots"))
        if kept:
            self._out.print(Text(f"{kept}: the settings that were there before"))


def _table(tuned: Tuned) -> Table:
    title = f"{tuned.provenance.model}: {tuned.provenance.asked}"
    table = Table(title=Text(("PREDICTED. " if tuned.simulated else "") + title))
    table.add_column("configuration", overflow="fold", ratio=3)
    table.add_column("layers", overflow="fold", ratio=2)
    for name in HEAD:
        table.add_column(name, justify="right", overflow="fold")
    for one in tuned.outcomes:
        if one.failure:
            continue
        named = [Text(one.configuration.title), Text(stages_text(one))]
        for row in rows_of(one):
            table.add_row(*named, *(Text(cell) for cell in row))
            named = [Text(""), Text("")]
        table.add_section()
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
