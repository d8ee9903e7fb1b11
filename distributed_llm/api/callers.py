"""Who asks: the keys that requests come with, and for each a connection to the coordinator.

A key of the API is a key of the wire: the text that `dllm key create` prints, which also
`DistributedClient(key=...)` takes. The coordinator knows it as a machine with a name and a role, so
roles, fairness, prefix sharing and removal are the coordinator's, and hold here without a second
list of keys. Nobody needs to trust this process with more than the requests that pass it.
"""

import asyncio
import contextlib
import hashlib
import hmac
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from distributed_llm.api.observed import ObservedClient
from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.common.errors import (
    ConfigError,
    NotAllowed,
    NotEnrolled,
    Overloaded,
    Quarantined,
)
from distributed_llm.common.keyring import key_of_text
from distributed_llm.common.roles import Role

MAX_CALLERS = 256
"""Keys whose connections are kept; those that are used longest ago are closed first."""

_MAX_REFUSED = 1024
"""Keys that are remembered as refused."""

_REFUSED_FOR_S = 5.0
"""Time for which a key that was refused is not tried again, seconds."""

_MAX_CONNECTING = 16
"""Keys that are tried at the same time."""

_MAX_KEY_CHARS = 256


class Unauthorized(Exception):
    """A request has no key, or one that the coordinator does not know.

    The message says what happened and what to do.
    """


@dataclass(frozen=True)
class Caller:
    """Whoever holds a key.

    Attributes:
        name: by which the coordinator knows the key; empty where it uses none.
        role: what the caller may do.
        client: its connection to the coordinator.
        model: name of the model that the coordinator serves.
    """

    name: str
    role: Role
    client: AsyncDistributedClient
    model: str = ""

    @property
    def is_admin(self) -> bool:
        """Whether it may change the cluster."""
        return self.role.includes(Role.ADMIN)


@dataclass
class _Kept:
    digest: bytes
    client: AsyncDistributedClient
    uses: int = 0


class Callers:
    """Finds out who asks, and keeps a connection for each.

    Args:
        address: "HOST:PORT" of the coordinator.
        insecure: whether it uses no keys; then everybody is served.
        open_to_all: whether requests without a key, or with what is none, are served, as those of
            the role client.
        connect_timeout_s: how long to wait for the coordinator.

    Attributes:
        address: of the coordinator.
        own: client of this machine's own key.
    """

    def __init__(
        self, address: str, *, insecure: bool, open_to_all: bool, connect_timeout_s: float
    ) -> None:
        self.address = address
        self._insecure = insecure
        self._open_to_all = open_to_all
        self._connect_timeout_s = connect_timeout_s
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._trying: dict[bytes, _Kept] = {}
        self._refused: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._connecting = asyncio.Semaphore(_MAX_CONNECTING)
        self.own = ObservedClient(address, insecure=insecure, connect_timeout_s=connect_timeout_s)

    @contextlib.asynccontextmanager
    async def caller(self, key: str | None) -> AsyncGenerator[Caller, None]:
        """Yield who holds a key; None is a request without one.

        Raises:
            Unauthorized: nobody does, or the request needs one.
            ConnectionFailed: the coordinator cannot be reached.
        """
        if key is not None and self._open_to_all and not _looks_like_one(key):
            key = None  # clients that have to send one send anything
        if self._insecure or (key is None and self._open_to_all):
            identity = await self.own.identity()
            role = identity.role if self._insecure else Role.CLIENT
            name = identity.name if self._insecure else ""  # the API's own key is nobody's
            yield Caller(name, role, self.own, identity.model)
            return
        if key is None:
            raise Unauthorized(
                "This request has no key. Send one as `Authorization: Bearer KEY`; `dllm key "
                "create` prints one where the coordinator runs."
            )
        kept = self._find(key)
        kept.uses += 1
        try:
            yield await self._identify(kept)
        finally:
            kept.uses -= 1
            if not kept.uses and self._kept.get(kept.digest) is not kept:
                if self._trying.get(kept.digest) is kept:
                    del self._trying[kept.digest]
                await kept.client.close()

    async def close(self) -> None:
        """Close all connections, which cancels the requests that are under way."""
        every = (*self._kept.values(), *self._trying.values())
        clients = [self.own, *(kept.client for kept in every)]
        self._kept.clear()
        for client in clients:
            await client.close()

    def _find(self, key: str) -> _Kept:
        """Return the connection of a key, which may not be made yet.

        Raises:
            Unauthorized: the text is no key, or it was refused a moment ago.
        """
        digest = hashlib.sha256(key.encode(errors="replace")).digest()
        kept = self._kept.get(digest) or self._trying.get(digest)
        if kept is not None and hmac.compare_digest(kept.digest, digest):
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return kept
        until, why = self._refused.get(digest, (0.0, ""))
        if asyncio.get_running_loop().time() < until:
            raise Unauthorized(why)
        if len(key) > _MAX_KEY_CHARS:
            raise Unauthorized(_UNKNOWN)
        try:
            client = ObservedClient(
                self.address, key=key, connect_timeout_s=self._connect_timeout_s
            )
        except (ConfigError, UnicodeError):
            raise Unauthorized(_UNKNOWN) from None
        self._trying[digest] = _Kept(digest, client)
        return self._trying[digest]

    async def _identify(self, kept: _Kept) -> Caller:
        """Return who holds the key of a connection, which is made if it is not there.

        Raises:
            Unauthorized: the coordinator does not know the key.
            ConnectionFailed: the coordinator cannot be reached.
        """
        is_new = kept.digest not in self._kept
        try:
            async with self._turn() if is_new else contextlib.nullcontext():
                identity = await kept.client.identity()
        except Quarantined:
            raise
        except NotAllowed as exc:
            self._kept.pop(kept.digest, None)
            why = _UNKNOWN if isinstance(exc, NotEnrolled) else str(exc)
            self._refuse(kept.digest, why)
            raise Unauthorized(why) from exc
        self._trying.pop(kept.digest, None)
        if self._kept.setdefault(kept.digest, kept) is kept and is_new:
            await self._close_idle()
        return Caller(identity.name, identity.role, kept.client, identity.model)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """Wait until fewer keys are tried than may be at a time.

        Raises:
            Overloaded: that takes too long.
        """
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._connecting.acquire()
        except TimeoutError:
            raise Overloaded(
                "The API tries as many keys as it may. Ask again in a moment.", retry_after_s=1.0
            ) from None
        try:
            yield
        finally:
            self._connecting.release()

    async def _close_idle(self) -> None:
        """Close connections that are not used, longest ago first, while there are too many."""
        idle = [digest for digest, one in self._kept.items() if not one.uses]
        for digest in idle[: max(0, len(self._kept) - MAX_CALLERS)]:
            await self._kept.pop(digest).client.close()

    def _refuse(self, digest: bytes, why: str) -> None:
        self._refused[digest] = (asyncio.get_running_loop().time() + _REFUSED_FOR_S, why)
        while len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)


def _looks_like_one(key: str) -> bool:
    """Return whether a text may be a key of some coordinator."""
    try:
        key_of_text(key[:_MAX_KEY_CHARS])
    except (ConfigError, UnicodeError):
        return False
    return True


_UNKNOWN = (
    "The coordinator does not know this key: it is not copied right, was removed, or is for "
    "another coordinator. `dllm key create` prints a new one where the coordinator runs."
)
