"""The process that forks workers, as ordered by `forking.ForkServer`.

It imports what a worker needs, starts no thread, opens no socket and computes nothing, so that a
fork of it is as good as a new process. Orders come over a Unix socket, one JSON object per line,
each with four file descriptors: stdin, stdout, stderr and the working folder of a child. Each is
answered with the pid of that child, and later with its exit code.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

from distributed_llm.common.waiting_threads import limit_active_waiting

_MAX_ORDER_BYTES = 1 << 20

_DESCRIPTORS = 4
"""File descriptors that come with an order."""


def main() -> None:
    """Serve orders until the other end of the socket is closed."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for our user, not for us
    limit_active_waiting(os.environ)
    # numpy's threads would not survive a fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()  # collecting among a million new objects takes a third of the time
    import distributed_llm.cli
    import distributed_llm.worker.work  # noqa: F401 - for the children

    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        _serve(orders, interrupt)


def _serve(orders: socket.socket, interrupt: Any) -> None:
    """Fork children and report how each ends, until the other end of the socket is closed.

    Args:
        interrupt: the handler of SIGINT in the children.
    """
    children: dict[int, int] = {}  # pid by the descriptor that tells when it has ended
    while True:
        ready = select.select([orders.fileno(), *children], [], [])[0]
        for handle in ready:
            if handle in children:
                pid = children.pop(handle)
                os.close(handle)
                _, status = os.waitpid(pid, 0)
                _tell(orders, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})
        if orders.fileno() in ready:
            order, ends = _receive(orders)
            if not order:
                return
            pid = os.fork()
            if pid == 0:
                for descriptor in (orders.fileno(), *children):
                    os.close(descriptor)
                signal.signal(signal.SIGINT, interrupt)
                _run(order, ends)
            for descriptor in ends:
                os.close(descriptor)
            children[os.pidfd_open(pid)] = pid
            _tell(orders, {"order": json.loads(order)["number"], "pid": pid})


def _receive(orders: socket.socket) -> tuple[bytes, list[int]]:
    """Return an order and its descriptors; nothing if the other end is closed."""
    order, ends, _, _ = socket.recv_fds(orders, _MAX_ORDER_BYTES, _DESCRIPTORS)
    while order and not order.endswith(b"\n"):
        more = orders.recv(_MAX_ORDER_BYTES)
        if not more:
            return b"", ends
        order += more
    return order, ends


def _tell(orders: socket.socket, answer: dict[str, int]) -> None:
    orders.sendall(json.dumps(answer).encode() + b"\n")


def _run(order: bytes, ends: list[int]) -> None:
    """Run a verb of `dllm` in the child, and exit."""
    from distributed_llm.__main__ import main as dllm

    try:
        wanted = json.loads(order)
        *files, folder = ends
        os.fchdir(folder)
        os.close(folder)
        for target, descriptor in enumerate(files):
            os.dup2(descriptor, target)
            os.close(descriptor)
        for name in ("stdin", "stdout", "stderr"):
            setattr(sys, name, None)  # made for what they were; `dllm` makes them anew
        gc.enable()
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as title:
            title.write("dllm worker")  # for `ps` and `top`
        os.environ.clear()
        os.environ.update(wanted["environment"])
        sys.argv = ["dllm", *wanted["arguments"]]
        dllm()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
