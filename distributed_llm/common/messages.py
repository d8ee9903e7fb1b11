"""Every message that crosses a socket. One union per direction; `codec` turns them into frames.

A message that carries tensors has a field `tensors`: one spec per raw frame after the header.
All work names the `epoch` of the plan it belongs to and the `step`; stale answers are dropped.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.tensors import DtypeName, TensorSpec
from distributed_llm.common.types import Count, LayerRange, Seconds, TokenId

PROTOCOL_VERSION = 1
MAX_TENSORS = 8
MAX_CHAT_MESSAGES = 16_384

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Label = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=16384)]
RequestId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+\Z")]
Tensors = Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
Credits = Annotated[int, Meta(ge=0, le=64)]
FinishReason = Literal["stop", "length"]


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what messages are made of."""


class Message(Value, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages; the field `type` on the wire says which one it is."""


# ------------------------------------------------------------------ worker -> coordinator


class Capabilities(Value, frozen=True, kw_only=True):
    """What a machine offers, measured by the worker when it starts.

    Attributes:
        device: torch's name of the device ("cpu", "cuda:0").
        device_name: what people call it.
        memory_bytes: what this worker may use for weights and KV cache.
        cores: CPU cores of the machine.
        threads: CPU threads this worker computes with.
        memory_bandwidth_bytes_per_s: reading weights, measured.
        flops_per_s: multiplying matrices, measured.
    """

    device: Label
    device_name: Label
    platform: Label
    memory_bytes: Count
    cores: Annotated[int, Meta(ge=1, le=65536)]
    threads: Annotated[int, Meta(ge=1, le=65536)]
    memory_bandwidth_bytes_per_s: Annotated[float, Meta(gt=0, le=1e16)]
    flops_per_s: Annotated[float, Meta(gt=0, le=1e20)]


class WorkerHello(Message, frozen=True, kw_only=True, tag="worker_hello"):
    """Worker -> coordinator: first message of a session."""

    name: Name
    capabilities: Capabilities


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Worker -> coordinator, every `heartbeat_interval_s`: alive.

    Attributes:
        progress_age_s: since the compute thread last finished a layer or had nothing to do.
        tasks_waiting: tasks received and not answered.
    """

    epoch: Count
    progress_age_s: Seconds
    tasks_waiting: Count
    memory_used_bytes: Count
    kv_bytes: Count


class StageReady(Message, frozen=True, kw_only=True, tag="stage_ready"):
    """Worker -> coordinator: the layers of `epoch` are loaded; grants the first credits."""

    epoch: Count
    credits: Annotated[int, Meta(ge=1, le=64)]
    load_s: Seconds
    weight_bytes: Count


class StageFailed(Message, frozen=True, kw_only=True, tag="stage_failed"):
    """Worker -> coordinator: the layers of `epoch` cannot be served, and why."""

    epoch: Count
    code: Label
    message: Text


class TaskResult(Message, frozen=True, kw_only=True, tag="task_result"):
    """Worker -> coordinator: one task done; grants credits for more.

    `tensors` is [hidden_states [tokens, hidden_size]], or on the last stage
    [token_ids [sequences that sample] int32], in the order of the task; empty if none samples.
    """

    epoch: Count
    step: Count
    attempt: Count
    credits: Credits
    compute_s: Seconds
    queued_s: Seconds
    tensors: Tensors


class MissingPositions(Value, frozen=True, kw_only=True):
    """A stage holds only positions `[0, have)` of a sequence."""

    sequence_id: Count
    have: Count


class TaskFailed(Message, frozen=True, kw_only=True, tag="task_failed"):
    """Worker -> coordinator: a task could not be run; grants credits for others."""

    epoch: Count
    step: Count
    attempt: Count
    credits: Credits
    code: Label
    message: Text
    missing: Annotated[tuple[MissingPositions, ...], Meta(max_length=1024)] = ()


class Goodbye(Message, frozen=True, kw_only=True, tag="goodbye"):
    """Worker -> coordinator: leaving on purpose."""


# ------------------------------------------------------------------ coordinator -> worker


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Coordinator -> worker: the session exists."""

    worker_id: Name
    heartbeat_interval_s: Seconds
    silence_timeout_s: Seconds


class ModelSource(Value, frozen=True, kw_only=True):
    """Where a worker finds the checkpoint.

    Attributes:
        kind: "builtin" (in the package), "folder" (same path on every machine) or "hub".
        name: empty, the folder's path, or the hub id.
        revision: commit on the hub, else empty.
    """

    kind: Literal["builtin", "folder", "hub"]
    name: Annotated[str, Meta(max_length=4096)]
    revision: Label = ""


class LoadStage(Message, frozen=True, kw_only=True, tag="load_stage"):
    """Coordinator -> worker: serve these layers under `epoch`; drop those of older epochs.

    KV cache of older epochs is dropped even if the layers are the same.

    Attributes:
        digest: what `Checkpoint.digest` of the layers must be on the worker.
        dtype: of weights, KV cache and activations.
        kv_tokens: positions of all sequences together that the KV cache must have room for.
    """

    epoch: Count
    source: ModelSource
    layers: LayerRange
    dtype: DtypeName
    digest: Label
    kv_tokens: Count


class SequenceSlice(Value, frozen=True, kw_only=True, omit_defaults=True):
    """The part of one sequence that a task computes: positions `[start, start + num_tokens)`.

    Attributes:
        sampling: how to pick the next token, or None while more of the prompt is to come.
    """

    sequence_id: Count
    start: Count
    num_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    sampling: Sampling | None = None


class Task(Message, frozen=True, kw_only=True, tag="task"):
    """Coordinator -> worker: one step on one stage, for a packed batch of sequences.

    `tensors` is [token_ids [tokens] int32] and, on all stages but the first,
    hidden_states [tokens, hidden_size]; tokens is the sum of `num_tokens`.
    """

    epoch: Count
    step: Count
    attempt: Count
    sequences: Annotated[tuple[SequenceSlice, ...], Meta(min_length=1, max_length=512)]
    tensors: Tensors


class ReleaseSequences(Message, frozen=True, kw_only=True, tag="release_sequences"):
    """Coordinator -> worker: free the KV cache of these sequences."""

    epoch: Count
    sequence_ids: Annotated[tuple[Count, ...], Meta(max_length=1024)]


class DropStage(Message, frozen=True, kw_only=True, tag="drop_stage"):
    """Coordinator -> worker: free the layers of all epochs up to this one; there is no work."""

    epoch: Count


# ------------------------------------------------------------------ client -> coordinator


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


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Client -> coordinator: alive; answered by `Pong`."""


# ------------------------------------------------------------------ coordinator -> client


class ClientWelcome(Message, frozen=True, kw_only=True, tag="client_welcome"):
    """Coordinator -> client: the session exists."""

    model: Annotated[str, Meta(max_length=4096)]
    heartbeat_interval_s: Seconds
    silence_timeout_s: Seconds


class TokenChunk(Message, frozen=True, kw_only=True, tag="token_chunk"):
    """Coordinator -> client: the next piece of an answer.

    Attributes:
        index: how many token ids of the answer were sent before.
        text: complete characters only; may be empty while a character is unfinished.
    """

    request_id: RequestId
    index: Count
    text: Text
    token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=4096)]


