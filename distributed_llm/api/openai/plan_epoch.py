"""The epoch of the plan that is served, asked for now and then."""

import asyncio
from typing import Protocol

from distributed_llm.common.errors import DistributedLLMError

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


class PlanEpoch:
    """The epoch of the newest plan, as it was a few seconds ago at most.

    However many ask at the same time, the coordinator is asked once.
    """

    def __init__(self) -> None:
        self._asked: asyncio.Task[int] | None = None
        self._until = 0.0

    async def now(self, client: StatusClient) -> int:
        """Return it.

        Args:
            client: by which the coordinator is asked, if it has to be.

        Raises:
            ConnectionFailed: the coordinator cannot be reached, or was lost.
        """
        clock = asyncio.get_running_loop().time
        asked = self._asked
        if asked is None or clock() > self._until:
            asked = self._asked = asyncio.get_running_loop().create_task(_epoch(client))
            asked.add_done_callback(_look_at)
            self._until = clock() + _KEPT_S
        try:
            return await asyncio.shield(asked)
        except DistributedLLMError:  # by which another one asked
            self._asked = None
            return await _epoch(client)


async def _epoch(client: StatusClient) -> int:
    return (await client.status()).epoch


def _look_at(task: asyncio.Task[int]) -> None:
    """Take note of an error, for nobody may wait any more."""
    if not task.cancelled():
        task.exception()
