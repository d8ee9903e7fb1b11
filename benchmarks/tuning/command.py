"""The command line of `benchmark.py`."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.tuning.description import read_description
from benchmarks.tuning.provenance import command_line
from benchmarks.tuning.recommendation import Goal, recommend
from benchmarks.tuning.report import NAME as REPORT_NAME
from benchmarks.tuning.report import report_html
from benchmarks.tuning.screen import Screen
from benchmarks.tuning.tuned_file import NAME as SETTINGS_NAME
from benchmarks.tuning.tuned_file import tuned_text, write_keeping
from benchmarks.tuning.tuning_run import Hands, Tuned, Wishes, tune, tune_described
from benchmarks.tuning.workbench import LocalWorker
from distributed_llm.common.config import load_settings
from distributed_llm.common.errors import ConfigError, DistributedLLMError
from distributed_llm.common.units import parse_duration, split_address

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

_MANY_CORES = 6
_MOST_REQUESTS = 256
"""That the coordinator lets wait by default."""
_WORKER_SETTINGS = ("slowdown", "threads", "max_memory", "device", "model")
_KINDS = "What to try"
_RUN = "Where and how it runs"
_LOAD = "What is asked for"
_RESULT = "What comes of it"


_HELP = (
    "Find the settings of a coordinator that are fastest on your machines, by measuring.\n\n"
    "Runs the model with one configuration after another, several times in turns, each warmed up, "
    "and checks that all of them give the same tokens. Prints a table, says which configuration is "
    "best for latency and which for throughput and why, and writes settings for dllm coordinator "
    "--config and a report with plots."
)
_EPILOG = (
    "Settings are tried one after another, the others as they were found best so far, beginning "
    "with the first value of each; not every combination."
)


@app.command(help=_HELP, epilog=_EPILOG)
def benchmark(
    context: typer.Context,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Few configurations, small loads, 2 to 3 minutes.", rich_help_panel=_RUN
        ),
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            help="Checkpoint folder or hub id; nothing for the built-in model.",
            rich_help_panel=_RUN,
        ),
    ] = "",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Workers to start here, sharing the cores; with --listen, workers to wait for. "
            "Default: 2, with six cores or more 3; with --listen 1.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=SETTING:VALUE,...]",
            help="A worker to start here, such as pc or old=slowdown:3,threads:1,max_memory:512MiB "
            "(also device, model); give it several times instead of --workers.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Take workers of other machines instead: start each with dllm worker "
            "--coordinator THIS_MACHINE:PORT --name NAME. They stay while coordinators come and go "
            "on this port. For a subset of them, all layers are given to some by name.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    simulate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Predict instead, for the cluster that a YAML file describes; see "
            "config/clusters/mixed.yaml.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="Runs of each configuration, in turns with the others; medians count. Default: 3.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Begin nothing more that would end after this, such as 10m; what is left out is "
            "told. Default: none, quick 150s.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    start_timeout: Annotated[
        str,
        typer.Option(
            metavar="DURATION",
            help="A configuration that does not serve after this has failed.",
            rich_help_panel=_RUN,
        ),
    ] = "5m",
    loads: Annotated[
        str | None,
        typer.Option(
            help="Requests at once, separated by commas. Default: 1,4,16, quick 1,8.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of each prompt. Default: 128, quick 64.", rich_help_panel=_LOAD),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Of each answer. Default: 64, quick 32.", rich_help_panel=_LOAD),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            help="How layers are shared out: speed (by measured speed, and again while it runs), "
            "memory (in proportion to each worker's memory), even (equal numbers of layers).",
            rich_help_panel=_KINDS,
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="What strategy speed makes best: auto, throughput, latency.",
            rich_help_panel=_KINDS,
        ),
    ] = None,
    subsets: Annotated[
        str | None,
        typer.Option(
            help="Give all layers to so many of the fastest workers, in proportion to their speed; "
            "0 for none.",
            rich_help_panel=_KINDS,
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(help="Times to serve the model: auto, 1, 2, ...", rich_help_panel=_KINDS),
    ] = None,
    batch_tokens: Annotated[
        str | None,
        typer.Option(help="max_batch_tokens: tokens of a step.", rich_help_panel=_KINDS),
    ] = None,
    batch_sequences: Annotated[
        str | None,
        typer.Option(help="max_batch_sequences: answers at a time.", rich_help_panel=_KINDS),
    ] = None,
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="auto, float32, bfloat16, float16. Another than the model's own changes answers.",
            rich_help_panel=_KINDS,
        ),
    ] = None,
    wire_dtypes: Annotated[
        str | None,
        typer.Option(
            help="Of activations between workers; a narrower one changes answers.",
            rich_help_panel=_KINDS,
        ),
    ] = None,
    goal: Annotated[
        Goal,
        typer.Option(
            help="What tuned.yaml is for: latency (the smallest load), throughput (the largest), "
            "both (their geometric mean).",
            rich_help_panel=_RESULT,
        ),
    ] = "both",
    any_dtype: Annotated[
        bool,
        typer.Option(
            "--any-dtype",
            help="Let tuned.yaml change dtype and wire_dtype too, and so the answers a little.",
            rich_help_panel=_RESULT,
        ),
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for tuned.yaml and tuned.html. A tuned.yaml that is there is kept as "
            "tuned.yaml.bak; a report is replaced.",
            rich_help_panel=_RESULT,
        ),
    ] = Path("config"),
) -> None:
    """Tune; see `_HELP`."""
    _prepare(output)
    wishes = Wishes(
        model=model,
        quick=quick,
        values={
            "strategy": _choices(strategies, "strategy", "--strategies"),
            "objective": _choices(objectives, "objective", "--objectives"),
            "replicas": _choices(replicas, "replicas", "--replicas"),
            "max_batch_tokens": _choices(batch_tokens, "max_batch_tokens", "--batch-tokens"),
            "max_batch_sequences": _choices(
                batch_sequences, "max_batch_sequences", "--batch-sequences"
            ),
            "dtype": _choices(dtypes, "dtype", "--dtypes"),
            "wire_dtype": _choices(wire_dtypes, "wire_dtype", "--wire-dtypes"),
            "subsets": None if subsets is None else _subsets(subsets),
        },
        loads=_loads(loads or ("1,8" if quick else "1,4,16")),
        prompt_tokens=prompt_tokens or (64 if quick else 128),
        new_tokens=new_tokens or (32 if quick else 64),
        rounds=rounds or 3,
        limit_s=_duration(limit, "--limit") if limit else (150.0 if quick else None),
        goal=goal,
        command=command_line(context.obj or []),
    )
    if simulate is not None:
        for name, value in (("listen", listen), ("workers", workers), ("worker", worker)):
            if value:
                raise ConfigError(f"--{name} and --simulate exclude one another.")
        description = read_description(simulate)
        _finish(
            lambda screen: tune_described(wishes, description, on_step=screen.step),
            f"predicting for the cluster in {simulate}",
            wishes,
            any_dtype,
            output,
        )
        return
    hands = _hands(workers, worker or [], listen, _duration(start_timeout, "--start-timeout"))
    _finish(
        lambda screen: tune(wishes, hands, on_step=screen.step, on_wait=screen.waiting),
        _beginning(hands),
        wishes,
        any_dtype,
        output,
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the code to exit with."""
    try:
        app(args=list(arguments), prog_name="benchmark.py", obj=list(arguments))
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except DistributedLLMError as exc:
        print(f"Error ({exc.code}): {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def _finish(
    run: Callable[[Screen], Tuned], what: str, wishes: Wishes, any_dtype: bool, output: Path
) -> None:
    """Run, then print and write what came of it."""
    screen = Screen()
    screen.start(what)
    try:
        tuned = run(screen)
    finally:
        screen.stop()
    goals: list[Goal] = ["latency", "throughput", "both"]
    picks = {
        goal: recommend(tuned.outcomes, goal, model_dtype=tuned.model_dtype, any_dtype=any_dtype)
        for goal in goals
    }
    chosen = picks[wishes.goal]
    shown = [pick for pick in picks.values() if pick.goal != "both" or pick is chosen]
    screen.results(tuned, shown)
    others = [pick for pick in shown if pick is not chosen]
    settings = tuned_text(chosen, others, tuned.provenance, tuned.extra, simulated=tuned.simulated)
    report = report_html(
        tuned.outcomes,
        shown,
        tuned.provenance,
        settings=settings,
        simulated=tuned.simulated,
        left_out=tuned.left_out,
        predictions=tuned.predictions,
    )
    kept = write_keeping(output / SETTINGS_NAME, settings)
    (output / REPORT_NAME).write_text(report, encoding="utf-8")
    screen.files(output / SETTINGS_NAME, output / REPORT_NAME, kept)


