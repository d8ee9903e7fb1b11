"""Child processes that run a verb of `dllm`, started cold or forked from a warm process.

A worker needs seconds to import torch and transformers. Where the system can fork safely (Linux),
one process imports them once, before it has any thread, and forks a child per worker (`ForkServer`,
whose other end is `fork_server`). Elsewhere, and whenever that fails, a child is started cold. Both
kinds read the same settings, write to the same files, and end when this process ends.

Children are in no process group of ours: Ctrl-C at the terminal is for the program, which may go on
using them. They notice its end by a pipe that closes with it, even if it is killed.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import DistributedLLMError, error_from_wire
from distributed_llm.common.keyring import STATE_VARIABLE

_KILL_AFTER_S = 5.0

_LOG_TAIL = 8000
"""Bytes that `LocalProcess.log_tail` reads at most."""

_LAST_LINES = 5
"""Lines of the log of a process that ended without an error, as its last words."""

_ERROR_LINE = re.compile(r"^Error \((?P<code>\w+)\): (?P<message>.+)", re.MULTILINE | re.DOTALL)
"""How a verb of `dllm` says with which error it ended."""

_OWN_GROUP: dict[str, Any] = {"start_new_session": True}
"""Arguments of `Popen` for a child that does not hear the Ctrl-C of our terminal."""

if sys.platform == "win32":
    _OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}

_READ_AT_LOADING = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_"),
    *("TORCH", "PYTORCH", "CUDA_", "LD_", "PYTHON", "MALLOC_", "HF_", "TRANSFORMERS_"),
    *("HOME", "XDG_"),  # folders of caches
)
"""How the names of variables begin that take effect when a process or library is loaded.

A forked child has loaded everything already, so these cannot be set for it.
"""


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
        fork_server: "ForkServer | None" = None,
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
        _inherited.add(self)
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
            **_OWN_GROUP,
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


class _ForkedChild:
    """A child of the fork server."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self._server = server
        self._pid = pid
        # It names this process even after another one has its pid.
        self._handle: IO[bytes] = os.fdopen(os.pidfd_open(pid), "rb", buffering=0)
        self._code: int | None = None

    @property
    def pid(self) -> int:
        return self._pid

    def wait(self, timeout_s: float | None) -> int | None:
        if self._code is None and self._ended(timeout_s):
            self._code = self._server.exit_code(self._pid)
        return self._code

    def _ended(self, timeout_s: float | None) -> bool:
        watched = select.poll()  # unlike `select`, for descriptors of any number
        watched.register(self._handle, select.POLLIN)
        return bool(watched.poll(None if timeout_s is None else timeout_s * 1000))

    def signal(self, number: int) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle.fileno(), number)

    def close(self) -> None:
        self._handle.close()


def earlier_log(log: Path) -> Path:
    """Return the file that has what stood in a log before."""
    return log.with_name(f"{log.name}.1")


class ForkServer:
    """A process that has imported what workers need, and forks them.

    It ends when `close` is called or this process ends; its children go on.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._lock = threading.Lock()
        self._received = b""
        self._orders = 0
        self._pids: dict[int, int] = {}  # by order
        self._codes: dict[int, int] = {}  # by pid
        self._environment = _read_at_loading(os.environ)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "distributed_llm.fork_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a child that is started cold will say the same
                **_OWN_GROUP,
            )
        _inherited.add(self)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fork(
        self, arguments: Sequence[str], environment: Mapping[str, str], ends: Sequence[int]
    ) -> _ForkedChild | None:
        """Fork a child that runs a verb of `dllm`; None if that cannot be done here and now.

        Args:
            arguments: of `dllm`.
            environment: all its variables.
            ends: file descriptors that become its stdin, stdout and stderr.
        """
        if _read_at_loading(environment) != self._environment:
            return None  # the child needs other values than those that were read
        with self._lock, _working_folder() as folder:
            self._orders += 1
            number = self._orders
            order = {"number": number, "arguments": [*arguments], "environment": {**environment}}
            line = json.dumps(order).encode() + b"\n"
            try:
                sent = socket.send_fds(self._socket, [line], [*ends, folder])
                self._socket.sendall(line[sent:])
                while number not in self._pids:
                    self._receive()
                return _ForkedChild(self, self._pids.pop(number))
            except OSError:  # it has died; or the child has, before it could be watched
                return None

    def exit_code(self, pid: int) -> int:
        """Return the exit code of a child that has ended; minus SIGKILL if it cannot be known."""
        with self._lock:
            try:
                while pid not in self._codes:
                    self._receive()
                return self._codes[pid]
            except OSError:
                return -signal.SIGKILL

    def _receive(self) -> None:
        """Wait for one answer, and keep the pid or exit code in it."""
        while b"\n" not in self._received:
            more = self._socket.recv(4096)
            if not more:
                raise ConnectionResetError("the fork server has ended")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        match json.loads(line):
            case {"order": int(number), "pid": int(pid)}:
                self._codes.pop(pid, None)  # of an earlier process with that pid
                self._pids[number] = pid
            case {"ended": int(pid), "code": int(code)}:
                self._codes[pid] = code

    def let_go(self) -> None:
        """Leave the server to the process that this one was forked from; end nothing."""
        self._socket.close()

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


_inherited: "weakref.WeakSet[LocalProcess | ForkServer]" = weakref.WeakSet()
"""What a fork of this process must let go, or children would outlive this process with it."""

_lock = threading.Lock()
_users = 0
_server: ForkServer | None = None


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServer | None]:
    """Yield the fork server of this process, or None where workers cannot be forked.

    All who use it at the same time share one; it ends with the last of them.
    """
    global _users, _server
    if not _can_fork():
        yield None
        return
    with _lock:
        _users += 1
        if _server is None:
            _server = ForkServer()
        lent = _server
    try:
        yield lent
    finally:
        with _lock:
            _users -= 1
            if not _users and _server is not None:
                _server.close()
                _server = None


def _can_fork() -> bool:
    """Return whether a process that has loaded torch can be forked safely here, and watched.

    Only on Linux does such a process hold no threads or connections of the system's own. Some
    kernels, sandboxes and builds of Python know no process descriptors.
    """
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _let_go() -> None:
    """In a forked child: leave the parent's children to the parent."""
    global _lock, _users, _server
    _lock, _users, _server = threading.Lock(), 0, None
    for one in list(_inherited):
        one.let_go()
    _inherited.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def _working_folder() -> Iterator[int]:
    """Yield a descriptor of this process's working folder, which may have been deleted."""
    folder = os.open(".", os.O_PATH)
    try:
        yield folder
    finally:
        os.close(folder)


def _read_at_loading(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_LOADING) and name != "PYTHONUNBUFFERED"
    }
