"""Tracing: what each step did for the answers whose requests ask for it. Pure.

Everything comes from what is measured anyway: nothing is asked of workers for a trace, and a step
without such an answer costs only to see that.
"""

from distributed_llm.common.messages import StageHop, StepTrace
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.steps import StepDone

_TOKEN_ID_BYTES = 4


def trace_step(cluster: Cluster, pipeline: Pipeline, done: StepDone, *, now: float) -> None:
    """Keep what a step did, for each answer in it that is traced.

    Call this before the answers get their tokens, and after the scheduler has completed the step.
    """
    step = done.step
    traced = [
        (answer, part)
        for answer, part in zip(step.answers, step.slices, strict=True)
        if answer.request.params.trace and answer.sequence_id == part.sequence_id
    ]
    if not traced:
        return
    inside_us = sum(timing.compute_us + timing.queued_us for timing in done.timings)
    outside_s = max(0.0, done.round_trip_s - inside_us / 1e6)
    hops = _hops(cluster, pipeline, done)
    for answer, part in traced:
        began_s = now - done.round_trip_s - answer.request.arrived_at
        answer.trace.append(
            StepTrace(
                index=answer.num_new_tokens,
                sampled=part.sample,
                epoch=pipeline.epoch,
                start=part.start,
                tokens=part.num_tokens,
                step_tokens=len(step.token_ids),
                step_sequences=len(step.slices),
                began_s=max(0.0, began_s),
                took_s=done.round_trip_s,
                outside_s=outside_s,
                hops=hops,
            )
        )


def _hops(cluster: Cluster, pipeline: Pipeline, done: StepDone) -> tuple[StageHop, ...]:
    tokens, model = len(done.step.token_ids), cluster.model
    each_bytes = model.source_bytes if done.step.is_source else model.activation_bytes
    hops, before = [], None
    for stage, timing in zip(pipeline.stages[done.first :], done.timings, strict=True):
        item_bytes = _TOKEN_ID_BYTES if before is None else each_bytes
        bytes_in = tokens * item_bytes
        hops.append(
            StageHop(
                worker=stage.worker,
                layers=stage.layers,
                bytes_in=bytes_in,
                link_s=_link_s(cluster, before, stage, bytes_in),
                queued_s=timing.queued_us / 1e6,
                compute_s=timing.compute_us / 1e6,
            )
        )
        before = stage.worker
    return tuple(hops)


def _link_s(
    cluster: Cluster, sender: WorkerId | None, receiver: PipelineStage, size_bytes: int
) -> float | None:
    """Return how long so many bytes take on a link by what was measured of it, if it was."""
    link = None if sender is None else cluster.measurements.link(sender, receiver.worker)
    if link is None:
        return None
    latency_s, bytes_per_s = link
    return latency_s + size_bytes / bytes_per_s
