"""`dllm key`: keys for programs that ask a coordinator, over HTTP or with the Python client."""

import asyncio
import sys
from typing import Annotated

import typer

from distributed_llm.options import Config, Coordinator, settings_of

app = typer.Typer(help="Make keys for programs.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Make keys for programs; `dllm machines` lists and removes them."""


@app.command("create")
def create(
    name: Annotated[str, typer.Option(help="What the key is for, as others see it.")] = "app",
    role: Annotated[str, typer.Option(help="What it allows: client or admin.")] = "client",
    coordinator: Coordinator = None,
    config: Config = None,
) -> None:
    """Print a key for a program: of the API over HTTP, or of `DistributedClient(key=...)`.

    It works where the coordinator runs, and on other machines that are admin there.
    """
    from pydantic import TypeAdapter, ValidationError

    from distributed_llm.client.new_key import create_key
    from distributed_llm.common.roles import Role
    from distributed_llm.common.settings import ClientSettings, WorkerName

    roles = {str(one.value): one for one in (Role.CLIENT, Role.ADMIN)}
    if role not in roles:
        raise typer.BadParameter(f"{role!r} is none of client, admin.", param_hint="--role")
    try:
        TypeAdapter(WorkerName).validate_python(name)
    except ValidationError as exc:
        why = exc.errors()[0]["msg"].removeprefix("Value error, ")
        raise typer.BadParameter(f"{name!r:.80} {why}.", param_hint="--name") from None
    asked = settings_of(config, {"client.coordinator": coordinator}).client
    key = asyncio.run(
        create_key(asked.coordinator, name, roles[role], timeout_s=asked.connect_timeout_s)
    )
    default = ClientSettings().coordinator
    flag = "" if asked.coordinator == default else f" --coordinator {asked.coordinator}"
    may = "may change the cluster as well" if roles[role] is Role.ADMIN else "may ask the model"
    print(
        f"A secret that is not shown again. Who has it {may}, as {key.name}: over HTTP "
        "(`Authorization: Bearer KEY`, OPENAI_API_KEY), or with DistributedClient(key=...).\n"
        f"To end it: dllm machines remove{flag} {key.name}",
        file=sys.stderr,
    )
    print(key.text)
