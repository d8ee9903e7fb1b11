"""Options that several verbs of `dllm` have, and what is made of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from distributed_llm.client.client import DistributedClient
    from distributed_llm.common.settings import Settings

Config = Annotated[
    Path | None, typer.Option("--config", help="YAML file of settings; see `dllm config`.")
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        help="Address to ask.",
        show_default="127.0.0.1:5555",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="What weights become while they are loaded: none, int8, int4, or auto: the most bits "
        "that fit.",
        show_default="none",
    ),
]
KVDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype",
        help="How keys and values of the context are kept: auto, int8 or fp8.",
        show_default="auto",
    ),
]
MaxContext = Annotated[
    str | None,
    typer.Option(
        "--max-context",
        metavar="TOKENS",
        help="Tokens of prompt and answer together at most; auto: as many as the model can.",
        show_default="auto",
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="How to share layers out: by speed or memory, even, or custom.", show_default="speed"
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        help="What strategy speed makes best: auto, throughput or latency.", show_default="auto"
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Use no keys: no encryption, everybody may do all.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings_of(config: Path | None, overrides: dict[str, Any]) -> "Settings":
    """Return the settings of file and environment, and those of the command line that are given.

    Args:
        overrides: by dotted name; None is an option that was not given.

    Raises:
        ConfigError: a setting is wrong.
    """
    from distributed_llm.common.config import load_settings

    return load_settings(config, environment=os.environ, overrides=overrides)


def options_as_words(options: Mapping[str, object]) -> list[str]:
    """Return options of a command line, by the names of parameters; None is one not given."""
    given = {name: value for name, value in options.items() if value is not None}
    return [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def client_of(settings: "Settings") -> "DistributedClient":
    """Return a client of the coordinator that is to be asked."""
    from distributed_llm.client.client import DistributedClient

    asked = settings.client
    return DistributedClient(
        asked.coordinator, insecure=asked.insecure, connect_timeout_s=asked.connect_timeout_s
    )


def is_here_only(bind: str) -> bool:
    """Return whether only this machine reaches what listens on "HOST:PORT"."""
    from distributed_llm.common.addresses import ip_of
    from distributed_llm.common.units import split_address

    host, _ = split_address(bind)
    ip = ip_of(host)
    return host == "localhost" or (ip is not None and ip.is_loopback)


def allow_insecure(bind: str, in_settings: bool) -> None:
    """Allow a coordinator without keys on this machine; beyond it only if that is settled.

    Args:
        bind: "HOST:PORT" that it is to listen on.
        in_settings: whether a file of settings, or the environment, says so too.

    Raises:
        ConfigError: it is not allowed.
    """
    from distributed_llm.common.errors import ConfigError

    if in_settings or is_here_only(bind):
        return
    raise ConfigError(
        f"--insecure lets everybody who reaches {bind} do everything, so the flag alone is not "
        "enough there. Leave it out (machines join by a line that `dllm token create` prints), or "
        "set `insecure: true` under `coordinator` in the settings as well."
    )
