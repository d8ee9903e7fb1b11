"""Whether the cluster answers, found out without a way for strangers to make load."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from distributed_llm.api.errors import ApiError
from distributed_llm.api.operations.readiness import FRESH_S, Readiness, Ready
from distributed_llm.common.errors import ConnectionFailed
from distributed_llm.common.messages import ClusterStatus
from tests.api.statuses import pipeline, status


class FakeClient:
    def __init__(self) -> None:
        self.answer: ClusterStatus | Exception = status()
        self.passing: Exception | Callable[[], Awaitable[object]] | None = None
        self.looks = 0
        self.prompts: list[list[int]] = []

    async def status(self) -> ClusterStatus:
        self.looks += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def generate(self, prompt: list[int], **params: Any) -> Any:
        assert (params["max_new_tokens"], params["temperature"]) == (1, 0.0)
        self.prompts.append(prompt)
        if isinstance(self.passing, Exception):
            raise self.passing
        if self.passing is not None:
            await self.passing()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    def __init__(self, wait_s: float = 5.0) -> None:
        self.client, self.clock = FakeClient(), Clock()
        self.readiness = Readiness(self.client, wait_s=wait_s, clock=self.clock)

    async def check_later(self) -> Ready:
        self.clock.now += FRESH_S
        return await self.readiness.check()


def test_one_token_proves_a_plan_however_often_it_is_asked() -> None:
    async def main() -> None:
        bench = Bench()
        every = await asyncio.gather(*(bench.readiness.check() for _ in range(100)))
        assert set(every) == {Ready(1)}
        assert (bench.client.looks, bench.client.prompts) == (1, [[0]])
        await bench.check_later()
        assert (bench.client.looks, bench.client.prompts) == (2, [[0]])

        bench.client.answer = status(epoch=2, pipelines=(pipeline(2),))
        assert (await bench.check_later()).epoch == 2
        assert bench.client.prompts == [[0], [0]]

    asyncio.run(main())


def test_a_plan_that_only_loads_is_not_tried() -> None:
    async def main() -> None:
        bench = Bench()
        loading = pipeline(1, state="loading")
        bench.client.answer = status(state="loading", note="pc loads", pipelines=(loading,))
        for _ in range(3):
            with pytest.raises(ApiError, match="pc loads") as raised:
                await bench.readiness.check()
        assert (raised.value.status, raised.value.code) == (503, "starting")
        assert raised.value.retry_after_s
        assert (bench.client.looks, bench.client.prompts) == (1, [])

    asyncio.run(main())


def test_a_token_that_does_not_pass_is_told_and_tried_again() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.readiness.check()
        bench.client.answer = status(epoch=2, pipelines=(pipeline(2),))
        bench.client.passing = ConnectionFailed("The coordinator is gone.")
        with pytest.raises(ApiError, match="The coordinator is gone"):
            await bench.check_later()
        bench.client.passing = None
        assert (await bench.check_later()).epoch == 2

    asyncio.run(main())


def test_nobody_waits_for_long_and_one_token_is_on_its_way_at_most() -> None:
    async def main() -> None:
        bench = Bench(wait_s=0.01)
        passed = asyncio.Event()
        bench.client.passing = passed.wait
        for _ in range(2):
            with pytest.raises(ApiError, match="on its way"):
                await bench.check_later()
        assert bench.client.prompts == [[0]]
        passed.set()
        assert (await bench.readiness.check()).epoch == 1
        await bench.readiness.close()

    asyncio.run(main())
