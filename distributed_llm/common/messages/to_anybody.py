"""Messages from the coordinator to both workers and clients."""

from distributed_llm.common.messages.base import Label, Message, Text


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    """Coordinator -> worker or client: sign of life; answers `Heartbeat` and `Ping`."""


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Coordinator -> worker or client: ends the session, with the reason."""

    code: Label
    message: Text
