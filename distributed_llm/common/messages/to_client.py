"""What the coordinator tells clients."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from distributed_llm.common.messages.base import (
    Capabilities,
    Label,
    Message,
    Name,
    RequestId,
    Text,
    Value,
)
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import Count, LayerRange, Seconds, TokenId

FinishReason = Literal["stop", "length"]


class ClientWelcome(Message, frozen=True, kw_only=True, tag="client_welcome"):
    """Coordinator -> client: the session exists."""

    model: Annotated[str, Meta(max_length=4096)]
    heartbeat_interval_s: Seconds
    silence_timeout_s: Seconds


class TokenLogprobs(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """How likely the model found a token, before any parameter changed that.

    Attributes:
        logprob: natural logarithm of the probability of the token that was picked.
        top: token ids and log-probabilities of the likeliest tokens, best first.
    """

    logprob: Annotated[float, Meta(ge=-1e9, le=1e-3)]
    top: Annotated[
        tuple[tuple[TokenId, Annotated[float, Meta(ge=-1e9, le=1e-3)]], ...], Meta(max_length=20)
    ] = ()


class TokenChunk(Message, frozen=True, kw_only=True, tag="token_chunk", omit_defaults=True):
    """Coordinator -> client: the next piece of an answer.

    Attributes:
        choice: which of the request's `n` answers.
        index: how many token ids of this answer were sent before.
        text: complete characters only; may be empty while a character is unfinished.
        logprobs: one per token id, if they were asked for.
        finish_reason: with the last chunk of this answer, why it ends.
    """

    request_id: RequestId
    choice: Count = 0
    index: Count
    text: Text
    token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=4096)]
    logprobs: Annotated[tuple[TokenLogprobs, ...], Meta(max_length=4096)] = ()
    finish_reason: FinishReason | None = None


class Usage(Value, frozen=True, kw_only=True):
    """How many tokens a request took.

    Attributes:
        completion_tokens: of all its answers.
        cached_tokens: tokens of the prompt whose KV cache was there already.
    """

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0


class StageTiming(Value, frozen=True, kw_only=True):
    """What one stage did for a request: its tasks, and the seconds it computed on them."""

    worker: Name
    layers: LayerRange
    tasks: Count
    compute_s: Seconds


class Timings(Value, frozen=True, kw_only=True):
    """Where the time of a request went.

    Attributes:
        queued_s: from arrival to the first step.
        first_token_s: from the first step to the first token.
        decode_s: from the first token to the last, of the answer that took longest.
        stages: by stage, in the order of the layers; workers that left are listed too.
    """

    queued_s: Seconds
    first_token_s: Seconds
    decode_s: Seconds
    stages: Annotated[tuple[StageTiming, ...], Meta(max_length=256)]


class Finished(Message, frozen=True, kw_only=True, tag="finished"):
    """Coordinator -> client: a request is complete; nothing more comes for it.

    The last chunk of each of its answers told why it ended.
    """

    request_id: RequestId
    usage: Usage
    timings: Timings


class RequestFailed(Message, frozen=True, kw_only=True, tag="request_failed"):
    """Coordinator -> client: a request ended without an answer; nothing more comes for it."""

    request_id: RequestId
    code: Label
    message: Text
    retry_after_s: Seconds = 0.0


class WorkerDrained(Message, frozen=True, kw_only=True, tag="worker_drained"):
    """Coordinator -> client: a worker has left, or cannot.

    Attributes:
        code: of the error; empty if it has left.
        message: what happened, why, what to do.
    """

    worker: Name
    code: Label = ""
    message: Text = ""


class WorkerStatus(Value, frozen=True, kw_only=True):
    """One worker as the coordinator sees it.

    Attributes:
        state: "idle" (no layers), "loading", "serving", "leaving" or "unfit" (see `note`).
        layers: what it serves or loads.
        next_layers: what it is about to serve instead, or None.
        link: how its results reach the next stage: "direct", "relayed" by the coordinator, or
            "" where there is none.
        seconds_per_token: measured time of its stage per decoded token, or None before any.
        prediction_error: median of |predicted - measured| / measured of its latest tasks, or None.
        gain: by how much more the cluster answers with it than without, as a share of the latter;
            None if it is not known, or if nothing can be served without it.
        advice: what that means, for people; empty if it is not known.
    """

    name: Name
    state: Literal["idle", "loading", "serving", "leaving", "unfit"]
    note: Text
    layers: LayerRange | None
    next_layers: LayerRange | None
    epoch: Count
    link: Literal["direct", "relayed", ""]
    capabilities: Capabilities
    memory_used_bytes: Count
    kv_bytes: Count
    weight_bytes: Count
    tasks_done: Count
    compute_s: Seconds
    seconds_per_token: Seconds | None
    prediction_error: Seconds | None
    gain: float | None
    advice: Text
    last_heard_s: Seconds


class ClusterStatus(Value, frozen=True, kw_only=True):
    """The whole cluster as the coordinator sees it; travels as a msgpack payload.

    Attributes:
        state: "waiting" (for workers, see `note`), "loading" or "serving".
        epoch: of the newest plan that is served or loaded; 0 before the first.
        kv_tokens: positions of KV cache that the pipelines have room for.
        kv_tokens_used: of them, by running requests.
        kv_tokens_cached: of them, by prefixes that are kept for later requests.
        prefix_hit_tokens: positions that were not computed because a prefix was kept.
        preemptions: how often a running request gave up its KV cache to an older one.
        moves: how often layers moved between workers while the model was served.
        move_stall_s: how long steps stood still in the latest of them; 0 before any.
        events: what happened lately, oldest first.
    """

    model: str
    state: Literal["waiting", "loading", "serving"]
    note: str
    epoch: Count
    num_layers: Count
    context_length: Count
    kv_tokens: Count
    kv_tokens_used: Count
    kv_tokens_cached: Count
    prefix_hit_tokens: Count
    preemptions: Count
    moves: Count
    move_stall_s: Seconds
    requests_running: Count
    requests_waiting: Count
    requests_finished: Count
    requests_failed: Count
    tokens_generated: Count
    rejected: dict[str, Count]
    workers: tuple[WorkerStatus, ...]
    events: tuple[str, ...]


class StatusReport(Message, frozen=True, kw_only=True, tag="status_report"):
    """Coordinator -> client: `tensors` is [msgpack of `ClusterStatus` (uint8)]."""

    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]
