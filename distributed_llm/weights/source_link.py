"""A connection to a machine that has weights; dialled again whenever it is lost."""

import asyncio
from collections.abc import Callable, Sequence

from distributed_llm.common import codec
from distributed_llm.common.connection import Connection
from distributed_llm.common.errors import (
    ConnectionFailed,
    LocalProtocolError,
    ProtocolMismatch,
    RemoteProtocolError,
)
from distributed_llm.common.messages import ToReader, WeightRequest
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Login, Rejection

_REDIAL_S = 0.25
"""Time until a machine is dialled again whose connection was lost, or that did not let us in."""

_MOST_REJECTIONS = 20
"""Rejections in a row after which a machine is not dialled any more."""

_REASONS = {
    Rejection.OUR_KEY: "it does not let this worker in",
    Rejection.SERVER_KEY: "it does not hold the key that it should",
    Rejection.NO_KEYS: "it uses no keys",
}


class SourceLink:
    """A connection to one machine, to be made and used in a running event loop.

    Args:
        addresses: "HOST:PORT"s at which it may be reached.
        login: the keys of both ends; None without keys.
        on_message: called with each message.
        on_up: called when a connection is there.
        on_down: called when it is lost, with the reason.
        on_failed: called once when it is not dialled any more, with the reason.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        login: Login | None,
        *,
        on_message: Callable[[ToReader, tuple[Frame, ...]], None],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._addresses = addresses
        self._login = login
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._redial: asyncio.TimerHandle | None = None
        self._rejections = 0
        self._closed = False
        self._dial()

    def send(self, request: WeightRequest) -> None:
        """Send a request; does nothing while there is no connection."""
        if self._connection:
            try:
                self._connection.send(codec.encode(request))
            except LocalProtocolError as exc:  # too many wait
                self._lost(str(exc))

    def deliver_waiting(self) -> None:
        """Call back with the messages that have arrived, now."""
        if self._connection:
            self._connection.deliver_waiting()

    def close(self) -> None:
        """Close the connection, and dial no more."""
        self._closed = True
        if self._redial:
            self._redial.cancel()
        self._hang_up()

    def _dial(self) -> None:
        self._redial = None
        try:
            self._connection = Connection(
                self._addresses[0],
                self._addresses,
                self._received,
                self._connected,
                lambda: self._lost("the connection was lost"),
                login=self._login,
                on_rejected=self._rejected,
            )
        except (ConnectionFailed, IndexError) as exc:
            self._loop.call_soon(self._fail, str(exc) or "it has no address")

    def _connected(self) -> None:
        self._rejections = 0
        self._on_up()

    def _received(self, frames: list[Frame]) -> None:
        try:
            message, tensors = codec.to_reader.decode(frames)
        except (ProtocolMismatch, RemoteProtocolError) as exc:
            self._fail(f"it sent what cannot be read ({exc})"[:500])
        else:
            self._on_message(message, tensors)

    def _lost(self, why: str) -> None:
        self._loop.call_soon(self._hang_up)
        self._dial_later()
        self._on_down(why)

    def _rejected(self, why: Rejection) -> None:
        self._rejections += 1
        self._loop.call_soon(self._hang_up)
        if self._rejections == _MOST_REJECTIONS or why is not Rejection.OUR_KEY:
            self._fail(_REASONS[why])
        else:
            self._dial_later()

    def _dial_later(self) -> None:
        if not self._closed and self._redial is None:
            self._redial = self._loop.call_later(_REDIAL_S, self._dial)

    def _hang_up(self) -> None:
        if self._connection:
            connection, self._connection = self._connection, None
            connection.close()

    def _fail(self, why: str) -> None:
        if not self._closed:
            self.close()
            self._on_failed(why)
