"""What the cluster does, told to many who read at different speeds."""

import asyncio
import json
from typing import Any

import pytest

from distributed_llm.api.operations.feed import MAX_FOLLOWERS, Feed
from distributed_llm.common.errors import ConnectionFailed, NotAllowed, Overloaded
from distributed_llm.common.messages import ClusterStatus
from tests.api.statuses import event, status


class FakeClient:
    """Answers with `answer`."""

    def __init__(self, answer: ClusterStatus | Exception) -> None:
        self.answer = answer

    async def status(self) -> ClusterStatus:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def feed(tell_every_s: float = 60.0) -> Feed:
    return Feed(look_every_s=0.001, tell_every_s=tell_every_s)


def read(part: bytes) -> list[tuple[str, Any]]:
    """Return names and data of server-sent events."""
    found = []
    for one in part.decode().removesuffix("\n\n").split("\n\n"):
        name, data = one.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_change_is_told_at_once_and_new_events_by_themselves() -> None:
    async def main() -> None:
        client = FakeClient(status(events=(event(1), event(2))))
        news = feed().follow(client)
        ((name, first),) = read(await anext(news))
        assert (name, first["events"][0]["number"]) == ("status", 1)
        client.answer = status(events=(event(2), event(3, "mac left")))
        (one, two) = read(await anext(news))
        assert (one[0], one[1]["text"]) == ("event", "mac left")
        assert (two[0], two[1]["events"][-1]["number"]) == ("status", 3)
        await news.aclose()

    asyncio.run(main())


def test_a_slow_reader_gets_the_newest() -> None:
    async def main() -> None:
        client = FakeClient(status())
        followed = feed()
        slow, fast = followed.follow(client), followed.follow(client)
        await anext(slow)
        await anext(fast)
        for epoch in range(2, 50):
            client.answer = status(epoch=epoch)
            assert read(await anext(fast))[-1][1]["epoch"] == epoch
        assert read(await anext(slow))[-1][1]["epoch"] == 49
        await slow.aclose()
        await fast.aclose()

    asyncio.run(main())


def test_a_coordinator_that_is_away_is_told_and_followed_again() -> None:
    async def main() -> None:
        client = FakeClient(ConnectionFailed("It is away."))
        news = feed().follow(client)
        ((name, told),) = read(await anext(news))
        assert (name, told["error"]["message"]) == ("error", "It is away.")
        client.answer = status()
        assert read(await anext(news))[0][0] == "status"
        await news.aclose()

    asyncio.run(main())


def test_who_may_no_longer_follow_is_refused_and_others_are_not() -> None:
    async def main() -> None:
        followed = feed()
        client = FakeClient(status())
        removed = followed.follow(client)
        other = followed.follow(FakeClient(status(epoch=2)))
        await anext(removed)
        client.answer = NotAllowed("You were removed.")
        with pytest.raises(NotAllowed):
            await anext(removed)
        while read(await anext(other))[-1][1]["epoch"] != 2:
            pass
        await other.aclose()

    asyncio.run(main())


def test_who_left_while_it_was_asked_does_not_end_the_feed_of_others() -> None:
    class Leaving(FakeClient):
        """Is refused once its holder has left."""

        left = asyncio.Event()

        async def status(self) -> ClusterStatus:
            await self.left.wait()
            raise NotAllowed("You were removed.")

    async def main() -> None:
        followed = feed()
        gone = followed.follow(Leaving(status()))
        waiting = asyncio.ensure_future(anext(gone))
        other = followed.follow(FakeClient(status(epoch=2)))
        news = asyncio.ensure_future(anext(other))
        await asyncio.sleep(0)  # both follow, and the first is asked
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        Leaving.left.set()
        async with asyncio.timeout(10):
            assert read(await news)[-1][1]["epoch"] == 2
        await other.aclose()

    asyncio.run(main())


def test_followers_are_bounded_and_nobody_is_asked_for_none() -> None:
    async def main() -> None:
        client = FakeClient(status())
        followed = feed(tell_every_s=0.0)
        every = [followed.follow(client) for _ in range(MAX_FOLLOWERS)]
        await asyncio.gather(*(anext(one) for one in every))
        with pytest.raises(Overloaded):
            await anext(followed.follow(client))
        for one in every:
            await one.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "somebody still looks"
        async with asyncio.timeout(10):
            again = followed.follow(client)
            await anext(again)
            await again.aclose()

    asyncio.run(main())


def test_the_end_comes_to_all_at_once() -> None:
    async def main() -> None:
        followed = feed()
        every = [followed.follow(FakeClient(status())) for _ in range(2)]
        for one in every:
            await anext(one)
        followed.end()
        assert [part for one in every for part in [part async for part in one]] == []
        assert [part async for part in followed.follow(FakeClient(status()))] == []

    asyncio.run(main())
