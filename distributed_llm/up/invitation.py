"""What `dllm up` tells people: how its coordinator is asked, and how other machines join it."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.roles import Role
from distributed_llm.common.settings import ClientSettings
from distributed_llm.common.units import split_address
from distributed_llm.up import texts

TOKEN_USES = 10
TOKEN_LIFETIME_S = 86_400.0
"""So the same line joins all machines of a person, and is good for nothing the day after."""


async def invitation(
    client: AsyncDistributedClient, address: str, addresses: Sequence[str], *, insecure: bool
) -> tuple[str, ...]:
    """Return the lines that say so; make a token for them if others can reach the coordinator.

    Args:
        client: of the coordinator.
        address: "HOST:PORT" at which this machine asks it.
        addresses: "HOST:PORT"s at which other machines reach it, best first; maybe none.
        insecure: whether it uses no keys.
    """
    flag = address_flag(address)
    asking = texts.asking(flag, insecure=insecure)
    if not addresses:
        return (*asking, *texts.only_here(split_address(address)[1]))
    best, *others = addresses
    if insecure:
        return (*asking, *texts.joining_without_keys(best, others))
    try:
        token = await client.create_token(Role.WORKER, uses=TOKEN_USES, lifetime_s=TOKEN_LIFETIME_S)
    except DistributedLLMError as exc:  # the cluster is of use without it
        return (*asking, f"  There is no line for other machines: {exc}")
    now = datetime.now()
    line = texts.joining(
        f"dllm join {token.line}",
        others,
        uses=TOKEN_USES,
        expires=now + timedelta(seconds=TOKEN_LIFETIME_S),
        now=now,
        revoke=f"dllm token revoke{flag} {token.id}",
    )
    return (*asking, *line)


def address_flag(address: str) -> str:
    """Return what a verb of `dllm` needs to find a coordinator, with a space before it."""
    default = ClientSettings().coordinator
    return "" if address == default else f" --coordinator {address}"