class Usage(Value, frozen=True, kw_only=True):
    """How many tokens a request took."""

    prompt_tokens: Count
    completion_tokens: Count


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
        decode_s: from the first token to the last.
        stages: by stage, in the order of the layers; workers that left are listed too.
    """

    queued_s: Seconds
    first_token_s: Seconds
    decode_s: Seconds
    stages: Annotated[tuple[StageTiming, ...], Meta(max_length=256)]


class Finished(Message, frozen=True, kw_only=True, tag="finished"):
    """Coordinator -> client: a request is complete; nothing more comes for it."""

    request_id: RequestId
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


class RequestFailed(Message, frozen=True, kw_only=True, tag="request_failed"):
    """Coordinator -> client: a request ended without an answer; nothing more comes for it."""

    request_id: RequestId
    code: Label
    message: Text
    retry_after_s: Seconds = 0.0


class WorkerStatus(Value, frozen=True, kw_only=True):
    """One worker as the coordinator sees it.

    Attributes:
        state: "idle" (no layers), "loading", "serving" or "unfit" (see `note`).
        layers: what it serves or loads.
        seconds_per_token: measured time of its stage per decoded token, or None before any.
    """

    name: Name
    state: Literal["idle", "loading", "serving", "unfit"]
    note: Text
    layers: LayerRange | None
    capabilities: Capabilities
    memory_used_bytes: Count
    kv_bytes: Count
    weight_bytes: Count
    tasks_done: Count
    compute_s: Seconds
    seconds_per_token: Seconds | None
    last_heard_s: Seconds


class ClusterStatus(Value, frozen=True, kw_only=True):
    """The whole cluster as the coordinator sees it; travels as a msgpack payload.

    Attributes:
        state: "waiting" (for workers, see `note`), "loading" or "serving".
        epoch: of the plan that is served or loaded; 0 before the first.
        events: what happened lately, oldest first.
    """

    model: str
    state: Literal["waiting", "loading", "serving"]
    note: str
    epoch: Count
    num_layers: Count
    context_length: Count
    kv_tokens: Count
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


# ------------------------------------------------------------------ coordinator -> anybody


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    """Coordinator -> worker or client: alive. Answers `Heartbeat` and `Ping`."""


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Coordinator -> worker or client: the session ends, and why."""

    code: Label
    message: Text


FromWorker = WorkerHello | Heartbeat | StageReady | StageFailed | TaskResult | TaskFailed | Goodbye
FromClient = ClientHello | Generate | Cancel | GetStatus | Ping
ToCoordinator = FromWorker | FromClient
ToWorker = Welcome | LoadStage | DropStage | Task | ReleaseSequences | Pong | Refused
ToClient = ClientWelcome | TokenChunk | Finished | RequestFailed | StatusReport | Pong | Refused
AnyMessage = ToCoordinator | ToWorker | ToClient
