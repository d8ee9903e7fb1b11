"""`dllm api`: serves the API over HTTP, as a client of a coordinator."""

import asyncio
import os
from collections.abc import Sequence
from typing import Annotated

import typer

from distributed_llm.options import Config, Coordinator, is_here_only, settings_of
from distributed_llm.serving_process import WithParent, start_process


def api(
    coordinator: Coordinator = None,
    config: Config = None,
    bind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Address to listen on; may be repeated.",
            show_default="127.0.0.1:8000",
        ),
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Serve requests without a key, as a client's.")
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
            "api.bind": bind or None,
            "api.open": open_to_all or None,
        },
    )
    in_settings = settings_of(config, {})
    flags = [
        (insecure and not in_settings.client.insecure, "--insecure", "client", "insecure"),
        (open_to_all and not in_settings.api.open, "--open", "api", "open"),
    ]
    for flag_alone, *words in flags:
        if flag_alone:
            _only_here(settings.api.bind, *words)
    start_process(settings.api.log_level, exit_with_parent)
    from distributed_llm.api.serve import serve

    raise typer.Exit(asyncio.run(serve(settings.api, settings.client, on_listening=_print_urls)))


def _only_here(addresses: Sequence[str], flag: str, section: str, setting: str) -> None:
    """Allow an API that asks for no keys on this machine only.

    Raises:
        ConfigError: an address is one that others reach.
    """
    from distributed_llm.common.errors import ConfigError

    for bind in addresses:
        if not is_here_only(bind):
            raise ConfigError(
                f"{flag} lets everybody who reaches {bind} use the model without a key, so the "
                "flag alone is not enough there. Leave it out (`dllm key create` prints a key for "
                f"a program), or set `{setting}: true` under `{section}` in the settings as well."
            )


def _print_urls(urls: Sequence[str]) -> None:
    """Print where the API is, for programs that start one."""
    os.write(1, "".join(f"{url}\n" for url in urls).encode())
