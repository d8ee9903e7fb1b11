"""Writes down what a Python process connects to, for the test that sets `SPY_LOG`.

Python runs this module at its start if its folder is in `PYTHONPATH`. ZeroMQ connects outside of
Python, so its `connect` is watched by itself.
"""

import os
import socket
import sys
from typing import Any

import zmq

_LOG = os.environ["SPY_LOG"]
_TOLD = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo")


def _note(*words: object) -> None:
    with open(_LOG, "a", encoding="utf-8") as log:
        log.write("\t".join(map(str, words)) + "\n")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _TOLD:
        return
    if event == "socket.getaddrinfo":
        _note(os.getpid(), event, "", f"{arguments[0]}:{arguments[1]}")
        return
    made, target = arguments[0], arguments[1]
    if made.family != socket.AF_UNIX:
        _note(os.getpid(), event, made.type.name, f"{target[0]}:{target[1]}")


class _Spied(zmq.Socket):  # type: ignore[type-arg]
    def connect(self, addr: str) -> Any:
        if addr.startswith("tcp:"):  # others do not leave the process
            _note(os.getpid(), "zmq.connect", "", addr.removeprefix("tcp://"))
        return super().connect(addr)


zmq.Context._socket_class = _Spied  # type: ignore[misc]
sys.addaudithook(_audit)
