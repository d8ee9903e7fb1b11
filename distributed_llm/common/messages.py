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

PROTOCOL_VERSION = 4
MAX_TENSORS = 8
MAX_SLICES = 512
"""Sequences in one task."""

MAX_STAGES = 256
MAX_RELEASED = 1024
MAX_CHAT_MESSAGES = 16_384
MAX_PIECES = 2048
"""Pieces of KV cache in one message."""

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Label = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=16384)]
RequestId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+\Z")]
Tensors = Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
Address = Annotated[str, Meta(min_length=1, max_length=256)]
Addresses = Annotated[tuple[Address, ...], Meta(max_length=16)]
SequenceIds = Annotated[tuple[Count, ...], Meta(max_length=MAX_RELEASED)]
Microseconds = Annotated[int, Meta(ge=0, le=2**53)]
Bandwidth = Annotated[float, Meta(gt=0, le=1e16)]
Flops = Annotated[float, Meta(gt=0, le=1e20)]
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
    memory_bandwidth_bytes_per_s: Bandwidth
    flops_per_s: Flops


class WorkerHello(Message, frozen=True, kw_only=True, tag="worker_hello"):
    """Worker -> coordinator: first message of a session.

    Attributes:
        instance: drawn at random when the worker started: who comes back with it is no other.
        peer_addresses: "HOST:PORT" at which other workers may reach it, best first.
    """

    name: Name
    instance: Name
    capabilities: Capabilities
    peer_addresses: Addresses = ()


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Worker -> coordinator, every `heartbeat_interval_s`: alive.

    Attributes:
        epochs: whose layers it holds or loads; none if it has no work.
        progress_age_s: since the compute thread last finished a layer or had nothing to do.
        tasks_waiting: tasks received and not answered.
    """

    epochs: Annotated[tuple[Count, ...], Meta(max_length=2)]
    progress_age_s: Seconds
    tasks_waiting: Count
    memory_used_bytes: Count
    kv_bytes: Count


class StageReady(Message, frozen=True, kw_only=True, tag="stage_ready"):
    """Worker -> coordinator: the layers of `epoch` are loaded; grants credits.

    Attributes:
        credits: tasks that it is ready to hold, waiting or running. No more steps are under way in
            a pipeline than the smallest grant of its stages.
        kv_tokens: positions of KV cache that the memory it really has leaves room for.
    """

    epoch: Count
    credits: Annotated[int, Meta(ge=1, le=64)]
    load_s: Seconds
    weight_bytes: Count
    kv_tokens: Count


class StageFailed(Message, frozen=True, kw_only=True, tag="stage_failed"):
    """Worker -> coordinator: the layers of `epoch` cannot be served, and why."""

    epoch: Count
    code: Label
    message: Text


class StageTime(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """What one task took on one stage.

    Attributes:
        layers_us: of `compute_us`, inside the layers; the rest is embedding, head, sampling and
            what a task costs by itself.
        queued_us: from arrival until it ran.
    """

    compute_us: Microseconds
    layers_us: Microseconds
    queued_us: Microseconds


StageTimes = Annotated[tuple[StageTime, ...], Meta(max_length=MAX_STAGES)]


class TaskResult(Message, frozen=True, kw_only=True, tag="task_result"):
    """Worker -> coordinator: a stage is done with a step, and the coordinator is next.

    The last stage answers with `tensors` [token_ids [sequences that sample] int32], in the order of
    the task; none if nothing samples. If any of these sequences asked for log-probabilities, two
    more follow: logprobs [sequences that sample, 1 + k] float32 and their token ids, int32 of the
    same shape; k is the largest number asked for, column 0 the token that was picked.

    Another stage answers only if it could not hand the step to the next one itself; `tensors` is
    [hidden_states [tokens, hidden_size]] in the wire dtype then.

    Attributes:
        timings: of the stages that the step has passed, the sender's last.
    """

    epoch: Count
    step: Count
    timings: Annotated[StageTimes, Meta(min_length=1)]
    tensors: Tensors = ()


class MissingPositions(Value, frozen=True, kw_only=True):
    """A stage holds only positions `[0, have)` of a sequence."""

    sequence_id: Count
    have: Count


class TaskFailed(Message, frozen=True, kw_only=True, tag="task_failed"):
    """Worker -> coordinator: a task could not be run."""

    epoch: Count
    step: Count
    code: Label
    message: Text
    missing: Annotated[tuple[MissingPositions, ...], Meta(max_length=1024)] = ()


class LinkReport(Message, frozen=True, kw_only=True, tag="link_report"):
    """Worker -> coordinator: whether it reaches the worker of the next stage.

    Said when that changes, and once more when the speed of the link was measured.

    Attributes:
        rtt_s: of the handshake; 0 if it is down.
        bytes_per_s: of a large message; 0 while it is not known.
    """

    epoch: Count
    up: bool
    rtt_s: Seconds = 0.0
    bytes_per_s: Annotated[float, Meta(ge=0, le=1e12)] = 0.0


class Remeasured(Message, frozen=True, kw_only=True, tag="remeasured"):
    """Worker -> coordinator, now and then while it has no layers: how fast its machine is now.

    Said first right after it lost its layers; the attributes are those of `Capabilities`.
    """

    memory_bandwidth_bytes_per_s: Bandwidth
    flops_per_s: Flops


class KVCopied(Message, frozen=True, kw_only=True, tag="kv_copied"):
    """Worker -> coordinator: who takes layers over in `epoch` has their KV cache as it was now.

    What the steps add that run meanwhile follows after `TakeOver`.
    """

    epoch: Count
    bytes_sent: Count


class TookOver(Message, frozen=True, kw_only=True, tag="took_over"):
    """Worker -> coordinator: the stage of `epoch` has its KV cache; tasks may come."""

    epoch: Count


class KVFailed(Message, frozen=True, kw_only=True, tag="kv_failed"):
    """Worker -> coordinator: the KV cache of layers that move in `epoch` cannot be handed over.

    Both stages are as they were: the older epoch can go on, and the new one begin without.

    Attributes:
        worker: to whom it could not be sent; empty if it could not be taken over here.
    """

    epoch: Count
    worker: Annotated[str, Meta(max_length=64)]
    code: Label
    message: Text


class Leaving(Message, frozen=True, kw_only=True, tag="leaving"):
    """Worker -> coordinator: wants to end; serves on until `MayLeave`."""


class Goodbye(Message, frozen=True, kw_only=True, tag="goodbye"):
    """Worker -> coordinator: ends now."""


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


class NextStage(Value, frozen=True, kw_only=True):
    """The worker of the stage after this one, and where it may be reached."""

    worker: Name
    addresses: Addresses


class LoadStage(Message, frozen=True, kw_only=True, tag="load_stage"):
    """Coordinator -> worker: load these layers, to serve them under `epoch`.

    Layers and KV cache of older epochs are dropped, unless it is `beside` them: then the served
    epoch goes on, also while this loads, until `DropStage` or the first task of this epoch. Of what
    loads beside, a newer order takes the place; `CancelStage` gives it up.

    Attributes:
        beside: keep serving. `TakeOver` may hand the KV cache on to this epoch.
        imports: layers whose KV cache other workers will send, each range by one of them.
        digest: what `Checkpoint.digest` of the layers must be on the worker.
        dtype: of weights, KV cache and computing.
        wire_dtype: of activations between stages.
        kv_tokens: positions of all sequences together that the KV cache must have room for.
        link_key: whoever hands this worker tasks of this epoch must know it.
        next_stage: to try to reach; None on the last stage.
    """

    epoch: Count
    source: ModelSource
    layers: LayerRange
    dtype: DtypeName
    wire_dtype: DtypeName
    digest: Label
    kv_tokens: Count
    link_key: Label
    next_stage: NextStage | None = None
    beside: bool = False
    imports: Annotated[tuple[LayerRange, ...], Meta(max_length=MAX_STAGES)] = ()


class KVTransfer(Value, frozen=True, kw_only=True):
    """Layers whose KV cache a worker is to send, to whom, and where it may be reached."""

    layers: LayerRange
    worker: Name
    addresses: Addresses


class CopyKV(Message, frozen=True, kw_only=True, tag="copy_kv"):
    """Coordinator -> worker: send KV cache of the served epoch to who has the layers in `epoch`.

    It goes on serving meanwhile, and may have no layers in `epoch` itself.

    Attributes:
        link_key: of `epoch`.
    """

    epoch: Count
    link_key: Label
    transfers: Annotated[tuple[KVTransfer, ...], Meta(min_length=1, max_length=MAX_STAGES)]


class TakeOver(Message, frozen=True, kw_only=True, tag="take_over"):
    """Coordinator -> worker: no step of the served epoch is under way any more; `epoch` goes on.

    A worker that sends KV cache sends what has changed, and what it holds. One that has layers in
    `epoch` waits for that, takes over what is its own, and answers `TookOver`. From now on tasks of
    the served epoch are void, until `CancelStage` takes this back.
    """

    epoch: Count


class CancelStage(Message, frozen=True, kw_only=True, tag="cancel_stage"):
    """Coordinator -> worker: `epoch` is not to be; go on with what is served.

    Frees layers that were loaded beside, and ends what is sent.
    """

    epoch: Count


class SharedPrefix(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """A sequence begins as the first `length` positions of another that the stages hold.

    Attributes:
        take: the other sequence ends with this; nothing else needs it.
    """

    sequence_id: Count
    length: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    take: bool = False


class SequenceSlice(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """The part of one sequence that a task computes: positions `[start, start + num_tokens)`.

    Attributes:
        sample: pick the token after the last of them.
        sampling: how, from now on; with the first slice that samples, and again after a restart.
        prefix: with the first slice of a sequence whose first `start` positions are another's.
    """

    sequence_id: Count
    start: Count
    num_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    sample: bool = False
    sampling: Sampling | None = None
    prefix: SharedPrefix | None = None


class Task(Message, frozen=True, kw_only=True, tag="task", omit_defaults=True):
    """Coordinator -> worker, or worker -> worker: one step on one stage, for a packed batch.

    `tensors` is [token_ids [tokens] int32] and, on all stages but the first,
    hidden_states [tokens, hidden_size] in the wire dtype; tokens is the sum of `num_tokens`.

    Attributes:
        oldest: steps with smaller numbers are void; those that arrive later are not run.
        released: sequences to free before this step: their memory may be what it needs.
        route: for each hop that is left: to the next worker itself (true), or to the coordinator.
            Empty on the last stage, which always answers the coordinator.
        timings: of the stages that the step has passed.
    """

    epoch: Count
    step: Count
    oldest: Count
    sequences: Annotated[tuple[SequenceSlice, ...], Meta(min_length=1, max_length=MAX_SLICES)]
    tensors: Tensors
    released: SequenceIds = ()
    route: Annotated[tuple[bool, ...], Meta(max_length=MAX_STAGES)] = ()
    timings: StageTimes = ()


class ReleaseSequences(Message, frozen=True, kw_only=True, tag="release_sequences"):
    """Coordinator -> worker: free the KV cache of these sequences, while no step is under way.

    The next task says it again: handed on from worker to worker, it may be faster than this.
    """

    epoch: Count
    sequence_ids: SequenceIds


class DropStage(Message, frozen=True, kw_only=True, tag="drop_stage"):
    """Coordinator -> worker: free the layers of all epochs up to this one.

    One that was loaded beside, and is newer, is served from now on.
    """

    epoch: Count


class MayLeave(Message, frozen=True, kw_only=True, tag="may_leave"):
    """Coordinator -> worker: end; nobody needs it. Answers `Leaving`, or somebody drained it.

    Attributes:
        why: for the operator.
    """

    why: Text = ""


# ------------------------------------------------------------------ worker -> next worker


class PeerHello(Message, frozen=True, kw_only=True, tag="peer_hello"):
    """Worker -> worker of the next stage: first message of a link; repeated until answered."""

    epoch: Count
    key: Label


class PeerProbe(Message, frozen=True, kw_only=True, tag="peer_probe"):
    """Worker -> next worker: zeros of some size, to see how fast the link is."""

    epoch: Count
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class KVPart(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Positions `[offset, offset + count)` of a segment of the sender's KV cache, in one layer.

    Attributes:
        segment: its name at the sender.
        layer: its number in the model.
        capacity: positions that the segment has room for.
    """

    segment: Count
    layer: Annotated[int, Meta(ge=0, le=65535)]
    offset: Count
    count: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    capacity: Count


