"""Many prompts in one call: a bounded number under way, fewer when the queue is full."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from distributed_llm.common.errors import Overloaded

MAX_ANSWERS = 256
"""Answers that one call keeps under way at most: the room of a coordinator's queue by default."""

Progress = Callable[[int, int], None]
"""Called with the number of prompts that are answered and the number of all."""

P = TypeVar("P")
A = TypeVar("A")


class Pace:
    """How many prompts may be under way, and when the next may be sent. Pure.

    A refusal halves the number, once until its time to come back is over; an answer adds one.

    Args:
        answers_each: answers that every prompt asks for.

    Attributes:
        limit: prompts that may be under way now.
        resume_at: clock seconds before which none may be sent.
    """

    def __init__(self, answers_each: int) -> None:
        self._most = max(1, MAX_ANSWERS // answers_each)
        self.limit = self._most
        self.resume_at = 0.0

    def answered(self) -> None:
        """Note that a prompt was answered."""
        self.limit = min(self.limit + 1, self._most)

    def refused(self, retry_after_s: float, *, now: float) -> None:
        """Note that a prompt was refused, to be sent again after `retry_after_s`."""
        if now >= self.resume_at:
            self.limit = max(1, self.limit // 2)
        self.resume_at = max(self.resume_at, now + retry_after_s)

    def pause_s(self, under_way: int, *, now: float) -> float | None:
        """Return seconds until the next may be sent; None: not before another one is answered."""
        return max(0.0, self.resume_at - now) if under_way < self.limit else None


async def ask_all(
    ask: Callable[[P], Awaitable[A]],
    prompts: Sequence[P],
    pace: Pace,
    *,
    give_up_after_s: float | None,
    progress: Progress | None,
) -> list[A]:
    """Return the answers to all prompts, in their order.

    Args:
        ask: answers one prompt.
        give_up_after_s: a prompt that is still refused so long after it was sent first is given
            up; None is never.

    Raises:
        Overloaded: a prompt was given up.
        DistributedLLMError: the first error of `ask`; all others are cancelled then.
    """
    now = asyncio.get_running_loop().time
    waiting = deque(range(len(prompts)))
    begun_at: dict[int, float] = {}
    answers: dict[int, A] = {}
    under_way: dict[asyncio.Task[A], int] = {}
    try:
        while waiting or under_way:
            pause_s = pace.pause_s(len(under_way), now=now()) if waiting else None
            if pause_s == 0.0:
                index = waiting.popleft()
                begun_at.setdefault(index, now())
                under_way[asyncio.ensure_future(ask(prompts[index]))] = index
                continue
            if not under_way:
                await asyncio.sleep(pause_s or 0.0)
                continue
            done, _ = await asyncio.wait(
                under_way, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                index = under_way.pop(task)
                try:
                    answers[index] = task.result()
                except Overloaded as exc:
                    resume_at = now() + exc.retry_after_s
                    if give_up_after_s and resume_at > begun_at[index] + give_up_after_s:
                        raise
                    pace.refused(exc.retry_after_s, now=now())
                    waiting.appendleft(index)
                    continue
                pace.answered()
                if progress:
                    progress(len(answers), len(prompts))
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
    return [answers[index] for index in range(len(prompts))]
