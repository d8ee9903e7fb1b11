"""Forks child processes from a process that has imported what workers need, and watches them.

`ForkServer` is this end of that process (`fork_server.py`); all of a program share one. What a fork
of this program must leave to it is kept here too.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Protocol

OWN_GROUP: dict[str, Any] = {"start_new_session": True}
"""Arguments of `Popen` for a child that does not hear the Ctrl-C of our terminal."""

if sys.platform == "win32":
    OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}

_READ_AT_LOADING = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_"),
    *("TORCH", "PYTORCH", "CUDA_", "LD_", "PYTHON", "MALLOC_", "HF_", "TRANSFORMERS_"),
    *("HOME", "XDG_"),  # folders of caches
)
"""How the names of variables begin that take effect when a process or library is loaded.

A forked child has loaded everything already, so these cannot be set for it.
"""


class ForkedChild:
    """A child of the fork server."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self._server = server
        self._pid = pid
        # It names this process even after another one has its pid.
        self._handle: IO[bytes] = os.fdopen(os.pidfd_open(pid), "rb", buffering=0)
        self._code: int | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._pid

    def wait(self, timeout_s: float | None) -> int | None:
        """Return its exit code, None if it still runs after `timeout_s`; None waits for ever."""
        if self._code is None and self._ended(timeout_s):
            self._code = self._server.exit_code(self._pid)
        return self._code

    def _ended(self, timeout_s: float | None) -> bool:
        watched = select.poll()  # unlike `select`, for descriptors of any number
        watched.register(self._handle, select.POLLIN)
        return bool(watched.poll(None if timeout_s is None else timeout_s * 1000))

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle.fileno(), number)

    def close(self) -> None:
        """Free the resources with which it was watched; it has ended."""
        self._handle.close()


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
                **OWN_GROUP,
            )
        inherited.add(self)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fork(
        self, arguments: Sequence[str], environment: Mapping[str, str], ends: Sequence[int]
    ) -> ForkedChild | None:
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
                return ForkedChild(self, self._pids.pop(number))
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


class _Inherited(Protocol):
    """What a fork of this process has of it."""

    def let_go(self) -> None:
        """Leave it to the process that this one was forked from; end nothing."""


inherited: "weakref.WeakSet[_Inherited]" = weakref.WeakSet()
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
    for one in list(inherited):
        one.let_go()
    inherited.clear()


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