def _beginning(hands: Hands) -> str:
    if hands.local:
        return f"starting {', '.join(worker.name for worker in hands.local)} on this machine"
    port = split_address(hands.listen)[1]
    return (
        f"waiting for {hands.num_workers} workers; here, `dllm token create --uses "
        f"{hands.num_workers} --coordinator 127.0.0.1:{port}` prints the line with which each "
        "machine joins; give each a --name"
    )


# ------------------------------------------------------------------ what flags say


def _prepare(output: Path) -> None:
    """Make the folder for what will be written, before minutes were spent on it.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output {output}: cannot be written to: {error.strerror}. Name another folder."
        ) from None


def _hands(
    count: int | None, named: Sequence[str], listen: str | None, start_timeout_s: float
) -> Hands:
    if listen is not None:
        if named:
            raise ConfigError("--worker starts workers here; with --listen they join: --workers N.")
        _check("bind", listen, "--listen", "coordinator")
        if split_address(listen)[1] == 0:
            raise ConfigError("--listen: port 0 is nobody's; choose one that workers can be given.")
        return Hands((), count or 1, listen, start_timeout_s)
    if named and count:
        raise ConfigError("--workers and --worker exclude one another; give one --worker for each.")
    cores = psutil.cpu_count() or 1
    number = len(named) or count or (3 if cores >= _MANY_CORES else 2)
    threads = str(max(1, cores // number))
    texts = named or [f"worker-{i + 1}" for i in range(number)]
    local = tuple(_local_worker(text, threads) for text in texts)
    if len({worker.name for worker in local}) < len(local):
        raise ConfigError("--worker: two workers have the same name.")
    return Hands(local, number, "", start_timeout_s)


def _local_worker(text: str, threads: str) -> LocalWorker:
    """Return the worker that "old=slowdown:3,threads:1" describes."""
    name, _, rest = text.partition("=")
    _check("name", name, f"--worker {text}", "worker")
    if not name:
        raise ConfigError(f"--worker {text}: begins with the worker's name, such as pc=slowdown:2.")
    settings = {"threads": threads}
    for part in filter(None, rest.split(",")):
        key, colon, value = part.partition(":")
        if key not in _WORKER_SETTINGS or not colon:
            raise ConfigError(
                f"--worker {text}: {part!r} is no setting and value; write "
                f"{', '.join(f'{known}:...' for known in _WORKER_SETTINGS)}."
            )
        _check(key, value, f"--worker {text}", "worker")
        settings[key] = value
    return LocalWorker(name, settings)


def _check(name: str, value: str, flag: str, section: str) -> Any:
    """Return what a text stands for as a value of this setting.

    Raises:
        ConfigError: it stands for none; the message names the flag.
    """
    try:
        found = load_settings(None, environment={}, overrides={f"{section}.{name}": value})
    except ConfigError as error:
        reason = str(error).partition(f"({section}.{name}): ")[2] or str(error)
        raise ConfigError(f"{flag}: {reason}") from None
    return getattr(getattr(found, section), name)


def _choices(text: str | None, name: str, flag: str) -> list[Any] | None:
    """Return the values of a setting that a text names, None if there is no text."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if "custom" in parts:
        raise ConfigError(f"{flag}: custom layers are tried by --subsets.")
    return [_check(name, part, flag, "coordinator") for part in parts]


def _numbers(text: str, flag: str, least: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        raise ConfigError(
            f"{flag}: should be whole numbers from {least} on, such as 1,4,16, not {text!r:.60}"
        )
    return sorted({int(part) for part in parts})


def _loads(text: str) -> tuple[int, ...]:
    loads = _numbers(text, "--loads", 1)
    if loads[-1] > _MOST_REQUESTS:
        raise ConfigError(f"--loads: at most {_MOST_REQUESTS} requests at once, not {loads[-1]}")
    return tuple(loads)


def _subsets(text: str) -> list[int]:
    return [size for size in _numbers(text, "--subsets", 0) if size]


def _duration(text: str, flag: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {text!r:.60} is {error}.") from None
    if seconds <= 0:
        raise ConfigError(f"{flag}: should be more than nothing, not {text!r:.60}.")
    return seconds
