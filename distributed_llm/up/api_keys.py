"""Keys for the page and for programs, which `dllm up` makes once and keeps."""

import contextlib
from pathlib import Path

import msgspec

from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.client.new_key import create_key
from distributed_llm.common.errors import ConfigError, NotAllowed
from distributed_llm.common.keyring import read_secret_file, write_secret_file
from distributed_llm.common.roles import Role

PAGE, APPS = "page", "app"
"""Names of the keys, as `dllm machines list` shows them."""


class ApiKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys that are told to people; empty where none are used.

    Attributes:
        page: of an admin.
        apps: of a client.
    """

    page: str = ""
    apps: str = ""

    def __repr__(self) -> str:
        return "ApiKeys(...)"


async def api_keys(address: str, file: Path | None, timeout_s: float) -> ApiKeys:
    """Return keys that the coordinator knows: those that are kept, or new ones.

    Args:
        address: "HOST:PORT" of the coordinator, at which this machine is admin.
        file: that keeps them; None keeps none.

    Raises:
        ConfigError: the file cannot be read or written, or others may read it.
        DistributedLLMError: the coordinator cannot be reached, or makes no keys.
    """
    kept = _read(file) if file else ApiKeys()
    keys = ApiKeys(
        page=await _known(address, kept.page, PAGE, Role.ADMIN, timeout_s),
        apps=await _known(address, kept.apps, APPS, Role.CLIENT, timeout_s),
    )
    if file and keys != kept:
        write_secret_file(file, msgspec.json.encode(keys))
    return keys


def _read(file: Path) -> ApiKeys:
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(read_secret_file(file) or b"", type=ApiKeys)
    return ApiKeys()


async def _known(address: str, key: str, name: str, role: Role, timeout_s: float) -> str:
    """Return a key if it is one and its role is right, else a new one."""
    if key:
        with contextlib.suppress(NotAllowed, ConfigError):
            async with AsyncDistributedClient(
                address, key=key, connect_timeout_s=timeout_s
            ) as client:
                if (await client.identity()).role is role:
                    return key
    return (await create_key(address, name, role, timeout_s=timeout_s)).text
