"""An event loop in a thread, for programs without asyncio."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from distributed_llm.common.errors import CoordinatorLost

T = TypeVar("T")


async def _next(items: AsyncGenerator[T, None]) -> list[T]:
    """Return the next item in a list, or an empty list at the end."""
    async for item in items:
        return [item]
    return []


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._main, name="dllm-client", daemon=True)
        self._thread.start()

    def is_here(self) -> bool:
        """Return whether the thread is in this process, not in one that this was forked from."""
        return self._owner == os.getpid()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and return its result; an interrupt (Ctrl-C) cancels it.

        Raises:
            CoordinatorLost: the client was closed, or this process was forked since.
        """
        if self._stopped:
            work.close()
            raise CoordinatorLost("The client was closed. Make a new one.")
        if not self.is_here():
            work.close()
            raise CoordinatorLost(
                "This process was forked while the answer came. It goes on in the parent only; ask "
                "again here."
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise CoordinatorLost("The client was closed. Make a new one.") from None
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Yield the items; closing the iterator closes `items`."""
        try:
            while item := self.run(_next(items)):
                yield from item
        finally:
            if not self._stopped and self.is_here():
                self.run(items.aclose())

    def stop(self) -> None:
        """Cancel what runs on the loop, then end the loop and its thread."""
        self._stopped = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
