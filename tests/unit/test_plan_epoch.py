"""The epoch of the plan, which fingerprints of answers tell."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from distributed_llm.api.openai.answer_head import fingerprint_of
from distributed_llm.api.openai.plan_epoch import PlanEpoch
from distributed_llm.common.errors import CoordinatorLost


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())


@dataclass
class Status:
    epoch: int


class Client:
    """Knows an epoch, or fails; counts how often it is asked."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch
        self.asked = 0

    async def status(self) -> Status:
        self.asked += 1
        await asyncio.sleep(0)
        if self.epoch is None:
            raise CoordinatorLost("gone")
        return Status(self.epoch)


@on_loop
async def test_all_who_ask_at_the_same_time_ask_once() -> None:
    epoch, client = PlanEpoch(), Client(3)
    assert await asyncio.gather(*(epoch.now(client) for _ in range(9))) == [3] * 9
    client.epoch = 4
    assert await epoch.now(client) == 3  # it is not that old
    assert client.asked == 1


@on_loop
async def test_who_leaves_takes_the_answer_from_nobody() -> None:
    epoch, client = PlanEpoch(), Client(3)
    first = asyncio.ensure_future(epoch.now(client))
    await asyncio.sleep(0)
    first.cancel()
    assert await epoch.now(client) == 3
    assert client.asked == 1


@on_loop
async def test_an_error_of_another_client_is_not_told() -> None:
    epoch, broken, client = PlanEpoch(), Client(None), Client(3)
    with pytest.raises(CoordinatorLost):
        await epoch.now(broken)
    assert await epoch.now(client) == 3
    assert await epoch.now(client) == 3


def test_a_fingerprint_changes_with_model_and_plan() -> None:
    assert fingerprint_of("m", 1) == fingerprint_of("m", 1)
    assert len({fingerprint_of("m", 1), fingerprint_of("m", 2), fingerprint_of("n", 1)}) == 3