class KVPieces(Message, frozen=True, kw_only=True, tag="kv_pieces"):
    """Worker -> worker: a part of a KV cache; answered by `KVTaken`.

    `tensors` is [bytes (uint8)]: of each part its keys [heads, count, key_dim] and its values
    [heads, count, value_dim], in the model's dtype.

    Attributes:
        layers: of the transfer, which names it.
        number: of the message in the transfer, from 1.
    """

    epoch: Count
    layers: LayerRange
    number: Count
    parts: Annotated[tuple[KVPart, ...], Meta(min_length=1, max_length=MAX_PIECES)]
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class KVEnd(Message, frozen=True, kw_only=True, tag="kv_end"):
    """Worker -> worker: nothing more comes; `tensors` is [msgpack of `KVManifest` (uint8)]."""

    epoch: Count
    layers: LayerRange
    number: Count
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


# ------------------------------------------------------------------ next worker -> worker


class PeerWelcome(Message, frozen=True, kw_only=True, tag="peer_welcome"):
    """Worker -> worker of the stage before: the key is right; tasks of `epoch` may come.

    A hello that is not answered has a wrong key, or comes before the epoch is known here.
    """

    epoch: Count


class PeerProbed(Message, frozen=True, kw_only=True, tag="peer_probed"):
    """Worker -> worker of the stage before: a `PeerProbe` has arrived."""

    epoch: Count


