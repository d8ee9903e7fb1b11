"""Reporting: the cluster as it is now, for those who ask. Pure; changes nothing.

It is asked every second by several readers, so a status costs no more than to write down what is
known: nothing is planned or predicted for it.
"""

from collections.abc import Mapping
from enum import Enum
from itertools import pairwise
from typing import Literal

from distributed_llm.common.messages import (
    ClusterStatus,
    Counters,
    EventStatus,
    ForecastStatus,
    HeldLayers,
    LinkStatus,
    MoveStatus,
    PipelineStatus,
    StageStatus,
    WorkerStatus,
)
from distributed_llm.common.types import NO_EPOCH
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.move import Move
from distributed_llm.coordinator.cluster.moves import Moves
from distributed_llm.coordinator.cluster.rebalancing import Rebalancing
from distributed_llm.coordinator.cluster.replanning import Replanning
from distributed_llm.coordinator.cluster.worker import Worker, WorkerState
from distributed_llm.coordinator.plan import LayerMap, PipelineStage
from distributed_llm.coordinator.planning.advice import Advice
from distributed_llm.coordinator.serving.event_log import Entry, EventKind
from distributed_llm.coordinator.serving.pipeline import Pipeline, PipelineState
from distributed_llm.coordinator.trust.access import Access

_STATES: Mapping[PipelineState, Literal["loading", "ready", "serving", "paused"]] = {
    PipelineState.LOADING: "loading",
    PipelineState.READY: "ready",
    PipelineState.SERVING: "serving",
    PipelineState.PAUSED: "paused",
}

_RETRIES = (EventKind.STEP_FAILED, EventKind.STEP_LOST, EventKind.STEPS_STUCK)


