"""Runs `dllm up`: child processes, the coordinator's status, signals. Decides nothing."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from distributed_llm.child_events import Ended, Fail, Finish, Signalled, TellToEnd
from distributed_llm.child_words import GROUP_MARK, LogReader, text_of
from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.common.addresses import addresses_for_others, ip_of
from distributed_llm.common.errors import AddressInUse, ConnectionFailed, DistributedLLMError
from distributed_llm.common.keyring import here
from distributed_llm.common.stopping import exit_code, on_signal, on_uncaught
from distributed_llm.common.units import split_address
from distributed_llm.local_process import LocalProcess, earlier_log
from distributed_llm.up import texts
from distributed_llm.up.api_address import free_bind, url_from_here
from distributed_llm.up.api_keys import ApiKeys, api_keys
from distributed_llm.up.events import (
    Action,
    Child,
    Event,
    Listens,
    Logged,
    Progress,
    Seen,
    Serves,
    Show,
    StartApi,
    StartWorker,
)
from distributed_llm.up.invitation import address_flag, invitation
from distributed_llm.up.supervisor import Supervisor

_LOOK_EVERY_S = 0.1
"""Time between two looks for children that have ended, seconds."""

_ASK_EVERY_S = 0.3
"""Time between two looks at the coordinator's status, seconds."""

_CONNECT_S = 2.0

_MAX_LOG_BYTES = 4 << 20
"""Size of the log of a child; what it wrote before, as much again, is kept beside it."""


@dataclass(frozen=True)
class Wanted:
    """What `dllm up` starts.

    Attributes:
        coordinator: words of `dllm` that start the coordinator.
        worker: words of `dllm` that start the worker, but for the coordinator's address.
        api: words of `dllm` that start the API, but for that and where it listens.
        api_bind: "HOST:PORT" that it is to listen on; None is the first free one of some ports.
        bind: "HOST:PORT" that the coordinator is to listen on.
        insecure: whether keys are done without.
        logs: folder of the children's logs.
        keys: file that keeps the keys of the API; None keeps none.
        progress: called with each line about what happens.
        show: called with the lines that say what runs.
    """

    coordinator: Sequence[str]
    worker: Sequence[str]
    api: Sequence[str]
    api_bind: str | None
    bind: str
    insecure: bool
    logs: Path
    keys: Path | None
    progress: Callable[[str], None]
    show: Callable[[Sequence[str]], None]


async def run(wanted: Wanted) -> int:
    """Run a coordinator and a worker until a signal; return the exit code.

    Raises:
        AddressInUse: another program listens there, or the address is not of this machine.
        DistributedLLMError: a child failed; of the class that it was there.
    """
    await _check_free(wanted)
    wanted.progress(
        f"starting a coordinator at {wanted.bind}, a worker (which measures this machine, the "
        f"first time for some seconds more) and the API; their logs are in {wanted.logs}"
    )
    running = _Run(wanted)
    try:
        return await running.run()
    finally:
        running.close()


