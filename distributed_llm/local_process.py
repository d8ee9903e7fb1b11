"""Child processes that run a verb of `dllm`, started cold or forked from a warm process.

A worker needs seconds to import torch and transformers. Where the system can fork safely (Linux),
one process imports them once, before it has any thread, and forks a child per worker (`ForkServer`,
whose other end is `fork_server`). Elsewhere, and whenever that fails, a child is started cold. Both
kinds read the same settings, write to the same files, and end when this process ends.

Children are in no process group of ours: Ctrl-C at the terminal is for the program, which may go on
using them. They notice its end by a pipe that closes with it, even if it is killed.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import DistributedLLMError, error_from_wire
from distributed_llm.common.keyring import STATE_VARIABLE
from distributed_llm.forking import OWN_GROUP, ForkServer, inherited

_KILL_AFTER_S = 5.0

_LOG_TAIL = 8000
"""Bytes that `LocalProcess.log_tail` reads at most."""

_LAST_LINES = 5
"""Lines of the log of a process that ended without an error, as its last words."""

_ERROR_LINE = re.compile(r"^Error \((?P<code>\w+)\): (?P<message>.+)", re.MULTILINE | re.DOTALL)
"""How a verb of `dllm` says with which error it ended."""


class LocalProcess:
    """One child process. It ends when this process ends, however that ends.

    Args:
        name: for messages.
        command: verb and flags of `dllm`.
        settings: environment variables `DLLM_...` for it.
        log: file that takes what it writes to stderr.
        fork_server: forks it; None starts it cold.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: Mapping[str, str],
        log: Path,
        fork_server: ForkServer | None = None,
    ) -> None:
        self.name = name
        self.log = log
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("DLLM_") or name in (STATE_VARIABLE, CACHE_VARIABLE)
        }
        environment |= {"PYTHONUNBUFFERED": "1", **settings}
        arguments = [*command, "--exit-with-parent"]
        child = None
        if fork_server:
            child = self._start(partial(fork_server.fork, arguments, environment))
        if child is None:
            child = self._start(partial(_ColdChild, arguments, environment))
            assert child is not None
        self._child = child

    def _start(self, start: "Callable[[Sequence[int]], _Child | None]") -> "_Child | None":
        """Start a child with new pipes and an empty log; return None if `start` does.

        Nothing is ever written to its stdin. That pipe closes when this process ends, or when the
        start fails, and then the child ends itself.
        """
        stdin_end, stdin = os.pipe()
        stdout, stdout_end = os.pipe()
        self._stdin: IO[bytes] = os.fdopen(stdin, "wb")
        self.stdout: IO[bytes] = os.fdopen(stdout, "rb")
        child = None
        try:
            self.log.write_bytes(b"")
            with self.log.open("ab") as stderr:  # goes on at the start when `trim_log` emptied it
                child = start((stdin_end, stdout_end, stderr.fileno()))
        finally:
            os.close(stdin_end)
            os.close(stdout_end)
            if child is None:
                self._close_pipes()
        inherited.add(self)
        return child

    def let_go(self) -> None:
        """Leave the child to the process that this one was forked from; end nothing."""
        self._close_pipes()

    def _close_pipes(self) -> None:
        self._stdin.close()
        self.stdout.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None while it runs."""
        return self._child.wait(0.0)

    def kill(self) -> None:
        """End it at once (SIGKILL), and wait until it is gone."""
        self._child.signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
        self._child.wait(None)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._child.signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """Return its exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        code = self._child.wait(timeout_s)
        if code is None:
            raise subprocess.TimeoutExpired(self.name, timeout_s)
        return code

    def log_tail(self) -> str:
        """Return the end of what it wrote to stderr."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL))
            return log.read().decode(errors="replace").strip()

    def trim_log(self, most_bytes: int) -> None:
        """Empty its log once that is longer than `most_bytes`; what was in it is kept beside it.

        Lines that it writes at that very moment may be lost.
        """
        if self.log.stat().st_size > most_bytes:
            shutil.copyfile(self.log, earlier_log(self.log))
            os.truncate(self.log, 0)

    def last_words(self) -> str:
        """Return the error that it ended with, or else the last lines of its log."""
        said = self.log_tail()
        match = _ERROR_LINE.search(said)
        return match["message"].strip() if match else "\n".join(said.splitlines()[-_LAST_LINES:])

    def failure(self) -> DistributedLLMError:
        """Return the error that it ended with, of the class that it was there."""
        said = self.log_tail()
        if match := _ERROR_LINE.search(said):
            return error_from_wire(match["code"], match["message"].strip(), 0.0)
        code = self.exit_code
        if code is not None and code < 0:
            return DistributedLLMError(
                f"The {self.name} was ended by signal {-code}. If nobody did that, the memory of "
                f"this machine may have run out. Start it again; its log is {self.log}."
            )
        return DistributedLLMError(
            f"The {self.name} ended with exit code {code}. It said: {said or 'nothing'}"
        )

    def close(self) -> None:
        """End it, at once if it does not end by itself."""
        self.terminate()
        try:
            self.wait(_KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._child.close()
        self._close_pipes()


class _Child(Protocol):
    """A running child process."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def wait(self, timeout_s: float | None) -> int | None:
        """Return its exit code, None if it still runs after `timeout_s`; None waits for ever."""

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""

    def close(self) -> None:
        """Free the resources with which it was watched; it has ended."""


class _ColdChild:
    """A child that is started as a new Python process."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], ends: Sequence[int]
    ) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "distributed_llm", *arguments],
            env=dict(environment),
            stdin=ends[0],
            stdout=ends[1],
            stderr=ends[2],
            **OWN_GROUP,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout_s: float | None) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        pass  # `wait` has freed it


def earlier_log(log: Path) -> Path:
    """Return the file that has what stood in a log before."""
    return log.with_name(f"{log.name}.1")
