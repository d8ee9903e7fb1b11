"""What the coordinator tells workers and clients alike."""

from distributed_llm.common.messages.base import Label, Message, Text


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    """Coordinator -> worker or client: alive. Answers `Heartbeat` and `Ping`."""


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Coordinator -> worker or client: the session ends, and why."""

    code: Label
    message: Text
