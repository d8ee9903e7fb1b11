"""Makes a key for a program: of a machine of its own, which nothing has to join for."""

from dataclasses import dataclass, field, replace

from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.client.enrolment import ask
from distributed_llm.common.join_line import parse_join_line
from distributed_llm.common.keyring import text_of_key
from distributed_llm.common.roles import Role
from distributed_llm.common.transport import Login, new_key_pair

_TOKEN_LIFETIME_S = 60.0
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class NewKey:
    """A key for programs, which `DistributedClient(key=...)` and the API over HTTP take.

    Attributes:
        text: the key; a secret.
        name: by which the coordinator knows it, as `dllm machines list` shows it.
    """

    text: str = field(repr=False)
    name: str


async def create_key(address: str, name: str, role: Role, *, timeout_s: float) -> NewKey:
    """Return a new key, made with the rights of this machine; see `new_key`.

    Raises:
        NotAllowed: this machine is no admin there.
        ConnectionFailed: there is no coordinator.
    """
    async with AsyncDistributedClient(address, connect_timeout_s=timeout_s) as client:
        return await new_key(client, address, name, role, timeout_s=timeout_s)


async def new_key(
    client: AsyncDistributedClient,
    address: str,
    name: str,
    role: Role,
    *,
    timeout_s: float = _TIMEOUT_S,
) -> NewKey:
    """Return a new key; `remove_machine` of its name ends it.

    Args:
        client: of an admin.
        address: "HOST:PORT" at which this process reaches the same coordinator.
        name: that the key would like to have.
        role: what its holder may do.

    Raises:
        NotAllowed: the client is no admin's.
        ConnectionFailed: there is no coordinator.
    """
    token = await client.create_token(role, uses=1, lifetime_s=_TOKEN_LIFETIME_S)
    line = replace(parse_join_line(token.line), address=address)
    keys = new_key_pair()
    enrolled = await ask(line, keys, name, timeout_s)
    return NewKey(text_of_key(Login(line.server, keys)), enrolled.name)