class _Run:
    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._supervisor = Supervisor()
        self._children: dict[Child, LocalProcess] = {}
        self._worker_log: LogReader | None = None
        self._done: asyncio.Future[int] = self._loop.create_future()
        self._address = ""  # at which the coordinator is asked
        self._api_bind = wanted.api_bind
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        on_signal(lambda number: self._apply(Signalled(exit_code(number))))
        on_uncaught(self._fail)
        self._start("coordinator", self._wanted.coordinator)
        self._begin(self._watch())
        self._begin(self._follow())
        try:
            return await self._done
        finally:
            tasks = [*self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def close(self) -> None:
        """End at once what still runs."""
        for child in self._children.values():
            child.kill()
            child.close()

    # -------------------------------------------------------------- what happens

    async def _watch(self) -> None:
        """Notice children that end, and the time."""
        while True:
            for name, child in list(self._children.items()):
                if name == "worker":
                    self._tell_of_gpus()
                child.trim_log(_MAX_LOG_BYTES)
                if (code := child.exit_code) is not None:
                    self._apply(Ended(name, code, child.last_words()))
                    if not self._done.done():  # else it may be the failure to tell
                        child.close()
                        del self._children[name]
            if self._loop.time() >= self._supervisor.next_deadline():
                self._perform(self._supervisor.on_timer(now=self._loop.time()))
            await asyncio.sleep(_LOOK_EVERY_S)

    def _tell_of_gpus(self) -> None:
        """Tell what the worker's log says about the workers of single GPUs, if there are such."""
        for text in map(text_of, self._worker_log.new_lines() if self._worker_log else ()):
            if text and text.startswith(GROUP_MARK):
                self._apply(Logged(text))

    async def _follow(self) -> None:
        """Wait until the coordinator listens, and follow what it says then."""
        stdout = self._children["coordinator"].stdout
        bound = (await asyncio.to_thread(stdout.readline)).decode().strip()
        if not bound:
            return  # it has ended, which `_watch` sees
        host, port = split_address(bound)
        ip = ip_of(host)
        self._address = here(port) if ip is not None and ip.is_unspecified else bound
        async with AsyncDistributedClient(
            self._address, insecure=self._wanted.insecure, connect_timeout_s=_CONNECT_S
        ) as client:
            insecure = self._wanted.insecure
            addresses = addresses_for_others(bound)
            lines = await invitation(client, self._address, addresses, insecure=insecure)
            path = self._children["coordinator"].log
            log = LogReader(path, start=path.stat().st_size)
            self._apply(Listens(lines))
            while True:
                status = None
                with contextlib.suppress(ConnectionFailed):  # if it has ended, `_watch` sees it
                    status = await client.status()
                for text in map(text_of, log.new_lines()):
                    if text:
                        self._apply(Logged(text))
                if status:
                    self._apply(Seen(status))
                await asyncio.sleep(_ASK_EVERY_S)

    async def _follow_api(self, child: LocalProcess) -> None:
        """Wait until the API listens, and say how it is used."""
        url = (await asyncio.to_thread(child.stdout.readline)).decode().strip()
        if not url:
            return  # it has ended, which `_watch` sees
        url = url_from_here(url)
        try:
            keys = (
                ApiKeys()
                if self._wanted.insecure
                else await api_keys(self._address, self._wanted.keys, _CONNECT_S)
            )
        except DistributedLLMError as exc:  # the API is of use without them
            self._apply(Serves(texts.no_keys(url, str(exc))))
        else:
            self._apply(Serves(texts.access(url, keys.page, keys.apps)))

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def _apply(self, event: Event) -> None:
        self._perform(self._supervisor.handle(event, now=self._loop.time()))

    # -------------------------------------------------------------- what is done about it

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if not self._done.done():
                self._perform_one(action)

    def _perform_one(self, action: Action) -> None:
        match action:
            case StartWorker():
                self._start("worker", [*self._wanted.worker, "--coordinator", self._address])
                self._worker_log = LogReader(self._children["worker"].log)
            case StartApi():
                self._api_bind = self._api_bind or free_bind()
                where = ["--coordinator", self._address, "--bind", self._api_bind]
                self._start("api", [*self._wanted.api, *where])
                self._begin(self._follow_api(self._children["api"]))
            case TellToEnd(child=name):
                if child := self._children.get(name):
                    child.terminate()
            case Progress(text=text):
                self._wanted.progress(text)
            case Show(lines=lines):
                self._wanted.show(lines)
            case Finish(code=code):
                self._done.set_result(code)
            case Fail(child=name):
                self._fail(self._children[name].failure())
            case _:
                assert_never(action)

    def _start(self, name: Child, words: Sequence[str]) -> None:
        log = self._wanted.logs / f"{name}.log"
        if log.exists():
            os.replace(log, earlier_log(log))
        settings = {key: value for key, value in os.environ.items() if key.startswith("DLLM_")}
        self._children[name] = LocalProcess(name, words, settings, log)


async def _check_free(wanted: Wanted) -> None:
    """Check that nobody listens where the coordinator is to listen.

    Raises:
        AddressInUse: somebody does; the message says what it is.
    """
    host, port = split_address(wanted.bind)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            return  # the coordinator says what is wrong
    else:
        return
    ip = ip_of(host)
    address = here(port) if ip is not None and ip.is_unspecified else wanted.bind
    try:
        async with AsyncDistributedClient(
            address, insecure=wanted.insecure, connect_timeout_s=_CONNECT_S
        ) as client:
            model = (await client.status()).model
    except DistributedLLMError:
        what = f"Another program, or another user's coordinator, listens on port {port} already."
    else:
        what = (
            f"A coordinator that serves {model} listens on port {port} already. Use that one, as "
            f"`dllm status{address_flag(address)}` shows it; or end it, with Ctrl-C where it runs."
        )
    raise AddressInUse(f"{what} For one more, choose another port: --bind {_next_to(wanted.bind)}")


def _next_to(bind: str) -> str:
    """Return an address to listen on beside one that is taken."""
    host, _, port = bind.rpartition(":")
    return f"{host}:{int(port) % 65535 + 1}"