class KVTaken(Message, frozen=True, kw_only=True, tag="kv_taken"):
    """Worker -> worker that sends KV cache: the transfer has arrived up to this message."""

    epoch: Count
    layers: LayerRange
    number: Count


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


class DrainWorker(Message, frozen=True, kw_only=True, tag="drain_worker"):
    """Client -> coordinator: hand the layers of a worker to others and let it end.

    Answered by `WorkerDrained`, once it is done or cannot be.
    """

    worker: Name


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Client -> coordinator: alive; answered by `Pong`."""


# ------------------------------------------------------------------ coordinator -> client


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


# ------------------------------------------------------------------ coordinator -> anybody


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    """Coordinator -> worker or client: alive. Answers `Heartbeat` and `Ping`."""


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Coordinator -> worker or client: the session ends, and why."""

    code: Label
    message: Text


FromWorker = (
    WorkerHello
    | Heartbeat
    | StageReady
    | StageFailed
    | TaskResult
    | TaskFailed
    | LinkReport
    | Remeasured
    | KVCopied
    | TookOver
    | KVFailed
    | Leaving
    | Goodbye
)
FromClient = ClientHello | Generate | Cancel | GetStatus | DrainWorker | Ping
ToCoordinator = FromWorker | FromClient
ToWorker = (
    Welcome
    | LoadStage
    | CopyKV
    | TakeOver
    | CancelStage
    | DropStage
    | Task
    | ReleaseSequences
    | MayLeave
    | Pong
    | Refused
)
ToClient = (
    ClientWelcome
    | TokenChunk
    | Finished
    | RequestFailed
    | StatusReport
    | WorkerDrained
    | Pong
    | Refused
)
ToNextWorker = PeerHello | PeerProbe | Task | KVPieces | KVEnd
ToPreviousWorker = PeerWelcome | PeerProbed | KVTaken
AnyMessage = ToCoordinator | ToWorker | ToClient | ToNextWorker | ToPreviousWorker
