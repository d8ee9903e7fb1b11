"""Messages from the coordinator to clients."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages.base import (
    MAX_STAGES,
    Addresses,
    Label,
    Message,
    Name,
    RequestId,
    Text,
    Value,
)
from distributed_llm.common.roles import Role
from distributed_llm.common.tensors import DtypeName, TensorSpec
from distributed_llm.common.types import Count, Epoch, LayerRange, Seconds, TokenId

FinishReason = Literal["stop", "length"]


class ClientWelcome(Message, frozen=True, kw_only=True, tag="client_welcome"):
    """Coordinator -> client: answers `ClientHello`; the session has begun.

    Attributes:
        model: name of the served model.
        name: by which the client is enrolled; empty without keys.
        role: what it may do.
    """

    model: Annotated[str, Meta(max_length=4096)]
    name: Annotated[str, Meta(max_length=64)] = ""
    role: Role = Role.ADMIN
    heartbeat_interval_s: Seconds
    silence_timeout_s: Seconds


MAX_LIKELIEST = 20
"""Likeliest tokens that are reported for one position."""

MAX_SPELLING = 256
"""Bytes of a token's text that are reported with its probability."""


class Spelling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """How a token is written.

    Attributes:
        written: UTF-8, of which a token may be a part of a character.
        is_text: whether `written` is the token's text; else it is the name of a special token, or
            the beginning of a longer text.
    """

    written: Annotated[bytes, Meta(max_length=MAX_SPELLING)]
    is_text: bool = True


_Logprob = Annotated[float, Meta(ge=-1e9, le=1e-3)]


