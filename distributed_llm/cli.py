"""The `dllm` command: reads settings and flags, and calls what each verb is about.

Exit codes: 0 ok, 1 failed, 2 wrong usage or settings, 3 cannot reach, 4 not enough capacity,
130 interrupted. Data goes to stdout, everything else to stderr.
"""

import asyncio
import contextlib
import gc
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_llm import config_command, generate_command
from distributed_llm.common import streams
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.stopping import interruptible
from distributed_llm.options import (
    AsJson,
    Config,
    Coordinator,
    Objective,
    Strategy,
    client_of,
    settings_of,
)

if TYPE_CHECKING:
    from distributed_llm.common.model_files import TensorInfo

app = typer.Typer(
    name="dllm",
    help="Run one language model on several machines, each too small for it alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(config_command.app, name="config")

WithParent = Annotated[bool, typer.Option("--exit-with-parent", hidden=True)]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"dllm {version('distributedllm')} (Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def coordinator(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder or hub id; nothing for the built-in model."),
    ] = None,
    config: Config = None,
    bind: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Address to listen on.", show_default="127.0.0.1:5555"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
    ] = None,
    strategy: Strategy = None,
    objective: Objective = None,
    min_workers: Annotated[
        int | None,
        typer.Option(help="Workers to wait for before the first plan.", show_default="1"),
    ] = None,
    exit_with_parent: WithParent = False,
) -> None:
    """Serve a model: share its layers out to the workers that join, answer clients."""
    settings = settings_of(
        config,
        {
            "coordinator.model": model,
            "coordinator.bind": bind,
            "coordinator.dtype": dtype,
            "coordinator.strategy": strategy,
            "coordinator.objective": objective,
            "coordinator.min_workers": min_workers,
        },
    )
    _start_process(settings.coordinator.log_level, exit_with_parent)
    from distributed_llm.coordinator.serve import serve

    raise typer.Exit(asyncio.run(serve(settings.coordinator, on_listening=_print_address)))


@app.command()
def worker(
    coordinator: Coordinator = None,
    config: Config = None,
    name: Annotated[
        str | None,
        typer.Option(help="What to call this worker.", show_default="after this machine"),
    ] = None,
    peer_bind: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Address for other workers.", show_default="0.0.0.0:0"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda:0, mps.", show_default="auto")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; 0 is all cores.", show_default="0")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="For weights and KV cache, such as 6GiB.", show_default="what is free"),
    ] = None,
    slowdown: Annotated[
        float | None,
        typer.Option(help="Look this many times slower, for tests.", show_default="1.0"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder here.", show_default="the coordinator's")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the coordinator as long as it takes.")
    ] = False,
    exit_with_parent: WithParent = False,
) -> None:
    """Join a coordinator and serve layers with this machine."""
    settings = settings_of(
        config,
        {
            "worker.coordinator": coordinator,
            "worker.name": name,
            "worker.peer_bind": peer_bind,
            "worker.device": device,
            "worker.threads": threads,
            "worker.max_memory": max_memory,
            "worker.slowdown": slowdown,
            "worker.model": model,
            "worker.connect_timeout_s": 0.0 if wait else None,
        },
    )
    _start_process(settings.worker.log_level, exit_with_parent)
    # Threads wait actively for the next product of a step, about 0.1 ms, but not for the next step:
    # other workers may compute meanwhile. GNU's OpenMP reads it when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()  # collecting among a million new objects takes a third of the time of the imports
    from distributed_llm.worker.work import work

    gc.enable()
    raise typer.Exit(asyncio.run(work(settings.worker)))


app.command()(generate_command.generate)


@app.command()
def status(coordinator: Coordinator = None, config: Config = None, as_json: AsJson = False) -> None:
    """Show the workers, their layers, memory and speed."""
    settings = settings_of(config, {"client.coordinator": coordinator})
    from distributed_llm import console

    with client_of(settings) as client:
        console.print_status(client.status(), as_json=as_json)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder or hub id; a config.json, without weights; '' for the built-in "
            "model."
        ),
    ],
    worker: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]SIZE[,BANDWIDTH[,FLOPS]]",
            help="Memory and speed of one worker, such as pc=8GiB,40GB/s,1.5TFLOPS; give it "
            "several times.",
        ),
    ],
    config: Config = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
    ] = None,
    strategy: Strategy = None,
    objective: Objective = None,
    as_json: AsJson = False,
) -> None:
    """Show who would get which layers and how fast that would be, without starting anything."""
    settings = settings_of(
        config,
        {
            "coordinator.dtype": dtype,
            "coordinator.strategy": strategy,
            "coordinator.objective": objective,
        },
    ).coordinator
    from distributed_llm import console
    from distributed_llm.coordinator import serve

    run = serve.plan(model, worker, settings, parameters_of=_parameters_of)
    console.print_plan(run, as_json=as_json)


def _parameters_of(config: Mapping[str, Any]) -> "Mapping[str, TensorInfo]":
    from distributed_llm.worker.model.empty_model import parameters_of  # loads torch

    return parameters_of(config)


@app.command()
def drain(
    name: Annotated[str, typer.Argument(help="Worker, as `dllm status` shows it.")],
    coordinator: Coordinator = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Have a worker leave once others have its layers, while requests run.

    Waits until it has left. Ctrl-C ends the waiting only.
    """
    settings = settings_of(config, {"client.coordinator": coordinator})
    from distributed_llm import console

    with client_of(settings) as client:
        console.drain(client, name, as_json=as_json)


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")] = "Once upon a time",
    workers: Annotated[int, typer.Option(min=1, max=6, help="Workers to start.")] = 3,
) -> None:
    """Start a coordinator, workers and the built-in model here; write a story."""
    from distributed_llm import console

    with interruptible():
        console.run_demo(prompt, workers)


def main() -> None:
    """Run the command line and exit with its code."""
    streams.prepare()
    code = _run(app)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends anyway
    # Data may wait to be written. A failure to write is told once.
    code = code or _run(sys.stdout.flush)
    # End now: a compute thread in the middle of a layer must not hold the process back.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def _run(work: Callable[[], object]) -> int:
    """Do `work`, say why it failed if it did, and return the exit code."""
    try:
        work()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except KeyboardInterrupt:
        return 130
    except DistributedLLMError as exc:
        print(f"Error ({exc.code}): {exc}", file=sys.stderr)
        return exc.exit_code
    except BrokenPipeError:  # who reads the output has enough
        return 1
    return 0


def _print_address(address: str) -> None:
    """Print the coordinator's address, for programs that start one."""
    try:
        os.write(1, f"{address}\n".encode())
    except OSError as exc:
        logging.getLogger(__name__).warning("the address cannot be printed: %s", exc)


def _start_process(log_level: str, exit_with_parent: bool) -> None:
    """Prepare a process that serves: logs to stderr, an end with its parent."""
    from distributed_llm.common.log import configure

    configure(log_level)
    if sys.platform == "win32":  # the default loop cannot watch ZeroMQ's file descriptor
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    if exit_with_parent:
        threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    with contextlib.suppress(OSError):  # stdin is closed
        while os.read(0, 1024):  # empty once the parent's end of the pipe is closed
            pass
    os._exit(0)
