"""What the benchmarks of a running cluster share: prompts, answers with times, tables."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from distributed_llm import AsyncDistributedClient, Generation

_DRAW = random.Random(0)

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """An answer, and when its tokens came.

    Attributes:
        sent_at: `perf_counter` seconds.
        times: of each token, likewise.
    """

    sent_at: float
    times: list[float]
    generation: Generation

    @property
    def first_token_s(self) -> float:
        """From the request to its first token."""
        return self.times[0] - self.sent_at

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [after - before for before, after in pairwise(self.times)]


def fresh_prompts(
    count: int, tokens: int, *, vocab_size: int = 31_000, prefix: Sequence[int] = ()
) -> list[list[int]]:
    """Return prompts of so many tokens that nobody sent before, so that no cache knows them.

    Args:
        prefix: that they begin with.
    """
    left = tokens - len(prefix)
    return [[*prefix, *_DRAW.choices(range(3, vocab_size), k=left)] for _ in range(count)]


async def ask(
    client: AsyncDistributedClient,
    prompt: list[int],
    new_tokens: int,
    *,
    after_s: float = 0.0,
    times: list[float] | None = None,
) -> Answer:
    """Return the greedy answer of exactly `new_tokens` tokens.

    Args:
        after_s: how long to wait before asking.
        times: takes the time of each token as it comes.
    """
    await asyncio.sleep(after_s)
    times = [] if times is None else times
    sent_at = time.perf_counter()
    chunks = client.stream(prompt, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    async with aclosing(chunks):
        async for chunk in chunks:
            times += [time.perf_counter()] * len(chunk.token_ids)
            if chunk.generation:
                return Answer(sent_at, times, chunk.generation)
    raise AssertionError("a stream without an end")


async def gather(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all, which run at the same time."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
    return [task.result() for task in tasks]


async def until(condition: Callable[[], bool]) -> None:
    """Return once what other tasks do has made it true."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table; floats get two digits."""
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |", flush=True)
