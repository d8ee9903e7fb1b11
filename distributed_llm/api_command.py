"""`dllm api`: serves the API over HTTP, as a client of a coordinator."""

import asyncio
import os
from typing import Annotated

import typer

from distributed_llm.options import Config, Coordinator, settings_of
from distributed_llm.serving_process import WithParent, start_process


def api(
    coordinator: Coordinator = None,
    config: Config = None,
    bind: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Address to listen on.", show_default="127.0.0.1:8000"
        ),
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Serve requests of this machine without a key.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="For a coordinator that uses no keys.")
    ] = False,
    exit_with_parent: WithParent = False,
) -> None:
    """Serve the API and the page over HTTP: for OpenAI's, Anthropic's and Ollama's clients."""
    settings = settings_of(
        config,
        {
            "client.coordinator": coordinator,
            "client.insecure": insecure or None,
            "api.bind": bind,
            "api.open": open_to_all or None,
        },
    )
    start_process(settings.api.log_level, exit_with_parent)
    from distributed_llm.api.serve import serve

    raise typer.Exit(asyncio.run(serve(settings.api, settings.client, on_listening=_print_address)))


def _print_address(address: str) -> None:
    """Print where the API is, for programs that start one."""
    os.write(1, f"{address}\n".encode())
