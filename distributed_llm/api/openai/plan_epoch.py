"""The epoch of the plan that a coordinator serves, asked for now and then."""

import asyncio
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

_KEPT_S = 5.0
"""Time for which an epoch is taken for the newest, seconds."""


class Planned(Protocol):
    """What is known of a cluster."""

    @property
    def epoch(self) -> int:
        """Epoch of the newest plan."""


class StatusClient(Protocol):
    """What is asked about the cluster; an `AsyncDistributedClient`."""

    async def status(self) -> Planned:
        """Return the status of the cluster."""


@dataclass(frozen=True)
class _Asked:
    until: float
    status: "asyncio.Future[Planned]"


_asked: WeakKeyDictionary[StatusClient, _Asked] = WeakKeyDictionary()


async def plan_epoch(client: StatusClient) -> int:
    """Return the epoch of the newest plan, as it was a few seconds ago at most.

    Raises:
        ConnectionFailed: the coordinator cannot be reached, or was lost.
    """
    now = asyncio.get_running_loop().time()
    asked = _asked.get(client)
    if asked is None or now > asked.until or _failed(asked.status):
        status = asyncio.ensure_future(client.status())
        status.add_done_callback(_failed)
        asked = _asked[client] = _Asked(now + _KEPT_S, status)
    return (await asyncio.shield(asked.status)).epoch


def _failed(status: "asyncio.Future[Planned]") -> bool:
    return status.done() and (status.cancelled() or status.exception() is not None)
