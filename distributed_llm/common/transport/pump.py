"""Reads a socket whenever the event loop finds it readable.

ZeroMQ signals readiness by edges, and any call on the socket may consume an edge; therefore the
socket's state is checked again after every send, even a refused one. After `_BATCH` messages the
socket yields to the event loop, so that a backlog does not starve timers and other tasks.
"""

import asyncio
import contextlib
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

_BATCH = 64
"""Messages that a socket calls back with before it yields to the event loop."""

_MAX_WAITING = 4096
"""Messages that are delivered at once when somebody wants to know what has arrived."""


class Pump:
    """Calls back with every message of a socket, `_BATCH` messages at a time.

    Args:
        on_parts: called with each message.
        flush: sends what can be sent now; returns whether that was everything.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        on_parts: Callable[[list[zmq.Frame]], None],
        flush: Callable[[], bool] = lambda: True,
    ) -> None:
        self._socket = socket
        self._on_parts = on_parts
        self._flush = flush
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None
        self.closed = False
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._run)
        self.look_again()

    def has_delivered_all(self) -> bool:
        """Return whether no message waits to be delivered; run again soon if one does."""
        waits = bool(self._events() & zmq.POLLIN)
        if waits:
            self.look_again()
        return not waits

    def notice(self, *, flushed: bool = True) -> None:
        """Check whether sending has consumed an edge; if so, run again soon.

        Args:
            flushed: whether nothing waits to be sent.
        """
        wanted = zmq.POLLIN if flushed else zmq.POLLIN | zmq.POLLOUT
        if self._again is None and not self.closed and self._events() & wanted:
            self.look_again()

    def look_again(self) -> None:
        """Run again soon, without waiting for an edge."""
        if self._again is None and not self.closed:
            self._again = self._loop.call_soon(self._run)

    def deliver_all(self) -> None:
        """Call back with all messages that have arrived, now."""
        while not self.closed and self._take():
            pass

    def deliver_waiting(self) -> None:
        """Call back with what has arrived, now; with at most `_MAX_WAITING` messages."""
        for _ in range(_MAX_WAITING):
            if self.closed or not self._take():
                break
        self.notice()

    def close(self) -> None:
        """Call back no more."""
        self.closed = True
        self._loop.remove_reader(self._fd)

    def _run(self) -> None:
        if self._again:  # this run replaces it: otherwise runs would double with every batch
            self._again.cancel()
            self._again = None
        if self.closed:
            return
        flushed = self._flush()
        for _ in range(_BATCH):
            if not self._take():
                break
        else:
            self.look_again()
        self.notice(flushed=flushed)  # receiving may have consumed the edge for writing

    def _take(self) -> bool:
        """Call back with one message, if there is one; return whether there may be more."""
        if not self._events() & zmq.POLLIN:
            return False
        parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        try:
            self._on_parts(parts)
        except BaseException:
            self.look_again()  # for the messages that follow
            raise
        return not self.closed

    def _events(self) -> int:
        return int(self._socket.getsockopt(zmq.EVENTS))


class Monitor:
    """Calls back with each event of a socket's connections, and its value."""

    def __init__(
        self, socket: "zmq.Socket[bytes]", events: int, on_event: Callable[[int, int], None]
    ) -> None:
        self._watched = socket
        self._on_event = on_event
        self._socket = socket.get_monitor_socket(events)
        self._pump = Pump(self._socket, self._receive)

    def close(self) -> None:
        """Watch no more; the socket itself stays open."""
        self._pump.close()
        with contextlib.suppress(zmq.ZMQError):
            self._watched.disable_monitor()
        self._socket.close(0)

    def _receive(self, parts: list[zmq.Frame]) -> None:
        said = parse_monitor_message([part.bytes for part in parts])
        self._on_event(int(said["event"]), int(said["value"]))
