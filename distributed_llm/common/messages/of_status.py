"""What a coordinator knows of its cluster: the values inside `StatusReport`.

Times are in seconds and ages: "ago" as seen when the status was made. Counters only grow, and
begin at 0 when the coordinator starts.
"""

from typing import Annotated, Literal

from msgspec import Meta, field

from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages.base import (
    MAX_STAGES,
    Capabilities,
    FetchProgress,
    Label,
    Name,
    Text,
    Value,
)
from distributed_llm.common.types import Count, Epoch, LayerRange, Seconds
from distributed_llm.common.weight_forms import Quantize

MAX_BOUNDS = 32
"""Bounds of one histogram at most."""

_BytesPerS = Annotated[float, Meta(ge=0, le=1e16)]
_Rate = Annotated[float, Meta(ge=0, le=1e15)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class EventStatus(Value, frozen=True, kw_only=True):
    """One of the latest events of the cluster.

    Attributes:
        number: counts all events from 1; what happens again gets a new one.
        kind: one of a closed set, such as "worker_joined" or "move_committed".
        text: what happened, for people.
        times: how often it happened.
        age_s: since it happened last.
        worker: the worker that it is about; empty if it is about none.
        epoch: of the plan that it is about; 0 if it is about none.
    """

    number: Count
    kind: Label
    level: Literal["info", "warning", "error"]
    text: Text
    times: Count = 1
    age_s: Seconds
    worker: Label = ""
    epoch: Epoch


class HeldLayers(Value, frozen=True, kw_only=True):
    """A worker, and the layers that it has or is to have."""

    worker: Name
    layers: LayerRange


LayersOfAll = Annotated[tuple[HeldLayers, ...], Meta(max_length=4096)]
"""A layer map: every layer once, in their order."""


class StageStatus(Value, frozen=True, kw_only=True):
    """One stage of a pipeline.

    The times are means over the latest steps that only decode; None before the first.

    Attributes:
        ready: whether it has loaded its layers.
        step_s: for which it computes a step.
        predicted_s: what was expected of the same steps before each was seen; None if nothing was.
        queued_s: for which a step waits at it.
        compute_s: for which it has computed in all, for this plan.
    """

    worker: Name
    layers: LayerRange
    ready: bool
    step_s: Seconds | None = None
    predicted_s: Seconds | None = None
    queued_s: Seconds | None = None
    compute_s: Seconds = 0.0


class LinkStatus(Value, frozen=True, kw_only=True):
    """How results get from a stage to the next one.

    Attributes:
        how: "direct", "relayed" by the coordinator, or "" if the sender has not reported.
        latency_s: one way, as measured; None if it was not.
        bytes_per_s: bandwidth as measured; None if it was not.
        bytes_sent: activations that have crossed it in steps that were completed, for this plan.
    """

    sender: Name
    receiver: Name
    how: Literal["direct", "relayed", ""]
    latency_s: Seconds | None = None
    bytes_per_s: _BytesPerS | None = None
    bytes_sent: Count = 0


class MoveStatus(Value, frozen=True, kw_only=True):
    """A move of layers that is under way: one pipeline becomes another.

    Attributes:
        epoch: of the plan that it leads to.
        phase: "loading", "copying", "finishing steps" or "handover"; requests stand still in the
            last two.
        why: what it is for, for people.
        before: the layers of the pipeline that serves.
        after: those of the plan that it leads to.
        copies: whether KV cache goes along; otherwise it is computed again.
        standstill_s: price: how long requests are expected to stand still, or as much time as they
            lose by being slower.
        copy_s: how long copying KV cache should take.
        bytes_sent: KV cache that was copied so far.
        age_s: since it began.
        phase_age_s: since its phase began.
    """

    epoch: Epoch
    phase: Label
    why: Text
    before: LayersOfAll
    after: LayersOfAll
    copies: bool
    standstill_s: Seconds
    copy_s: Seconds
    bytes_sent: Count = 0
    age_s: Seconds
    phase_age_s: Seconds


class ForecastStatus(Value, frozen=True, kw_only=True):
    """How fast a pipeline is expected to be, by the latest search for a better plan.

    Attributes:
        tokens_per_s: tokens of answers under what is asked of it now, or is expected before that.
        full_tokens_per_s: with as many requests as keep all its stages busy.
        alone_tokens_per_s: with a single request.
        better: the best plan that was found for these and idle workers, if it is another one.
        better_tokens_per_s: rate of that plan, as `tokens_per_s`.
    """

    tokens_per_s: _Rate
    full_tokens_per_s: _Rate
    alone_tokens_per_s: _Rate
    better: LayersOfAll = ()
    better_tokens_per_s: _Rate | None = None


class PipelineStatus(Value, frozen=True, kw_only=True):
    """Stages that serve the whole model together.

    Attributes:
        epoch: of its plan.
        quantize: what floating-point weights became while they were loaded.
        disk_bytes: of weights that do not fit into memory, and are read in every step.
        ram_bytes: of weights that do not fit on GPUs, and are copied there in every step.
        kv_dtype: how keys and values are kept.
        memory: form of its weights in memory ("int4 (groups of 32) and int8"); empty if unknown.
        exact: whether these are the numbers of the files, but for rounding to the dtype.
        lineage: stays the same when layers move and a pipeline of a newer epoch continues it.
        state: "loading", "ready", "serving" or "paused" for a move.
        stages: in the order of the layers.
        links: between neighbours, in the same order; one fewer.
        move: of its layers, if one is under way.
        kv_tokens: positions of KV cache that there is room for.
        kv_tokens_used: positions of them that running answers take.
        kv_tokens_cached: positions of them that prefixes of ended sequences take.
        kv_longest_tokens: positions of the longest answer that has room if it is alone: more than
            `kv_tokens` where layers with a window keep the last positions only.
        most_texts: texts that may be under way at once, where no layer keeps positions, so that
            `kv_tokens` are bytes of room; 0 elsewhere.
        answers_running: answers that run on it.
        answers_decoding: those of them that decode; the others compute their prompts.
        steps_in_flight: steps that are under way now.
        depth: steps that should be, as was last decided.
        round_trip_s: of a step, on average over the latest that only decode; like the following
            None before the first.
        outside_s: the part of it outside of stages and their queues: on links, and to and from the
            coordinator.
        step_tokens: tokens of such a step.
        slowest: index of the stage that computes longest.
        bubble_ratio: share of the stages' time that they were idle lately, while any step was in
            flight; 0 if all computed all the time.
        forecast: None if the strategy searches for no plans, or has not yet.
    """

    epoch: Epoch
    lineage: Epoch
    quantize: Quantize = "none"
    disk_bytes: Count = 0
    ram_bytes: Count = 0
    kv_dtype: KVDtype = "auto"
    memory: Label = ""
    exact: bool = True
    state: Literal["loading", "ready", "serving", "paused"]
    stages: Annotated[tuple[StageStatus, ...], Meta(max_length=MAX_STAGES)]
    links: Annotated[tuple[LinkStatus, ...], Meta(max_length=MAX_STAGES)]
    move: MoveStatus | None = None
    kv_tokens: Count
    kv_tokens_used: Count = 0
    kv_tokens_cached: Count = 0
    kv_longest_tokens: Count = 0
    most_texts: Count = 0
    answers_running: Count = 0
    answers_decoding: Count = 0
    steps_in_flight: Count = 0
    depth: Count = 0
    round_trip_s: Seconds | None = None
    outside_s: Seconds | None = None
    step_tokens: _Rate | None = None
    slowest: Count | None = None
    bubble_ratio: _Share | None = None
    forecast: ForecastStatus | None = None


class Histogram(Value, frozen=True, kw_only=True):
    """How many times were how long.

    Attributes:
        bounds_s: upper bounds of the buckets, included, in ascending order.
        counts: times in each bucket, and at last those above all bounds; not cumulative.
        sum_s: of all times.
    """

    bounds_s: Annotated[tuple[Seconds, ...], Meta(max_length=MAX_BOUNDS)] = ()
    counts: Annotated[tuple[Count, ...], Meta(max_length=MAX_BOUNDS + 1)] = ()
    sum_s: Annotated[float, Meta(ge=0, le=1e15)] = 0.0


class Latencies(Value, frozen=True, kw_only=True):
    """How long requests took, of all clients.

    Attributes:
        queue: from the arrival of a request until an answer was first admitted.
        first_token: from the arrival of a request until the first token of an answer.
        between_tokens: from each token of an answer to the next.
        whole: from the arrival of a request until its last answer was complete; only of requests
            that finished.
    """

    queue: Histogram = Histogram()
    first_token: Histogram = Histogram()
    between_tokens: Histogram = Histogram()
    whole: Histogram = Histogram()


Tally = dict[Label, Count]
"""Counts by a reason; the reasons are a closed set."""


class Counters(Value, frozen=True, kw_only=True):
    """What has happened since the coordinator started; beside the counters of `ClusterStatus`.

    Attributes:
        uptime_s: since it started.
        failures: requests that ended with an error, by its code.
        prompt_tokens: tokens of the prompts of accepted requests.
        prefix_query_tokens: tokens that were looked up among prefixes; `prefix_hit_tokens` of
            them were found.
        steps: steps that were completed.
        prompt_steps: those of them with parts of prompts.
        activation_bytes: activations that went from stage to stage in them.
        retries: answers whose step was lost, by why: "step_failed" on a worker, "step_lost" with
            a worker; "steps_stuck" counts how often all steps of a pipeline were given up.
        recovered: answers that were computed again because their pipeline ended, or moved without
            its KV cache.
        replans: plans that were made and loaded, by why: "recovery", "anew", "another".
        moves_begun: moves that were begun, by why: "faster" or "leaving".
        moves_undone: moves that were undone.
        moved_bytes: KV cache that was copied in moves, by why.
        events: events of the cluster and of requests, by their kind.
    """

    uptime_s: Seconds = 0.0
    failures: Tally = field(default_factory=dict)
    prompt_tokens: Count = 0
    prefix_query_tokens: Count = 0
    steps: Count = 0
    prompt_steps: Count = 0
    activation_bytes: Count = 0
    retries: Tally = field(default_factory=dict)
    recovered: Count = 0
    replans: Tally = field(default_factory=dict)
    moves_begun: Tally = field(default_factory=dict)
    moves_undone: Count = 0
    moved_bytes: Tally = field(default_factory=dict)
    events: Tally = field(default_factory=dict)


class WorkerStatus(Value, frozen=True, kw_only=True):
    """One worker, as the coordinator sees it.

    Attributes:
        state: "idle" (no layers), "loading", "serving", "leaving" or "unfit" (see `note`).
        layers: the layers that it serves or loads.
        next_layers: the layers that it loads to serve instead, or None.
        link: how its results reach the next stage: "direct", "relayed" by the coordinator, or "" if
            there is no next stage or it has not reported.
        seconds_per_token: measured time of its stage per decoded token; None before the first.
        prediction_error: median of |predicted - measured| / measured over its latest tasks; None
            if it is not known.
        gain: throughput of the cluster with this worker over that without it, minus 1; None if it
            is not known, or if nothing can be served without it.
        advice: what the gain means, for people; empty if it is not known.
        last_heard_s: time since its last message.
        kv_used_bytes: KV cache of its stage that running answers and prefixes take.
        kv_room_bytes: KV cache that its stage may grow to.
        progress_age_s: since its tasks made progress, by its last heartbeat; 0 without tasks.
        load_bytes_per_s: at which it loaded weights from its disk last; None if not measured.
        fetch: how far the weights that it loads have arrived; None if it needs none from others.
        kernels: by what its GPU multiplies weights of integers, for people; empty if there are none
            there.
    """

    name: Name
    state: Literal["idle", "loading", "serving", "leaving", "unfit"]
    note: Text
    layers: LayerRange | None
    next_layers: LayerRange | None
    epoch: Epoch
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
    kv_used_bytes: Count = 0
    kv_room_bytes: Count = 0
    progress_age_s: Seconds = 0.0
    load_bytes_per_s: _BytesPerS | None = None
    fetch: FetchProgress | None = None
    kernels: Text = ""


class ClusterStatus(Value, frozen=True, kw_only=True):
    """The whole cluster, as the coordinator sees it. It travels as msgpack in a tensor frame.

    Attributes:
        state: "waiting" (for workers, see `note`), "loading" or "serving".
        files: format of the weights in the files ("GPTQ (4 bits, groups of 128)"); empty if
            unknown.
        epoch: epoch of the newest plan that is served or loaded; 0 before the first.
        encoder_layers: how many of the layers, the first, are an encoder's.
        kv_tokens: positions of KV cache that all pipelines have room for.
        kv_tokens_used: positions of them that running answers take.
        kv_tokens_cached: positions of them that prefixes of ended sequences take.
        most_texts: texts that may be under way at once, where no layer keeps positions, so that
            `kv_tokens` are bytes of room; 0 elsewhere.
        prefix_hit_tokens: positions that were shared with another sequence instead of computed.
        preemptions: how often a running answer gave up its KV cache to an older one.
        moves: how often layers have moved between workers while the model was served.
        move_stall_s: how long answers stood still in the latest move; 0 if none ran meanwhile.
        answers_running: answers that run on a pipeline.
        answers_waiting: answers that wait for one.
        requests_finished: requests that were answered completely.
        requests_cancelled: requests that their clients cancelled, or whose clients are gone.
        requests_failed: requests that ended with an error, refused ones included.
        rejected: number of messages that were dropped, by reason.
        events: the latest events, oldest first; what happened several times is one of them.
        pipelines: those that load or serve, oldest first.
        counters: what has happened so far.
        latencies: how long requests took.
        insecure: no keys are used: whoever reaches the port may do everything.
        quarantined: names of the machines that broke the protocol, and may not connect for now.
    """

    model: str
    state: Literal["waiting", "loading", "serving"]
    note: str
    epoch: Epoch
    num_layers: Count
    encoder_layers: Count = 0
    context_length: Count
    kv_tokens: Count
    kv_tokens_used: Count
    kv_tokens_cached: Count
    prefix_hit_tokens: Count
    preemptions: Count
    moves: Count
    move_stall_s: Seconds
    answers_running: Count
    answers_waiting: Count
    requests_finished: Count
    requests_cancelled: Count
    requests_failed: Count
    tokens_generated: Count
    rejected: dict[str, Count]
    workers: tuple[WorkerStatus, ...]
    events: Annotated[tuple[EventStatus, ...], Meta(max_length=256)]
    pipelines: tuple[PipelineStatus, ...] = ()
    counters: Counters = Counters()
    latencies: Latencies = Latencies()
    insecure: bool = False
    quarantined: tuple[Name, ...] = ()
    files: Label = ""
    most_texts: Count = 0
