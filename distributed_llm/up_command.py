"""`dllm up`: starts a coordinator, a worker and the API here, and says how they are used."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from distributed_llm.options import (
    Config,
    Insecure,
    KVDtype,
    MaxContext,
    Quantize,
    allow_insecure,
    options_as_words,
)
from distributed_llm.serving_process import WithParent, start_process
from distributed_llm.worker_command import Device, MaxMemory, Name, Threads

BIND = "0.0.0.0:5555"
"""Where the coordinator of `dllm up` listens, unless told otherwise."""


def up(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder, GGUF file, ollama:NAME or hub id; nothing: the built-in model."
        ),
    ] = None,
    config: Config = None,
    bind: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address to listen on.", show_default=BIND),
    ] = None,
    quantize: Quantize = None,
    kv_dtype: KVDtype = None,
    max_context: MaxContext = None,
    name: Name = None,
    device: Device = None,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Let the API serve requests without a key.")
    ] = False,
    insecure: Insecure = False,
    exit_with_parent: WithParent = False,
) -> None:
    """Serve a model with this machine, and with others that join it by the line that is printed.

    It starts a coordinator, a worker, and the API over HTTP with its page. Where this machine alone
    is too small for the model, it waits for others. Ctrl-C ends all, a second one at once.
    """
    import os

    from distributed_llm.common.config import read_settings
    from distributed_llm.common.keyring import state_folder
    from distributed_llm.common.units import split_address
    from distributed_llm.coordinator.serve import open_to_serve
    from distributed_llm.up.run import Wanted, run

    served = {"quantize": quantize, "kv_dtype": kv_dtype, "max_context": max_context}
    machine = {"name": name, "device": device, "threads": threads, "max_memory": max_memory}
    settings, given = read_settings(
        config,
        environment=os.environ,
        overrides={
            "coordinator.model": model,
            "coordinator.bind": bind,
            "coordinator.insecure": insecure or None,
            **{f"coordinator.{key}": value for key, value in served.items()},
            **{f"worker.{key}": value for key, value in machine.items()},
        },
    )
    where = settings.coordinator.bind if ("coordinator", "bind") in given else BIND
    if insecure:
        in_settings = read_settings(config, environment=os.environ, overrides={})[0]
        allow_insecure(where, in_settings.coordinator.insecure)
    start_process("warning", exit_with_parent)
    open_to_serve(settings.coordinator, _progress)  # what cannot be served is refused first
    shared = [
        *options_as_words({"config": config}),
        *(["--insecure"] if settings.coordinator.insecure else []),
    ]
    port = split_address(where)[1]
    logs = state_folder() / "logs" / str(port)
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted = Wanted(
        coordinator=(
            *("coordinator", *([model] if model else []), "--bind", where, *shared),
            *options_as_words(served),
        ),
        worker=("worker", *shared, *options_as_words(machine)),
        api=("api", *shared, *(["--open"] if open_to_all else [])),
        api_bind=",".join(settings.api.bind) if ("api", "bind") in given else None,
        bind=where,
        insecure=settings.coordinator.insecure,
        logs=logs,
        keys=state_folder() / "api_keys" / f"{port}.json" if port else None,
        progress=_progress,
        show=_show,
    )
    raise typer.Exit(asyncio.run(run(wanted)))


def _progress(text: str) -> None:
    typer.secho(text, dim=True, err=True)


def _show(lines: Sequence[str]) -> None:
    first, *others = lines
    typer.secho(f"\n{first}", bold=True)
    typer.echo("\n".join(others))
    sys.stdout.flush()
