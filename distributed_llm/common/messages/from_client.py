"""Messages from clients to the coordinator."""

from typing import Annotated, Literal

from msgspec import Meta

from distributed_llm.common.messages.base import Message, Name, RequestId, Value
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import TensorSpec

MAX_CHAT_MESSAGES = 16_384


class ClientHello(Message, frozen=True, kw_only=True, tag="client_hello"):
    """Client -> coordinator: first message of a session."""


class ChatMessage(Value, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


Chat = Annotated[list[ChatMessage], Meta(max_length=MAX_CHAT_MESSAGES)]


class Generate(Message, frozen=True, kw_only=True, tag="generate"):
    """Client -> coordinator: generate answers to a prompt.

    `tensors` holds the prompt: "text" as UTF-8 bytes (uint8), "token_ids" as int32, "chat" as
    msgpack of `Chat` (uint8). An empty text has no tensor.

    Attributes:
        request_id: chosen by the client, which uses none twice at the same time.
    """

    request_id: RequestId
    prompt: Literal["text", "token_ids", "chat"]
    params: SamplingParams
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=1)]


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Client -> coordinator: end a request; answered by `RequestFailed`, code "cancelled"."""

    request_id: RequestId


class GetStatus(Message, frozen=True, kw_only=True, tag="get_status"):
    """Client -> coordinator: answered by `StatusReport`."""


class DrainWorker(Message, frozen=True, kw_only=True, tag="drain_worker"):
    """Client -> coordinator: move a worker's layers to other workers, and let it leave.

    Answered by `WorkerDrained` when that is done, or cannot be done.
    """

    worker: Name


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Client -> coordinator: sign of life; answered by `Pong`."""
