"""`dllm token` and `dllm machines`: who may connect to a coordinator."""

import sys
from typing import Annotated

import typer

from distributed_llm.options import AsJson, Config, Coordinator, client_of, settings_of

tokens = typer.Typer(
    help="Let machines enrol: create, list or revoke tokens.", no_args_is_help=True
)
machines = typer.Typer(
    help="List, remove or readmit the machines that are enrolled.", no_args_is_help=True
)


@tokens.command("create")
def create_token(
    role: Annotated[
        str, typer.Option(help="What machines that join may do: worker, client or admin.")
    ] = "worker",
    uses: Annotated[int, typer.Option(help="Machines that may join by it; 0 is any number.")] = 1,
    expires: Annotated[
        str, typer.Option(metavar="DURATION", help="Time for which they may; 0 is for ever.")
    ] = "1d",
    coordinator: Coordinator = None,
    config: Config = None,
) -> None:
    """Print a line by which another machine joins. It is a secret until it is used up."""
    from distributed_llm.common.roles import Role
    from distributed_llm.common.units import parse_duration

    try:
        wanted = Role(role)
    except ValueError:
        raise typer.BadParameter(
            f"{role!r} is none of worker, client, admin.", param_hint="--role"
        ) from None
    try:
        lifetime_s = parse_duration(expires)
    except ValueError as exc:
        raise typer.BadParameter(f"{expires!r} is {exc}.", param_hint="--expires") from exc
    if uses < 0:
        raise typer.BadParameter("it should be at least 0.", param_hint="--uses")
    settings = settings_of(config, {"client.coordinator": coordinator})
    with client_of(settings) as client:
        token = client.create_token(wanted, uses=uses or None, lifetime_s=lifetime_s or None)
    if not token.addresses:
        print(
            "The coordinator listens on this machine only, so the line is good for other users of "
            "it. For other machines, start it with --bind 0.0.0.0:PORT.",
            file=sys.stderr,
        )
    print("On another machine:", file=sys.stderr)
    print(f"dllm join {token.line}")


@tokens.command("list")
def list_tokens(
    coordinator: Coordinator = None, config: Config = None, as_json: AsJson = False
) -> None:
    """Show the tokens by which machines may still join; not their secrets."""
    from distributed_llm import console

    with client_of(settings_of(config, {"client.coordinator": coordinator})) as client:
        console.print_tokens(client.members(), as_json=as_json)


@tokens.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `dllm token list` shows it.")],
    coordinator: Coordinator = None,
    config: Config = None,
) -> None:
    """Let nobody join by a token any more. Machines that did stay."""
    with client_of(settings_of(config, {"client.coordinator": coordinator})) as client:
        client.revoke_token(token_id)
    print(f"{token_id} is revoked", file=sys.stderr)


@machines.command("list")
def list_machines(
    coordinator: Coordinator = None, config: Config = None, as_json: AsJson = False
) -> None:
    """Show the machines that may connect."""
    from distributed_llm import console

    with client_of(settings_of(config, {"client.coordinator": coordinator})) as client:
        console.print_machines(client.members(), as_json=as_json)


@machines.command("remove")
def remove_machine(
    name: Annotated[str, typer.Argument(help="As `dllm machines list` shows it.")],
    coordinator: Coordinator = None,
    config: Config = None,
) -> None:
    """Let a machine connect no more; what it does ends at once, and others go on with it."""
    with client_of(settings_of(config, {"client.coordinator": coordinator})) as client:
        client.remove_machine(name)
    print(f"{name} is removed", file=sys.stderr)


@machines.command("readmit")
def readmit_machine(
    name: Annotated[str, typer.Argument(help="As `dllm machines list` shows it.")],
    coordinator: Coordinator = None,
    config: Config = None,
) -> None:
    """Let a machine connect again that is quarantined, for it broke the protocol."""
    with client_of(settings_of(config, {"client.coordinator": coordinator})) as client:
        client.readmit_machine(name)
    print(f"{name} may connect again", file=sys.stderr)
