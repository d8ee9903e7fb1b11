"""Ends connections over which a message comes that has no end.

ZeroMQ keeps the parts of a message until the last one has come. It limits the size of each part,
but not how many there are. Messages of a connection follow each other: while none is delivered,
what the system receives over it is kept. Only Linux tells how much that is; elsewhere nothing is
ended.
"""

import logging
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from distributed_llm.common.tensors import MAX_FRAME_BYTES

MOST_BYTES = 2 * MAX_FRAME_BYTES
"""Bytes of unfinished messages that may be kept, of all connections together.

Twice the largest tensor: no message of this package comes near.
"""

CHECK_S = 1.0
"""Time between two looks; what one connection brings in between may come on top."""

_OTHER_BYTES = 256
"""Bytes between two looks that are no part of messages: heartbeats of ZeroMQ, encrypted."""

_BYTES_RECEIVED_AT = 128
"""Where Linux's `struct tcp_info` has `tcpi_bytes_received`, a 64-bit number."""

logger = logging.getLogger(__name__)


@dataclass
class _Connection:
    """One connection.

    Attributes:
        peer: its other end; an fd with another one has been closed and used again.
        base_bytes: what it had received when it last held nothing older than a look, and all that
            came later but is no part of messages.
    """

    peer: Any
    base_bytes: int


class Unfinished:
    """Knows how much of unfinished messages the connections of a listening socket hold.

    Connections are named by their file descriptors, which belong to ZeroMQ.
    """

    def __init__(self) -> None:
        self._connections: dict[int, _Connection] = {}
        self._heard: set[int] = set()

    def accepted(self, fd: int) -> None:
        """Watch a connection that was made."""
        if sys.platform == "linux":
            with suppress(OSError, struct.error), _borrowed(fd) as connection:
                self._connections[fd] = _Connection(connection.getpeername(), 0)

    def closed(self, fd: int) -> None:
        """Watch a connection no more."""
        self._connections.pop(fd, None)

    def heard(self, fd: int) -> None:
        """Note that a message was delivered that came over a connection."""
        self._heard.add(fd)

    def end_longest(self) -> None:
        """End connections until no more is kept than may be, those with most of it first.

        To be called when all messages that are complete have been delivered.
        """
        heard, self._heard = self._heard, set()
        held: dict[int, int] = {}
        for fd, known in list(self._connections.items()):
            try:
                with _borrowed(fd) as connection:
                    received = _bytes_received(connection)
            except (OSError, struct.error):  # it is being closed
                continue
            base = received if fd in heard else known.base_bytes + _OTHER_BYTES
            known.base_bytes = min(base, received)
            held[fd] = received - known.base_bytes
        total = sum(held.values())
        for fd, held_bytes in sorted(held.items(), key=lambda item: -item[1]):
            if total <= MOST_BYTES:
                break
            total -= held_bytes
            self._end(fd, held_bytes)

    def _end(self, fd: int, held_bytes: int) -> None:
        known = self._connections.pop(fd)
        with suppress(OSError), _borrowed(fd) as connection:
            if connection.getpeername() != known.peer:
                return
            connection.shutdown(socket.SHUT_RDWR)
            logger.warning(
                "a connection from %s was ended: it sent %d MiB of a message without an end",
                known.peer[0],
                held_bytes >> 20,
            )


def _bytes_received(connection: socket.socket) -> int:
    """Return what the system has received over a connection, bytes."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)[0])


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """Use a socket that somebody else closes.

    Raises:
        OSError: it is closed already.
    """
    connection = socket.socket(fileno=fd)
    try:
        yield connection
    finally:
        connection.detach()
