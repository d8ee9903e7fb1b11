"""The status of a cluster as Prometheus's metrics. Pure.

Names are those of vLLM with `dllm_` in place of `vllm:` wherever it has the same, so that what was
made for it needs another prefix only. Workers, reasons and the model that is served are labels;
nothing that clients choose is.
"""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from distributed_llm.common.messages import (
    ClusterStatus,
    Histogram,
    PipelineStatus,
    WorkerStatus,
)

_STATES = ("waiting", "loading", "serving")

_LATE = ("stale_epoch",)
"""Reasons for which messages are dropped that came too late."""

_NOT_LET_IN = ("not_allowed", "quarantined")


def families(status: ClusterStatus | None) -> Iterator[Metric]:
    """Yield the metrics of a cluster.

    Args:
        status: None if there is no coordinator; then only that is told.
    """
    yield _gauge("coordinator_up", "Whether the coordinator answers.", float(status is not None))
    if status is None:
        return
    yield from _requests(status)
    yield from _latencies(status)
    yield from _cache(status)
    yield from _plan(status)
    yield from _recovery(status)
    yield from _workers(status.workers, status.pipelines)
    yield from _pipelines(status.pipelines)


def _requests(status: ClusterStatus) -> Iterator[Metric]:
    counters = status.counters
    model = {"model_name": status.model}
    running, waiting = status.answers_running, status.answers_waiting
    yield _gauge("num_requests_running", "Answers that run on a pipeline.", running, model)
    yield _gauge("num_requests_waiting", "Answers that wait for a pipeline.", waiting, model)
    yield _gauge("queue_depth", "Answers that wait for a pipeline.", waiting)
    yield _counter("prompt_tokens", "Tokens of prompts.", counters.prompt_tokens, model)
    yield _counter("generation_tokens", "Tokens of answers.", status.tokens_generated, model)
    yield _counter("num_preemptions", "Answers that gave up KV cache.", status.preemptions, model)
    yield _by(
        "requests_total",
        "Requests of all clients that ended, by how.",
        "outcome",
        {
            "finished": status.requests_finished,
            "cancelled": status.requests_cancelled,
            "failed": status.requests_failed,
        },
    )
    yield _by("request_failures_total", "Failed requests.", "code", counters.failures)


def _latencies(status: ClusterStatus) -> Iterator[Metric]:
    every = status.latencies
    model = {"model_name": status.model}
    yield _histogram(
        "time_to_first_token_seconds", "From arrival to the first token.", every.first_token, model
    )
    yield _histogram(
        "inter_token_latency_seconds", "From token to token.", every.between_tokens, model
    )
    yield _histogram("request_queue_time_seconds", "From arrival to admission.", every.queue, model)
    yield _histogram(
        "e2e_request_latency_seconds", "From arrival to the last token.", every.whole, model
    )


def _cache(status: ClusterStatus) -> Iterator[Metric]:
    model = {"model_name": status.model}
    used = status.kv_tokens_used / status.kv_tokens if status.kv_tokens else 0.0
    yield _gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", used, model)
    if status.most_texts:  # no layer keeps positions: the room is for states, in bytes
        yield _gauge("state_bytes", "Room for the states of texts.", status.kv_tokens)
        yield _gauge("most_texts", "Texts that may be under way at once.", status.most_texts)
    else:
        yield _gauge("kv_cache_tokens", "Positions of KV cache.", status.kv_tokens)
        cached = status.kv_tokens_cached
        yield _gauge("kv_cache_prefix_tokens", "Positions that ended sequences keep.", cached)
    queries, hits = status.counters.prefix_query_tokens, status.prefix_hit_tokens
    yield _counter("prefix_cache_queries", "Tokens looked up among prefixes.", queries, model)
    yield _counter("prefix_cache_hits", "Tokens found among prefixes.", hits, model)


def _plan(status: ClusterStatus) -> Iterator[Metric]:
    counters = status.counters
    yield _by(
        "cluster_state",
        "1 for the state that the cluster is in.",
        "state",
        {state: float(state == status.state) for state in _STATES},
    )
    yield _gauge("plan_version", "Epoch of the newest plan.", status.epoch)
    yield _gauge("uptime_seconds", "Since the coordinator started.", counters.uptime_s)
    yield _by("replans_total", "Plans that were loaded.", "reason", counters.replans)
    yield _by("moves_begun_total", "Moves of layers begun.", "reason", counters.moves_begun)
    yield _counter("moves", "Moves of layers that were completed.", status.moves)
    yield _counter("moves_undone", "Moves of layers that were undone.", counters.moves_undone)
    yield _by("moved_bytes_total", "KV cache copied in moves.", "reason", counters.moved_bytes)
    yield _gauge("move_stall_seconds", "How long the last move took.", status.move_stall_s)
    yield _by("events_total", "Events of the cluster.", "kind", counters.events)


def _recovery(status: ClusterStatus) -> Iterator[Metric]:
    counters = status.counters
    late = sum(status.rejected.get(reason, 0) for reason in _LATE)
    refused = sum(status.rejected.get(reason, 0) for reason in _NOT_LET_IN)
    yield _by("task_retries_total", "Answers whose step was lost.", "reason", counters.retries)
    yield _counter("requests_recovered", "Answers computed again.", counters.recovered)
    yield _counter("late_results", "Results that nobody waited for any more.", late)
    yield _by("rejected_total", "Messages that were dropped.", "reason", status.rejected)
    yield _counter("auth_failures", "Messages of those who may not send them.", refused)
    yield _gauge("quarantined_machines", "Machines in quarantine.", len(status.quarantined))


