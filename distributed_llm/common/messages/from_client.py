"""What clients tell the coordinator."""

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
    """Client -> coordinator: a request, under an id that the client chose.

    `tensors` holds the prompt: "text" as UTF-8 bytes (uint8), "token_ids" as int32,
    "chat" as msgpack of `Chat` (uint8); none for an empty text.
    """

    request_id: RequestId
    prompt: Literal["text", "token_ids", "chat"]
    params: SamplingParams
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=1)]


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Client -> coordinator: stop this request; it ends with `RequestFailed`, code "cancelled"."""

    request_id: RequestId


class GetStatus(Message, frozen=True, kw_only=True, tag="get_status"):
    """Client -> coordinator: send a `StatusReport`."""


class DrainWorker(Message, frozen=True, kw_only=True, tag="drain_worker"):
    """Client -> coordinator: hand the layers of a worker to others and let it end.

    Answered by `WorkerDrained`, once it is done or cannot be.
    """

    worker: Name


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Client -> coordinator: alive; answered by `Pong`."""
