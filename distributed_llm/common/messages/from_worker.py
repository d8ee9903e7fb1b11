"""Messages from workers to the coordinator."""

from typing import Annotated

import msgspec
from msgspec import Meta

from distributed_llm.common.messages.base import (
    Addresses,
    Bandwidth,
    Capabilities,
    FetchProgress,
    Flops,
    Label,
    Message,
    Name,
    StageTime,
    StageTimes,
    Tensors,
    Text,
    Value,
)
from distributed_llm.common.types import Count, Epoch, Seconds, SequenceId, StepNumber

MAX_TRIALS = 16

_TrialSize = Annotated[int, Meta(ge=1, le=4096)]


class WorkerHello(Message, frozen=True, kw_only=True, tag="worker_hello"):
    """Worker -> coordinator: first message of a session.

    Attributes:
        instance: drawn at random when the worker started; the same after it has reconnected.
        peer_addresses: "HOST:PORT" at which other workers may reach it, best first.
    """

    name: Name
    instance: Name
    capabilities: Capabilities
    peer_addresses: Addresses = ()


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Worker -> coordinator, every `heartbeat_interval_s`: sign of life.

    Attributes:
        epochs: epochs whose layers it holds or loads; empty if it has none.
        progress_age_s: time since the compute thread last finished a layer or was idle.
        tasks_waiting: tasks that were received and whose results were not sent yet.
        loading: whether layers are being loaded, even for an order that was given up since.
        load_progress: a number that changes as long as that makes progress.
        fetch: how far weights from other machines have arrived for it; None if it needs none.
    """

    epochs: Annotated[tuple[Epoch, ...], Meta(max_length=2)]
    progress_age_s: Seconds
    tasks_waiting: Count
    memory_used_bytes: Count
    kv_bytes: Count
    loading: bool = False
    load_progress: Count = 0
    fetch: FetchProgress | None = None


class StageTrial(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """How long a trial step took on newly loaded layers.

    Attributes:
        sequences: number of sequences in the step.
        start: positions that each sequence had in the KV cache before.
        num_tokens: tokens that each sequence computed.
        is_source: whether these were a source, which an encoder reads.
    """

    sequences: _TrialSize
    start: Count
    num_tokens: _TrialSize
    time: StageTime
    is_source: bool = False


class StageReady(Message, frozen=True, kw_only=True, tag="stage_ready"):
    """Worker -> coordinator: the layers of `epoch` are loaded; grants credits.

    Attributes:
        credits: tasks that it is ready to hold, waiting or running. A pipeline has no more steps in
            flight than the smallest grant of its stages.
        kv_tokens: positions of KV cache that its memory has room for, in all its layers.
        kv_token_bytes: what one of them takes.
        kv_windowed_bytes: what of that is in layers with a window.
        kv_window: positions that the widest of these see.
        trials: empty unless `LoadStage` asked for them.
        fetched_bytes: of weights that came from other machines.
        fetch_s: how long the worker waited for them.
        gives_weights: whether it can give the weights of these layers to other workers.
        kernels: by what its GPU multiplies weights of integers, for people; empty if there are none
            there.
    """

    epoch: Epoch
    credits: Annotated[int, Meta(ge=1, le=64)]
    load_s: Seconds
    weight_bytes: Count
    kv_tokens: Count
    kv_token_bytes: Count = 1
    kv_windowed_bytes: Count = 0
    kv_window: Count = 0
    trials: Annotated[tuple[StageTrial, ...], Meta(max_length=MAX_TRIALS)] = ()
    fetched_bytes: Count = 0
    fetch_s: Seconds = 0.0
    gives_weights: bool = False
    kernels: Text = ""


class StageFailed(Message, frozen=True, kw_only=True, tag="stage_failed"):
    """Worker -> coordinator: the layers of `epoch` could not be loaded."""

    epoch: Epoch
    code: Label
    message: Text


class TaskResult(Message, frozen=True, kw_only=True, tag="task_result"):
    """Worker -> coordinator: a stage has run a step.

    The last stage sends [token_ids [samples] int32], one per slice that samples, in the order of
    the task; nothing if no slice samples. If any of them asked for log-probabilities, two tensors
    follow: logprobs [samples, 1 + k] float32 and their token ids [samples, 1 + k] int32. k is the
    largest number asked for; column 0 is the sampled token. If slices embed, the last tensor is
    their sums [embedding slices, hidden_size] float32, in the order of the task.

    Another stage sends [hidden_states [tokens, hidden_size]] in the wire dtype, and only if the
    step is to be relayed to the next stage by the coordinator.

    Attributes:
        timings: one per stage that has run the step, the sender's last.
    """

    epoch: Epoch
    step: StepNumber
    timings: Annotated[StageTimes, Meta(min_length=1)]
    tensors: Tensors = ()


class MissingPositions(Value, frozen=True, kw_only=True):
    """The KV cache of a stage has only positions `[0, have)` of a sequence."""

    sequence_id: SequenceId
    have: Count


NOT_SERVED = "not_served"
"""Code of a task for a plan that the worker holds no layers of."""


class TaskFailed(Message, frozen=True, kw_only=True, tag="task_failed"):
    """Worker -> coordinator: a stage could not run a step.

    Attributes:
        missing: sequences of which it lacks positions that the step needs.
        sequence_ids: the sequences because of which it failed; empty if that is not known. The code
            is "invalid_request" if their generation parameters allow no token.
    """

    epoch: Epoch
    step: StepNumber
    code: Label
    message: Text
    missing: Annotated[tuple[MissingPositions, ...], Meta(max_length=1024)] = ()
    sequence_ids: Annotated[tuple[SequenceId, ...], Meta(max_length=1024)] = ()


class NotUnderstood(Message, frozen=True, kw_only=True, tag="not_understood"):
    """Worker -> coordinator: it cannot read a message, and no other answer to it exists.

    Attributes:
        what: tag of the message's class; empty if not even that can be read.
        why: what is wrong with it.
    """

    what: Label
    why: Text


class LinkReport(Message, frozen=True, kw_only=True, tag="link_report"):
    """Worker -> coordinator: whether it reaches the worker of the next stage directly.

    Sent when that changes, and once more when the bandwidth of the link has been measured.

    Attributes:
        rtt_s: round trip of the handshake; 0 if the link is down.
        bytes_per_s: bandwidth of the link; None until it is measured.
    """

    epoch: Epoch
    up: bool
    rtt_s: Seconds = 0.0
    bytes_per_s: Annotated[float, Meta(ge=1, le=1e12)] | None = None


class Remeasured(Message, frozen=True, kw_only=True, tag="remeasured"):
    """Worker -> coordinator, from time to time while it has no layers: what it can do now.

    First sent right after its layers were dropped. The attributes are those of `Capabilities`.
    """

    memory_bandwidth_bytes_per_s: Bandwidth
    flops_per_s: Flops
    memory_bytes: Count


class KVCopied(Message, frozen=True, kw_only=True, tag="kv_copied"):
    """Worker -> coordinator: its KV cache is copied to the workers that have its layers in `epoch`.

    What steps have added since the copy began is sent in the handover, after `HandOver`.
    """

    epoch: Epoch
    bytes_sent: Count


class HandedOver(Message, frozen=True, kw_only=True, tag="handed_over"):
    """Worker -> coordinator: the handover is done here; its stage of `epoch` can run tasks."""

    epoch: Epoch


class KVFailed(Message, frozen=True, kw_only=True, tag="kv_failed"):
    """Worker -> coordinator: KV cache for `epoch` could not be sent, received or assembled.

    Neither stage is changed: the served epoch can continue, or `epoch` begin with an empty cache.

    Attributes:
        worker: the worker that could not be sent the KV cache; empty if this worker could not take
            over what it was sent.
    """

    epoch: Epoch
    worker: Annotated[str, Meta(max_length=64)]
    code: Label
    message: Text


class Leaving(Message, frozen=True, kw_only=True, tag="leaving"):
    """Worker -> coordinator: it wants to leave, and serves until `MayLeave`."""


class Goodbye(Message, frozen=True, kw_only=True, tag="goodbye"):
    """Worker -> coordinator: it ends now."""
