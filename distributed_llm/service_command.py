"""`dllm service`: runs a verb of `dllm` in the background, from the start of this machine on."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distributed_llm.services.steps import ROLES, Role

app = typer.Typer(
    help="Run a coordinator or worker in the background, also after restarts.",
    no_args_is_help=True,
)

_CARRIED = (
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
)
"""Variables that a service has as they are now, besides the settings."""

_NOT_CARRIED = ("DLLM_KEY", "DLLM_TORCH_INDEX_URL")
"""A secret, which would stand in a file that others read; and what only matters at installing."""

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")
]


@app.command(
    "install",
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "ignore_unknown_options": True,
    },
)
def install_service(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help="coordinator or worker; its options follow.")],
    dry_run: DryRun = False,
) -> None:
    """Run `dllm VERB` now, with the options that follow, and whenever this machine starts.

    For a worker of a coordinator elsewhere, `dllm join --service` does all that is needed.
    """
    role = _role(verb, "VERB")
    verbs: Any = context.find_root().command
    # What the verb refuses it refuses now, not in a log.
    verbs.get_command(context, verb).make_context(verb, list(context.args))
    install(role, [verb, *context.args], dry_run=dry_run)


@app.command("remove")
def remove_service(
    role: Annotated[str, typer.Argument(help="coordinator or worker.")],
    dry_run: DryRun = False,
) -> None:
    """Stop a service and remove it; `worker` is that of `dllm join --service` as well."""
    from distributed_llm.common.errors import ServiceFailed
    from distributed_llm.services.perform import remove
    from distributed_llm.services.steps import ServiceError

    try:
        remove(_role(role, "ROLE"), _say, dry_run=dry_run)
    except ServiceError as exc:
        raise ServiceFailed(str(exc)) from exc


def install(role: Role, words: Sequence[str], *, dry_run: bool = False) -> None:
    """Install a service that runs `dllm` with `words`, in this folder and with these settings.

    Raises:
        ServiceFailed: it cannot be installed.
    """
    from distributed_llm.common.errors import ServiceFailed
    from distributed_llm.services.perform import install as perform
    from distributed_llm.services.steps import Service, ServiceError

    command = (sys.executable, "-m", "distributed_llm", *words)
    try:
        service = Service(role, command, Path.cwd(), _environment())
        perform(service, _say, dry_run=dry_run)
    except ServiceError as exc:
        raise ServiceFailed(str(exc)) from exc


def _environment() -> dict[str, str]:
    """Return the variables with which a service does what the same command does here."""
    from distributed_llm.common.keyring import STATE_VARIABLE, state_folder

    carried = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _CARRIED or (name.startswith("DLLM_") and name not in _NOT_CARRIED)
    }
    if sys.platform != "win32":  # under sudo, say, another folder would be found
        carried[STATE_VARIABLE] = str(state_folder().absolute())
    return carried


def _role(word: str, hint: str) -> Role:
    for role in ROLES:
        if word == role:
            return role
    raise typer.BadParameter(f"{word!r} is none of {', '.join(ROLES)}.", param_hint=hint)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
