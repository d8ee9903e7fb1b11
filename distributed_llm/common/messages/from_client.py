"""Messages from clients to the coordinator."""

from typing import Annotated, Literal

from msgspec import Meta

from distributed_llm.common.grammar import GrammarKind
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages.base import Label, Message, Name, RequestId, Value
from distributed_llm.common.roles import Role
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import TensorSpec

MAX_CHAT_MESSAGES = 16_384


class ClientHello(Message, frozen=True, kw_only=True, tag="client_hello"):
    """Client -> coordinator: first message of a session."""


MAX_JSON_CHARS = 1 << 20

Json = Annotated[str, Meta(max_length=MAX_JSON_CHARS)]
"""A value as JSON text; empty for none."""


class ToolCall(Value, frozen=True, kw_only=True):
    """A call of a tool, by the assistant.

    Attributes:
        name: of the tool.
        arguments: usually an object.
        id: by which the tool's answer names the call; empty if there is none.
    """

    name: str
    arguments: Json
    id: str = ""


class ChatMessage(Value, frozen=True, kw_only=True):
    """One turn of a conversation; texts that are not given are empty.

    Attributes:
        name: of who speaks, or of the tool that answers.
        reasoning_content: what the assistant thought before it spoke.
        tool_calls: what the assistant wants to know.
        tool_call_id: of the call that a tool answers.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str = ""
    reasoning_content: str = ""
    tool_calls: Annotated[tuple[ToolCall, ...], Meta(max_length=256)] = ()
    tool_call_id: str = ""


class Chat(Value, frozen=True, kw_only=True):
    """A conversation. It travels as msgpack in a tensor frame.

    Attributes:
        tools: list of the tools that the assistant may call, each as a JSON schema.
        template_arguments: object of further arguments of the chat template.
    """

    messages: Annotated[tuple[ChatMessage, ...], Meta(max_length=MAX_CHAT_MESSAGES)]
    tools: Json = ""
    template_arguments: Json = ""


class Generate(Message, frozen=True, kw_only=True, tag="generate"):
    """Client -> coordinator: generate answers to a prompt.

    `tensors` holds the prompt: "text" as UTF-8 bytes (uint8), "token_ids" as int32, "chat" as
    msgpack of `Chat` (uint8). An empty text has no tensor. The text of a grammar, unless it is
    empty, follows in a tensor of its own (uint8).

    Attributes:
        request_id: chosen by the client, which uses none twice at the same time.
        grammar: kind of the grammar that the answers have to follow; None if there is none.
    """

    request_id: RequestId
    prompt: Literal["text", "token_ids", "chat"]
    params: SamplingParams
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=2)]
    grammar: GrammarKind | None = None


class EncodePrompt(Message, frozen=True, kw_only=True, tag="encode_prompt"):
    """Client -> coordinator: tell the token ids of a prompt; answered by `PromptEncoded`.

    `tensors` holds the prompt as in `Generate`.

    Attributes:
        request_id: chosen by the client, which uses none twice at the same time.
        add_special_tokens: for a text, whether with those that start or end a prompt; those of a
            conversation are in its chat template.
    """

    request_id: RequestId
    prompt: Literal["text", "chat"]
    add_special_tokens: bool = True
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=1)]


class DecodeTokens(Message, frozen=True, kw_only=True, tag="decode_tokens"):
    """Client -> coordinator: tell the text of token ids; answered by `TokensDecoded`.

    `tensors` holds them as int32; no tokens have no tensor.

    Attributes:
        request_id: chosen by the client, which uses none twice at the same time.
        skip_special_tokens: whether the text is without special tokens.
    """

    request_id: RequestId
    skip_special_tokens: bool = False
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=1)]


class Embed(Message, frozen=True, kw_only=True, tag="embed"):
    """Client -> coordinator: compute the embedding of a prompt; answered by `Embedded`.

    `tensors` holds the prompt as in `Generate`.

    Attributes:
        request_id: chosen by the client, which uses none twice at the same time.
        timeout_s: time from the request's arrival after which it fails; None for never.
    """

    request_id: RequestId
    prompt: Literal["text", "token_ids"]
    timeout_s: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=1)]


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Client -> coordinator: end a request; answered by `RequestFailed`, code "cancelled"."""

    request_id: RequestId


class DescribeModel(Message, frozen=True, kw_only=True, tag="describe_model"):
    """Client -> coordinator: what is served? Answered by `ModelDescribed`."""


class GetStatus(Message, frozen=True, kw_only=True, tag="get_status"):
    """Client -> coordinator: answered by `StatusReport`."""


class DrainWorker(Message, frozen=True, kw_only=True, tag="drain_worker"):
    """Client -> coordinator: move a worker's layers to other workers, and let it leave.

    Answered by `WorkerDrained` when that is done, or cannot be done.
    """

    worker: Name


class GetMembers(Message, frozen=True, kw_only=True, tag="get_members"):
    """Admin -> coordinator: who may connect. Answered by `MembersReport`."""


class CreateToken(Message, frozen=True, kw_only=True, tag="create_token"):
    """Admin -> coordinator: let machines enrol by a token. Answered by `MembersReport`.

    Attributes:
        key: public half of the token; the secret one stays with who asks.
        role: of the machines that enrol by it.
        uses: machines that may; None for any number.
        lifetime_s: time for which they may; None for ever.
    """

    key: PublicKey
    role: Role
    uses: Annotated[int, Meta(ge=1, le=4096)] | None
    lifetime_s: Annotated[float, Meta(gt=0, le=1e9)] | None


class RevokeToken(Message, frozen=True, kw_only=True, tag="revoke_token"):
    """Admin -> coordinator: let nobody enrol by a token any more. Answered by `MembersReport`."""

    token_id: Label


class RemoveMachine(Message, frozen=True, kw_only=True, tag="remove_machine"):
    """Admin -> coordinator: let a machine connect no more. Answered by `MembersReport`.

    Its sessions end at once.
    """

    name: Label


class ReadmitMachine(Message, frozen=True, kw_only=True, tag="readmit_machine"):
    """Admin -> coordinator: end a machine's quarantine. Answered by `MembersReport`."""

    name: Label


class Enrol(Message, frozen=True, kw_only=True, tag="enrol"):
    """Holder of a token -> coordinator: let a machine connect. Answered by `Enrolled` or `Refused`.

    The connection is good for nothing else.

    Attributes:
        key: of the machine.
        name: that it asks for.
    """

    key: PublicKey
    name: Name


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Client -> coordinator: sign of life; answered by `Pong`."""
