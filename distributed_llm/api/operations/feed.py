"""What the cluster does, to all who follow it: the coordinator is asked once for all of them."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from distributed_llm.api.errors import of_exception, openai_body
from distributed_llm.api.streaming import sse
from distributed_llm.common.errors import DistributedLLMError, NotAllowed, Overloaded
from distributed_llm.common.messages import ClusterStatus, EventStatus

MAX_FOLLOWERS = 64

_LOOK_EVERY_S = 0.25
_TELL_EVERY_S = 1.0


class Asked(Protocol):
    """What is asked for the status; an `AsyncDistributedClient`."""

    async def status(self) -> ClusterStatus:
        """Return the status of the cluster."""


@dataclass(frozen=True)
class _News:
    """The newest that is known.

    Attributes:
        told: what is sent of it.
        events: the latest of the cluster; None if they are not known.
    """

    told: bytes
    events: tuple[EventStatus, ...] | None = None


@dataclass(eq=False)
class _Follower:
    client: Asked
    news: _News | None = None
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    refused: DistributedLLMError | None = None

    def wake(self, news: _News) -> None:
        self.news = news
        self.woken.set()


class Feed:
    """Looks at the cluster while anybody follows it, with the key of one who does.

    Everybody gets the newest status once a second and after each change. Who reads slower gets
    fewer of them, and none that is old.

    Args:
        look_every_s: time between two looks, seconds.
        tell_every_s: time after which a status is sent though nothing has changed.
    """

    def __init__(
        self, *, look_every_s: float = _LOOK_EVERY_S, tell_every_s: float = _TELL_EVERY_S
    ) -> None:
        self._look_every_s = look_every_s
        self._tell_every_s = tell_every_s
        self._followers: dict[_Follower, None] = {}
        self._looking: asyncio.Task[None] | None = None
        self._news: _News | None = None
        self._over = False

    async def follow(self, client: Asked) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events until the end: `status`, `event`, `error` while none comes.

        Args:
            client: of whoever follows.

        Raises:
            Overloaded: as many follow as may.
            NotAllowed: the client may not any more.
        """
        if len(self._followers) >= MAX_FOLLOWERS:
            raise Overloaded(
                f"{MAX_FOLLOWERS} clients follow this cluster, which is as many as may. Ask for "
                "/api/v1/cluster now and then instead.",
                retry_after_s=10.0,
            )
        follower = _Follower(client)
        self._followers[follower] = None
        if self._news is not None:
            follower.wake(self._news)
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())
        seen: int | None = None
        try:
            while not self._over:
                await follower.woken.wait()
                follower.woken.clear()
                if follower.refused is not None:
                    raise follower.refused
                news = follower.news
                if news is None or self._over:
                    continue
                fresh: list[EventStatus] = []
                if news.events is not None:
                    if seen is not None:
                        fresh = [one for one in news.events if one.number > seen]
                    seen = max((one.number for one in news.events), default=0)
                yield b"".join(sse(one, "event") for one in fresh) + news.told
        finally:
            del self._followers[follower]
            if not self._followers:
                await self.close()

    def end(self) -> None:
        """Have everybody come to the end, so that nobody waits for those who follow."""
        self._over = True
        for follower in self._followers:
            follower.woken.set()

    async def close(self) -> None:
        """Look no more."""
        looking, self._looking, self._news = self._looking, None, None
        if looking is not None:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _look(self) -> None:
        clock = asyncio.get_running_loop().time
        shown: object = None
        due = 0.0
        while True:
            news: _News | None = None
            now: object
            asked = next(iter(self._followers))
            try:
                status = await asked.client.status()
                now = _visible(status)
                if now != shown or clock() >= due:
                    news = _News(sse(status, "status"), status.events)
            except NotAllowed as exc:
                asked.refused = exc
                asked.woken.set()
                if asked in self._followers:  # it may have left meanwhile
                    del self._followers[asked]
                    self._followers[asked] = None  # the next one is asked
                await asyncio.sleep(self._look_every_s)
                continue
            except DistributedLLMError as exc:
                now = str(exc)
                if now != shown or clock() >= due:
                    _, body = openai_body(of_exception(exc), "")
                    news = _News(sse(body, "error"))
            if news is not None:
                shown, due = now, clock() + self._tell_every_s
                self._news = news
                for follower in self._followers:
                    follower.wake(news)
            await asyncio.sleep(self._look_every_s)


def _visible(status: ClusterStatus) -> object:
    """Return what of a status is told at once when it changes."""
    return (
        status.state,
        status.note,
        status.epoch,
        [(one.name, one.state, one.layers, one.next_layers) for one in status.workers],
        [(one.epoch, one.state, one.move and one.move.phase) for one in status.pipelines],
        status.events[-1].number if status.events else 0,
    )
