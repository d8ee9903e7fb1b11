"""The `dllm` command: reads settings and flags, and calls what each verb is about.

Exit codes: 0 ok, 1 failed, 2 wrong usage or settings, 3 cannot reach, 4 not enough capacity,
130 interrupted. Data goes to stdout, everything else to stderr.
"""

import asyncio
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_llm import (
    api_command,
    cache_command,
    chat_command,
    config_command,
    generate_command,
    key_command,
    members_command,
    service_command,
    up_command,
    worker_command,
)
from distributed_llm.common import streams
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.stopping import interruptible
from distributed_llm.options import (
    AsJson,
    Config,
    Coordinator,
    Insecure,
    KVDtype,
    MaxContext,
    Objective,
    Quantize,
    Strategy,
    allow_insecure,
    client_of,
    settings_of,
)
from distributed_llm.serving_process import WithParent, start_process

if TYPE_CHECKING:
    from distributed_llm.common.model_files import TensorInfo

app = typer.Typer(
    name="dllm",
    help="Run one language model on several machines, each too small for it alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# Groups of verbs in `dllm --help`, in this order.
START, ASK, MACHINES, MORE = "Start", "Ask", "Machines of a cluster", "Settings and more"

app.command(rich_help_panel=START)(up_command.up)
app.command(rich_help_panel=START)(worker_command.join)


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


@app.command(rich_help_panel=START)
def coordinator(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder, GGUF file, ollama:NAME or hub id; nothing: the built-in model."
        ),
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
    quantize: Quantize = None,
    kv_dtype: KVDtype = None,
    max_context: MaxContext = None,
    strategy: Strategy = None,
    objective: Objective = None,
    min_workers: Annotated[
        int | None,
        typer.Option(help="Workers to wait for before the first plan.", show_default="1"),
    ] = None,
    insecure: Insecure = False,
    exit_with_parent: WithParent = False,
) -> None:
    """Serve a model: share its layers out to the workers that join, answer clients."""
    settings = settings_of(
        config,
        {
            "coordinator.model": model,
            "coordinator.bind": bind,
            "coordinator.dtype": dtype,
            "coordinator.quantize": quantize,
            "coordinator.kv_dtype": kv_dtype,
            "coordinator.max_context": max_context,
            "coordinator.strategy": strategy,
            "coordinator.objective": objective,
            "coordinator.min_workers": min_workers,
            "coordinator.insecure": insecure or None,
        },
    )
    if insecure:
        allow_insecure(settings.coordinator.bind, settings_of(config, {}).coordinator.insecure)
    start_process(settings.coordinator.log_level, exit_with_parent)
    from distributed_llm.coordinator.serve import open_to_serve, serve

    opened = open_to_serve(settings.coordinator)
    raise typer.Exit(asyncio.run(serve(settings.coordinator, *opened, on_listening=_print_address)))


app.command(rich_help_panel=START)(worker_command.worker)
app.command(rich_help_panel=START)(api_command.api)
app.add_typer(service_command.app, name="service", rich_help_panel=START)
app.command(rich_help_panel=ASK)(generate_command.generate)
app.command(rich_help_panel=ASK)(chat_command.chat)


@app.command(rich_help_panel=ASK)
def status(
    coordinator: Coordinator = None,
    config: Config = None,
    as_json: AsJson = False,
    insecure: Insecure = False,
) -> None:
    """Show the workers, their layers, memory and speed."""
    settings = settings_of(
        config, {"client.coordinator": coordinator, "client.insecure": insecure or None}
    )
    from distributed_llm import console

    with client_of(settings) as client:
        console.print_status(client.status(), as_json=as_json)


@app.command(rich_help_panel=ASK)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, GGUF file or hub id; a config.json, without weights; '' for the built-in "
            "model."
        ),
    ],
    worker: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]SIZE[+ram:RAM][+DISK][,BANDWIDTH[,FLOPS]]",
            help="Memory and speed of one worker, such as pc=8GiB,40GB/s,1.5TFLOPS; give it "
            "several times.",
        ),
    ],
    config: Config = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
    ] = None,
    quantize: Quantize = None,
    kv_dtype: KVDtype = None,
    max_context: MaxContext = None,
    strategy: Strategy = None,
    objective: Objective = None,
    as_json: AsJson = False,
) -> None:
    """Show who would get which layers and how fast that would be, without starting anything."""
    settings = settings_of(
        config,
        {
            "coordinator.dtype": dtype,
            "coordinator.quantize": quantize,
            "coordinator.kv_dtype": kv_dtype,
            "coordinator.max_context": max_context,
            "coordinator.strategy": strategy,
            "coordinator.objective": objective,
        },
    ).coordinator
    from distributed_llm import console
    from distributed_llm.coordinator import serve
    from distributed_llm.coordinator.loadable import ensure_loadable

    run = serve.plan(
        *(model, worker, settings),
        parameters_of=_parameters_of,
        check_loading=ensure_loadable if model else lambda checkpoint: None,
    )
    console.print_plan(run, as_json=as_json)


def _parameters_of(config: Mapping[str, Any]) -> "Mapping[str, TensorInfo]":
    from distributed_llm.worker.model.empty_model import parameters_of  # loads torch

    return parameters_of(config)


@app.command(rich_help_panel=MACHINES)
def drain(
    name: Annotated[str, typer.Argument(help="Worker, as `dllm status` shows it.")],
    coordinator: Coordinator = None,
    config: Config = None,
    as_json: AsJson = False,
    insecure: Insecure = False,
) -> None:
    """Have a worker leave once others have its layers, while requests run.

    Waits until it has left. Ctrl-C ends the waiting only.
    """
    settings = settings_of(
        config, {"client.coordinator": coordinator, "client.insecure": insecure or None}
    )
    from distributed_llm import console

    with client_of(settings) as client:
        console.drain(client, name, as_json=as_json)


app.add_typer(members_command.tokens, name="token", rich_help_panel=MACHINES)
app.add_typer(members_command.machines, name="machines", rich_help_panel=MACHINES)
app.add_typer(key_command.app, name="key", rich_help_panel=MACHINES)
app.add_typer(cache_command.app, name="cache", rich_help_panel=MACHINES)
app.add_typer(config_command.app, name="config", rich_help_panel=MORE)


@app.command(rich_help_panel=MORE)
def demo(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")] = "Once upon a time",
    workers: Annotated[int, typer.Option(min=1, max=6, help="Workers to start.")] = 3,
    serve: Annotated[
        bool, typer.Option("--serve", help="Go on as `dllm up`, with the page, until Ctrl-C.")
    ] = False,
) -> None:
    """Start a coordinator, workers and the built-in model here; write a story."""
    from distributed_llm import console

    with interruptible():
        console.run_demo(prompt, workers)
    if serve:
        up_command.up()


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
