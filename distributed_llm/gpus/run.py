"""Runs a worker for each GPU: child processes, their logs, signals. Decides nothing."""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import assert_never

from distributed_llm.child_events import Ended, Fail, Finish, Signalled, TellToEnd
from distributed_llm.child_words import GROUP_MARK, LogReader
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.stopping import exit_code, on_signal, on_uncaught
from distributed_llm.gpus.group import Action, Event, Group, Start, Tell
from distributed_llm.gpus.workers import GpuWorker
from distributed_llm.local_process import LocalProcess

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
"""Time between two looks at the processes and their logs, seconds."""

_MAX_LOG_BYTES = 4 << 20


async def run_workers(workers: Sequence[GpuWorker], words: Sequence[str]) -> int:
    """Run workers until all have ended, or a signal; return the exit code.

    What they log is written to stderr, each line with the worker's name before it.

    Args:
        words: of `dllm`, that start a worker, but for what is each worker's own.

    Raises:
        DistributedLLMError: the last one that ran failed; of the class that it was there.
    """
    with TemporaryDirectory(prefix="dllm-gpus-") as logs:
        running = _Run(workers, words, Path(logs))
        try:
            return await running.run()
        finally:
            running.close()


class _Run:
    def __init__(self, workers: Sequence[GpuWorker], words: Sequence[str], logs: Path) -> None:
        self._words = words
        self._logs = logs
        self._loop = asyncio.get_running_loop()
        self._group = Group(workers)
        self._children: dict[str, tuple[LocalProcess, LogReader]] = {}
        self._unstarted: dict[str, DistributedLLMError] = {}
        self._done: asyncio.Future[int] = self._loop.create_future()

    async def run(self) -> int:
        on_signal(lambda number: self._apply(Signalled(exit_code(number))))
        on_uncaught(self._fail)
        self._perform(self._group.begin(now=self._loop.time()))
        while not self._done.done():
            self._look()
            await asyncio.wait([self._done], timeout=_LOOK_EVERY_S)
        return self._done.result()

    def close(self) -> None:
        """End at once what still runs."""
        for name, (child, log) in self._children.items():
            child.kill()
            _show(name, log)
            child.close()

    def _look(self) -> None:
        """Notice what workers say, those that end, and the time."""
        for name, (child, log) in list(self._children.items()):
            code = child.exit_code
            _show(name, log)
            child.trim_log(_MAX_LOG_BYTES)
            if code is not None:
                self._apply(Ended(name, code, child.last_words()))
                if not self._done.done():  # else it may be the failure to tell
                    child.close()
                    del self._children[name]
        if self._loop.time() >= self._group.next_deadline():
            self._perform(self._group.on_timer(now=self._loop.time()))

    def _apply(self, event: Event) -> None:
        self._perform(self._group.handle(event, now=self._loop.time()))

    def _fail(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if not self._done.done():
                self._perform_one(action)

    def _perform_one(self, action: Action) -> None:
        match action:
            case Start(worker=worker):
                self._start(worker)
            case TellToEnd(child=name):
                self._children[name][0].terminate()
            case Tell(text=text):
                logger.warning("%s%s", GROUP_MARK, text)
            case Finish(code=code):
                self._done.set_result(code)
            case Fail(child=name):
                self._fail(self._unstarted.get(name) or self._children[name][0].failure())
            case _:
                assert_never(action)

    def _start(self, worker: GpuWorker) -> None:
        own = ["--name", worker.name, "--device", worker.device, "--peer-bind", worker.peer_bind]
        settings = {key: value for key, value in os.environ.items() if key.startswith("DLLM_")}
        log = self._logs / f"{worker.name}.log"
        try:
            child = LocalProcess(worker.name, [*self._words, *own], settings, log)
        except OSError as exc:
            error = DistributedLLMError(
                f"{worker.name} could not be started: {exc}. Free memory, room on the disk or "
                "processes on this machine, whichever it is, and start it again."
            )
            self._unstarted[worker.name] = error
            self._apply(Ended(worker.name, 1, str(error)))
        else:
            self._children[worker.name] = child, LogReader(log)


def _show(name: str, log: LogReader) -> None:
    for line in log.new_lines():
        print(f"{name} | {line}", file=sys.stderr, flush=True)