class TokenLogprobs(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Log-probabilities at one position, by the model's logits before any sampling parameter.

    Attributes:
        logprob: natural logarithm of the sampled token's probability.
        top: ids and log-probabilities of the likeliest tokens, likeliest first.
        spelled: how the sampled token is written, and then each of `top`; None for one that the
            tokenizer does not know, and empty if there is no tokenizer.
    """

    logprob: _Logprob
    top: Annotated[tuple[tuple[TokenId, _Logprob], ...], Meta(max_length=MAX_LIKELIEST)] = ()
    spelled: Annotated[tuple[Spelling | None, ...], Meta(max_length=1 + MAX_LIKELIEST)] = ()


class StageHop(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """What one stage did in one step, for all tokens of the step.

    Attributes:
        bytes_in: what came in: activations, or token ids at the first stage.
        link_s: how long these take on the link from the stage before, by what was measured of that
            link; None if nothing was, and at the first stage.
        queued_s: from their arrival until they were computed.
        compute_s: for which they were computed.
    """

    worker: Name
    layers: LayerRange
    bytes_in: Count
    link_s: Seconds | None
    queued_s: Seconds
    compute_s: Seconds


class StepTrace(Value, frozen=True, kw_only=True):
    """One step through all stages, as one answer in it sees it.

    Attributes:
        index: of the token of the answer that it sampled, or that it prepared for: part of a
            prompt, or tokens that are computed again after a loss.
        sampled: whether it sampled that token.
        epoch: of the plan.
        start: position of its first token of this answer's sequence, the prompt included.
        tokens: of this answer's sequence that it computed.
        step_tokens: tokens that it computed of all sequences.
        step_sequences: sequences in it.
        began_s: when it began, since the request arrived.
        took_s: from then until its result was there.
        outside_s: the measured part of that outside of stages and their queues: on all links, and
            to and from the coordinator.
        hops: the stages in the order of the layers.
    """

    index: Count
    sampled: bool
    epoch: Epoch
    start: Count
    tokens: Count
    step_tokens: Count
    step_sequences: Count
    began_s: Seconds
    took_s: Seconds
    outside_s: Seconds
    hops: Annotated[tuple[StageHop, ...], Meta(max_length=MAX_STAGES)]


MAX_TRACED = 64
"""Steps that are reported of those that led to one token; the latest are."""


class TokenChunk(Message, frozen=True, kw_only=True, tag="token_chunk", omit_defaults=True):
    """Coordinator -> client: the next piece of an answer.

    Attributes:
        choice: index of the answer among the request's `n`.
        index: number of token ids of this answer that were sent before.
        text: complete characters only; may be empty while a character is unfinished.
        logprobs: one per token id, if they were asked for.
        finish_reason: in the last chunk of the answer, why it ends.
        stop_string: in that chunk, the stop string that ended it; None if none did.
        trace: the steps that led to its tokens, oldest first, if they were asked for.
    """

    request_id: RequestId
    choice: Count = 0
    index: Count
    text: Text
    token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=4096)]
    logprobs: Annotated[tuple[TokenLogprobs, ...], Meta(max_length=4096)] = ()
    finish_reason: FinishReason | None = None
    stop_string: Annotated[str, Meta(max_length=256)] | None = None
    trace: Annotated[tuple[StepTrace, ...], Meta(max_length=MAX_TRACED)] = ()


class Usage(Value, frozen=True, kw_only=True):
    """Token counts of a request.

    Attributes:
        completion_tokens: tokens of all its answers.
        cached_tokens: tokens of the prompt that were found in the KV cache.
    """

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0


class StageTiming(Value, frozen=True, kw_only=True):
    """The tasks of a request on one stage, and the time that they took."""

    worker: Name
    layers: LayerRange
    tasks: Count
    compute_s: Seconds


class Timings(Value, frozen=True, kw_only=True):
    """How long a request took, and where.

    Attributes:
        queued_s: from arrival until it was admitted.
        first_token_s: from then until the first token.
        decode_s: from the first token to the last, of the answer that took longest.
        stages: all stages that computed for it, in the order of the layers; also of workers that
            have left.
    """

    queued_s: Seconds
    first_token_s: Seconds
    decode_s: Seconds
    stages: Annotated[tuple[StageTiming, ...], Meta(max_length=256)]


class Finished(Message, frozen=True, kw_only=True, tag="finished"):
    """Coordinator -> client: last message of a request whose answers are all complete."""

    request_id: RequestId
    usage: Usage
    timings: Timings


class Embedded(Message, frozen=True, kw_only=True, tag="embedded"):
    """Coordinator -> client: answers `Embed`; `tensors` is [embedding [hidden_size] float32]."""

    request_id: RequestId
    usage: Usage
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class PromptEncoded(Message, frozen=True, kw_only=True, tag="prompt_encoded"):
    """Coordinator -> client: answers `EncodePrompt`: the token ids, int32; no tensor for none."""

    request_id: RequestId
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=1)]


class TokensDecoded(Message, frozen=True, kw_only=True, tag="tokens_decoded"):
    """Coordinator -> client: answers `DecodeTokens`: the text in UTF-8; no tensor for none."""

    request_id: RequestId
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=1)]


class RequestFailed(Message, frozen=True, kw_only=True, tag="request_failed"):
    """Coordinator -> client: last message of a request that failed.

    Attributes:
        code: `code` of the exception in `common.errors`.
        message: what happened, why, and what to do.
        retry_after_s: when to try again; 0 if that is not known.
    """

    request_id: RequestId
    code: Label
    message: Text
    retry_after_s: Seconds = 0.0


class WorkerDrained(Message, frozen=True, kw_only=True, tag="worker_drained"):
    """Coordinator -> client: answers `DrainWorker`: the worker has left, or why it cannot.

    Attributes:
        code: `code` of the exception in `common.errors`; empty if the worker has left.
        message: what happened, why, and what to do.
    """

    worker: Name
    code: Label = ""
    message: Text = ""


class Enrolled(Message, frozen=True, kw_only=True, tag="enrolled"):
    """Coordinator -> holder of a token: answers `Enrol`: the machine may connect now.

    Attributes:
        name: of the machine.
        role: what it may do.
    """

    name: Name
    role: Role


class MachineStatus(Value, frozen=True, kw_only=True):
    """One machine that is enrolled.

    Attributes:
        enrolled_at: seconds since 1970.
        sessions: connections that it has now.
        quarantined_s: time until it may connect again, for it broke the protocol; else None.
    """

    name: Name
    role: Role
    key: PublicKey
    enrolled_at: float
    sessions: Count
    quarantined_s: Seconds | None = None


class TokenStatus(Value, frozen=True, kw_only=True):
    """One token by which machines may enrol.

    Attributes:
        uses_left: None for any number.
        expires_at: seconds since 1970; None for never.
    """

    id: Label
    role: Role
    created_at: float
    uses_left: Count | None
    expires_at: float | None


class ClusterMembers(Value, frozen=True, kw_only=True):
    """Who may connect to a coordinator. It travels as msgpack in a tensor frame.

    Attributes:
        addresses: "HOST:PORT"s at which other machines reach it, best first; none if they cannot.
    """

    machines: tuple[MachineStatus, ...]
    tokens: tuple[TokenStatus, ...]
    addresses: Addresses = ()


class MembersReport(Message, frozen=True, kw_only=True, tag="members_report"):
    """Coordinator -> admin: answers `GetMembers` and all that changes members.

    One tensor: `ClusterMembers` as msgpack; none if what was asked could not be done.

    Attributes:
        code: `code` of the exception in `common.errors`; empty if it was done.
        message: what happened, why, and what to do.
    """

    code: Label = ""
    message: Text = ""
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=1)] = ()


class ModelInfo(Value, frozen=True, kw_only=True):
    """The model that a coordinator serves. It travels as msgpack in a tensor frame.

    Attributes:
        name: as it was given to the coordinator: a folder, or an id of the hub.
        model_type: the architecture's name in transformers ("llama").
        architecture: the model's class in transformers ("LlamaForCausalLM"); empty if its files
            name none.
        context_length: positions of prompt and answer together.
        dtype: in which it is served.
        num_parameters: numbers in its weights, those of the files.
        weight_bytes: that the weights take in memory, each layer held once.
        eos_token_ids: tokens that end an answer.
        has_tokenizer: whether it takes and gives text; else token ids only.
        special_tokens: how the special tokens are written that the tokenizer names, by their names
            in transformers: `{"bos_token": "<s>", "eos_token": "</s>"}`.
        chat_template: Jinja text that writes out conversations; None if there is none.
        tool_template: Jinja text that writes out those with tools, if that is another one.
    """

    name: str
    model_type: str
    architecture: str
    num_layers: Count
    hidden_size: Count
    vocab_size: Count
    context_length: Count
    dtype: DtypeName
    num_parameters: Count
    weight_bytes: Count
    eos_token_ids: tuple[TokenId, ...]
    has_tokenizer: bool
    special_tokens: dict[str, str]
    chat_template: str | None
    tool_template: str | None


class ModelDescribed(Message, frozen=True, kw_only=True, tag="model_described"):
    """Coordinator -> client: answers `DescribeModel`; `tensors` is [msgpack of `ModelInfo`]."""

    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class StatusReport(Message, frozen=True, kw_only=True, tag="status_report"):
    """Coordinator -> client: answers `GetStatus`; `tensors` is [msgpack of `ClusterStatus`]."""

    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]
