"""HTTP connections, as uvicorn has them, with the bounds that it does not know.

A client owes the rest of a request that it began: its header, or a body that nobody reads any more
because the request was refused. It has so much time for that. Of more connections than there may
be, the one that is idle for longest is closed; if all are at work, the new one.
"""

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 10.0
"""Time for what a client owes, seconds."""

MAX_CONNECTIONS = 2048


class Connection(H11Protocol):
    """One connection."""

    header_timeout_s = HEADER_TIMEOUT_S
    max_connections = MAX_CONNECTIONS
    _owed: asyncio.TimerHandle | None = None
    _active_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; make room for it if there are too many."""
        self.access_log = False  # it has paths; `RequestLog` says what is of use
        has_room = self._make_room()
        super().connection_made(transport)
        if not has_room:
            transport.abort()
        # asyncio does it for sockets that know their protocol only, and `create_server`'s do not.
        # Without it, what follows a small piece waits for 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._active_at = self.loop.time()
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        self._active_at = self.loop.time()
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # what is no HTTP came while a response is being sent
            self.transport.abort()
        if self.conn.their_state is h11.IDLE or self._is_unread():
            self._expect()
        else:
            self._expect_nothing()

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        super().on_response_complete()
        if self._is_unread() or (self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]):
            self._expect()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _is_unread(self) -> bool:
        """Return whether a body is coming that nobody reads any more."""
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _expect(self) -> None:
        if self._owed is None:
            self._owed = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._owed is not None:
            self._owed.cancel()
            self._owed = None

    def _make_room(self) -> bool:
        """Return whether there is room for one more, after closing one that is idle."""
        every: list[Any] = [one for one in self.connections if not one.transport.is_closing()]
        if len(every) < self.max_connections:
            return True
        idle = [one for one in every if one.is_idle]
        if idle:
            min(idle, key=lambda one: one._active_at).transport.abort()
        return bool(idle)