def _workers(
    workers: Iterable[WorkerStatus], pipelines: Iterable[PipelineStatus]
) -> Iterator[Metric]:
    up = _empty_gauge("worker_up", "1 for workers that can serve, 0 for others.", "worker")
    layers = _empty_gauge("worker_layers", "Layers that a worker has.", "worker")
    progress = _empty_gauge("worker_last_progress_seconds", "Since its tasks went on.", "worker")
    heard = _empty_gauge("worker_last_heard_seconds", "Since its last message.", "worker")
    memory = _empty_gauge("worker_memory_bytes", "Memory of a worker, by use.", "worker", "use")
    error = _empty_gauge("worker_prediction_error", "Median error of predictions.", "worker")
    gain = _empty_gauge("worker_gain_ratio", "Throughput that it adds, as a share.", "worker")
    tasks = _empty_counter("worker_tasks", "Tasks that it has done.", "worker")
    compute = _empty_counter("worker_compute_seconds", "For which it has computed.", "worker")
    for one in workers:
        name = [one.name]
        up.add_metric(name, float(one.state != "unfit"))
        layers.add_metric(name, len(one.layers) if one.layers else 0)
        progress.add_metric(name, one.progress_age_s)
        heard.add_metric(name, one.last_heard_s)
        memory.add_metric([one.name, "room"], one.capabilities.memory_bytes)
        memory.add_metric([one.name, "used"], one.memory_used_bytes)
        memory.add_metric([one.name, "weights"], one.weight_bytes)
        memory.add_metric([one.name, "kv"], one.kv_bytes)
        tasks.add_metric(name, one.tasks_done)
        compute.add_metric(name, one.compute_s)
        if one.prediction_error is not None:
            error.add_metric(name, one.prediction_error)
        if one.gain is not None:
            gain.add_metric(name, one.gain)
    yield from (up, layers, progress, heard, memory, error, gain, tasks, compute)
    yield _steps(pipelines)


def _steps(pipelines: Iterable[PipelineStatus]) -> Metric:
    steps = _empty_gauge(
        "worker_step_seconds", "Time of a decoding step at a worker.", "worker", "phase"
    )
    for stage in (stage for pipeline in _served(pipelines) for stage in pipeline.stages):
        for phase, seconds in (
            ("compute", stage.step_s),
            ("queue", stage.queued_s),
            ("predicted", stage.predicted_s),
        ):
            if seconds is not None:
                steps.add_metric([stage.worker, phase], seconds)
    return steps


def _pipelines(pipelines: Iterable[PipelineStatus]) -> Iterator[Metric]:
    ends = ("sender", "receiver")
    rtt = _empty_gauge("link_rtt_seconds", "There and back on a link between stages.", *ends)
    rate = _empty_gauge("link_bytes_per_second", "Bandwidth of a link, as measured.", *ends)
    direct = _empty_gauge("link_direct", "1 for links without the coordinator between.", *ends)
    sent = _empty_counter("link_bytes", "Activations that crossed a link.", *ends, "direction")
    bubble = _empty_gauge("pipeline_bubble_ratio", "Share of time in which stages idle.", "lineage")
    trip = _empty_gauge("pipeline_round_trip_seconds", "Of a decoding step.", "lineage")
    outside = _empty_gauge("pipeline_outside_seconds", "Of it, outside of stages.", "lineage")
    flying = _empty_gauge("pipeline_steps_in_flight", "Steps under way.", "lineage")
    for pipeline in _served(pipelines):
        for link in pipeline.links:
            both = [link.sender, link.receiver]
            if link.latency_s is not None:
                rtt.add_metric(both, 2 * link.latency_s)
            if link.bytes_per_s is not None:
                rate.add_metric(both, link.bytes_per_s)
            direct.add_metric(both, float(link.how == "direct"))
            sent.add_metric([*both, "forward"], link.bytes_sent)
        lineage = [str(pipeline.lineage)]
        flying.add_metric(lineage, pipeline.steps_in_flight)
        if pipeline.bubble_ratio is not None:
            bubble.add_metric(lineage, pipeline.bubble_ratio)
        if pipeline.round_trip_s is not None:
            trip.add_metric(lineage, pipeline.round_trip_s)
        if pipeline.outside_s is not None:
            outside.add_metric(lineage, pipeline.outside_s)
    yield from (rtt, rate, direct, sent, bubble, trip, outside, flying)


def _served(pipelines: Iterable[PipelineStatus]) -> list[PipelineStatus]:
    """Return one pipeline of each lineage: not what only loads, to take its place."""
    return list({one.lineage: one for one in pipelines if one.state != "loading"}.values())


def _empty_gauge(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dllm_{name}", about, labels=labels)


def _empty_counter(name: str, about: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"dllm_{name}", about, labels=labels)


def _gauge(
    name: str, about: str, value: float, labels: Mapping[str, str] | None = None
) -> GaugeMetricFamily:
    family = _empty_gauge(name, about, *(labels or ()))
    family.add_metric([*(labels or {}).values()], value)
    return family


def _counter(
    name: str, about: str, value: float, labels: Mapping[str, str] | None = None
) -> CounterMetricFamily:
    family = _empty_counter(name, about, *(labels or ()))
    family.add_metric([*(labels or {}).values()], value)
    return family


def _by(name: str, about: str, label: str, values: Mapping[str, float]) -> Metric:
    """Return a metric with one label; a counter if its name says so."""
    make = _empty_counter if name.endswith("_total") else _empty_gauge
    family = make(name.removesuffix("_total"), about, label)
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _histogram(
    name: str, about: str, times: Histogram, labels: Mapping[str, str]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"dllm_{name}", about, labels=[*labels])
    buckets, total = [], 0
    for bound, count in zip((*times.bounds_s, "+Inf"), times.counts or (0,), strict=True):
        total += count
        buckets.append((str(bound), float(total)))
    family.add_metric([*labels.values()], buckets, times.sum_s)
    return family