class Reporting:
    """Makes the status of one cluster.

    Attributes:
        started_at: when the coordinator started, clock seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        replanning: Replanning,
        moves: Moves,
        rebalancing: Rebalancing,
        access: Access,
    ) -> None:
        self._cluster = cluster
        self._registry = cluster.registry
        self._pipelines = cluster.pipelines
        self._book = cluster.book
        self._event_log = cluster.event_log
        self._replanning = replanning
        self._moves = moves
        self._rebalancing = rebalancing
        self._access = access
        self.started_at = 0.0

    def status(self, *, now: float) -> ClusterStatus:
        """Return the cluster as it is now."""
        pipelines = {
            pipeline.epoch: self._pipeline(pipeline, now) for pipeline in self._pipelines.all
        }
        totals = self._book.totals
        advice = self._rebalancing.advice
        return ClusterStatus(
            model=self._cluster.model.name,
            state=self._pipelines.state,
            note=self.note(now=now),
            epoch=self._pipelines.epoch,
            num_layers=self._cluster.model.cost.num_layers,
            encoder_layers=self._cluster.model.cost.encoder_layers,
            context_length=self._cluster.model.defaults.context_length,
            kv_tokens=sum(each.kv_tokens for each in pipelines.values()),
            kv_tokens_used=sum(each.kv_tokens_used for each in pipelines.values()),
            kv_tokens_cached=sum(each.kv_tokens_cached for each in pipelines.values()),
            most_texts=sum(each.most_texts for each in pipelines.values()),
            prefix_hit_tokens=totals.prefix_hit_tokens,
            preemptions=totals.preemptions,
            moves=self._moves.num_moves,
            move_stall_s=self._moves.stall_s,
            answers_running=self._book.num_running,
            answers_waiting=self._book.num_waiting,
            requests_finished=totals.finished,
            requests_cancelled=totals.cancelled,
            requests_failed=totals.failed,
            tokens_generated=totals.tokens,
            rejected=dict(self._event_log.rejected),
            workers=tuple(
                self._worker(worker, pipelines.get(worker.epoch), advice.get(worker.id), now)
                for worker in self._registry.workers
            ),
            events=tuple(_event(entry, now) for entry in self._event_log.entries),
            pipelines=tuple(pipelines.values()),
            counters=self._counters(now),
            latencies=totals.times.latencies,
            insecure=self._access.members is None,
            quarantined=self._access.quarantined(now=now),
            files=next((one.files for one in self._cluster.model.formats.values()), ""),
        )

    def note(self, *, now: float) -> str:
        """Return why nothing is served, and when a worker that failed is tried again."""
        note = self._pipelines.note
        unfit = [worker for worker in self._registry.workers if worker.state is WorkerState.UNFIT]
        if not note or not unfit:
            return note
        first = min(unfit, key=lambda worker: worker.fit_at)
        when = first.pause_text(now=now)
        return f"{note[:3900]} Worker {first.id} is tried again {when}."

    # -------------------------------------------------------------- workers

    def _worker(
        self, worker: Worker, pipeline: PipelineStatus | None, advice: Advice | None, now: float
    ) -> WorkerStatus:
        used_bytes = room_bytes = 0
        if pipeline and worker.layers:
            token_bytes = self._cluster.model.cost.kv_bytes(worker.layers)
            used_bytes = token_bytes * (pipeline.kv_tokens_used + pipeline.kv_tokens_cached)
            room_bytes = token_bytes * pipeline.kv_tokens
        return worker.status(
            next_layers=self._moves.next_layers(worker),
            prediction_error=self._cluster.measurements.error(worker.id),
            gain=advice.gain if advice else None,
            advice=advice.text if advice else "",
            kv_used_bytes=used_bytes,
            kv_room_bytes=room_bytes,
            now=now,
        )

    # -------------------------------------------------------------- pipelines

    def _pipeline(self, pipeline: Pipeline, now: float) -> PipelineStatus:
        scheduler, in_flight, meter = pipeline.scheduler, pipeline.in_flight, pipeline.meter
        move = self._moves.move
        formats = self._cluster.model.formats.get(pipeline.quantize)
        return PipelineStatus(
            epoch=pipeline.epoch,
            lineage=pipeline.lineage,
            quantize=pipeline.quantize,
            disk_bytes=pipeline.disk_bytes,
            ram_bytes=pipeline.ram_bytes,
            kv_dtype=self._cluster.model.kv_dtype,
            memory=formats.memory if formats else "",
            exact=formats.exact if formats else True,
            state=_STATES[pipeline.state],
            stages=tuple(
                StageStatus(
                    worker=stage.worker,
                    layers=stage.layers,
                    ready=not pipeline.awaits(stage.peer),
                    step_s=meter.step_s[at] if meter.step_s else None,
                    predicted_s=meter.predicted_s[at],
                    queued_s=meter.queued_s[at] if meter.queued_s else None,
                    compute_s=meter.compute_s[at],
                )
                for at, stage in enumerate(pipeline.stages)
            ),
            links=tuple(
                self._link(pipeline, sender, receiver, meter.tokens[at], meter.source_tokens[at])
                for at, (sender, receiver) in enumerate(pairwise(pipeline.stages))
            ),
            move=_move(move, now) if move and move.old is pipeline else None,
            kv_tokens=pipeline.kv_tokens,
            kv_tokens_used=scheduler.kv_tokens_used if scheduler else 0,
            kv_tokens_cached=scheduler.kv_tokens_cached if scheduler else 0,
            kv_longest_tokens=min(
                pipeline.longest_tokens, self._cluster.model.defaults.context_length
            ),
            most_texts=pipeline.most_texts,
            answers_running=pipeline.num_running,
            answers_decoding=scheduler.num_decoding if scheduler else 0,
            steps_in_flight=in_flight.num_steps if in_flight else 0,
            depth=pipeline.depth,
            round_trip_s=meter.round_trip_s,
            outside_s=meter.outside_s,
            step_tokens=meter.step_tokens,
            slowest=meter.slowest,
            bubble_ratio=meter.bubble_ratio,
            forecast=self._forecast(pipeline),
        )

    def _link(
        self,
        pipeline: Pipeline,
        sender: PipelineStage,
        receiver: PipelineStage,
        tokens: int,
        source_tokens: int,
    ) -> LinkStatus:
        model = self._cluster.model
        bytes_sent = (tokens - source_tokens) * model.activation_bytes
        measured = self._cluster.measurements.link(sender.worker, receiver.worker)
        latency_s, bytes_per_s = measured or (None, None)
        return LinkStatus(
            sender=sender.worker,
            receiver=receiver.worker,
            how=pipeline.link_of(sender.peer),
            latency_s=latency_s,
            bytes_per_s=bytes_per_s,
            bytes_sent=bytes_sent + source_tokens * model.source_bytes,
        )

    def _forecast(self, pipeline: Pipeline) -> ForecastStatus | None:
        forecasts = self._rebalancing.forecasts(pipeline)
        if forecasts is None:
            return None
        served, better = forecasts
        return ForecastStatus(
            tokens_per_s=served.tokens_per_s,
            full_tokens_per_s=served.full_tokens_per_s,
            alone_tokens_per_s=served.alone_tokens_per_s,
            better=_held(better.layer_map) if better else (),
            better_tokens_per_s=better.tokens_per_s if better else None,
        )

    # -------------------------------------------------------------- counters

    def _counters(self, now: float) -> Counters:
        totals, counts = self._book.totals, self._event_log.counts
        return Counters(
            uptime_s=max(0.0, now - self.started_at),
            failures=dict(totals.failures),
            prompt_tokens=totals.prompt_tokens,
            prefix_query_tokens=totals.prefix_query_tokens,
            steps=totals.steps,
            prompt_steps=totals.prompt_steps,
            activation_bytes=totals.activation_bytes,
            retries={_name(kind): counts[kind] for kind in _RETRIES},
            recovered=totals.recovered,
            replans={_name(need): count for need, count in self._replanning.counts.items()},
            moves_begun=dict(self._moves.begun),
            moves_undone=counts[EventKind.MOVE_UNDONE],
            moved_bytes=dict(self._moves.copied_bytes),
            events={_name(kind): count for kind, count in counts.items()},
        )


def _event(entry: Entry, now: float) -> EventStatus:
    return EventStatus(
        number=entry.number,
        kind=_name(entry.kind),
        level=entry.kind.level,
        text=entry.text,
        times=entry.times,
        age_s=max(0.0, now - entry.at),
        worker=entry.worker or "",
        epoch=entry.epoch or NO_EPOCH,
    )


def _move(move: Move, now: float) -> MoveStatus:
    return MoveStatus(
        epoch=move.new.epoch,
        phase=move.state.value,
        why=move.why,
        before=_held(move.old.layer_map),
        after=_held(move.new.layer_map),
        copies=move.copies,
        standstill_s=move.price.standstill_s,
        copy_s=move.price.copy_s,
        bytes_sent=move.copied_bytes,
        age_s=max(0.0, now - move.began_at),
        phase_age_s=max(0.0, now - move.state_at),
    )


def _held(layer_map: LayerMap) -> tuple[HeldLayers, ...]:
    return tuple(HeldLayers(worker=worker, layers=layers) for worker, layers in layer_map)


def _name(member: Enum) -> str:
    """Return how a member of a closed set is called outside."""
    return member.name.lower()
