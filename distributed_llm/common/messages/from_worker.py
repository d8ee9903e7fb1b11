"""What workers tell the coordinator."""

from typing import Annotated

import msgspec
from msgspec import Meta

from distributed_llm.common.messages.base import (
    Addresses,
    Bandwidth,
    Capabilities,
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
from distributed_llm.common.types import Count, Seconds

MAX_TRIALS = 16

_TrialSize = Annotated[int, Meta(ge=1, le=4096)]


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


class StageTrial(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """What a step took that was tried on new layers.

    Attributes:
        sequences: in it.
        start: positions that each of them had before.
        num_tokens: of each of them.
    """

    sequences: _TrialSize
    start: Count
    num_tokens: _TrialSize
    time: StageTime


class StageReady(Message, frozen=True, kw_only=True, tag="stage_ready"):
    """Worker -> coordinator: the layers of `epoch` are loaded; grants credits.

    Attributes:
        credits: tasks that it is ready to hold, waiting or running. No more steps are under way in
            a pipeline than the smallest grant of its stages.
        kv_tokens: positions of KV cache that the memory it really has leaves room for.
        trials: if they were ordered, and there was time for them.
    """

    epoch: Count
    credits: Annotated[int, Meta(ge=1, le=64)]
    load_s: Seconds
    weight_bytes: Count
    kv_tokens: Count
    trials: Annotated[tuple[StageTrial, ...], Meta(max_length=MAX_TRIALS)] = ()


class StageFailed(Message, frozen=True, kw_only=True, tag="stage_failed"):
    """Worker -> coordinator: the layers of `epoch` cannot be served, and why."""

    epoch: Count
    code: Label
    message: Text


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
