"""All pipelines of a cluster: who is part of which, how they are loaded and dissolved. Pure.

    waiting --plans--> loading --all stages of one are ready--> serving
       ^                  |                                        |
       '-the last pipeline is dissolved; nobody can hold the model-'

The model may be served by several pipelines, each with workers of its own. Every plan that is
loaded has a larger epoch than all before; answers of an older epoch are dropped. Which plans there
should be is decided in `replanning` and `rebalancing`; how one becomes another while requests run,
in `move`.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Literal

from distributed_llm.common.messages import DropStage, LoadStage, NextStage, StageReady
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import NO_EPOCH, Epoch, PeerId, SequenceId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.common.wording import list_text, room_text
from distributed_llm.coordinator.cluster.kv_transfers import Transfer
from distributed_llm.coordinator.cluster.registry import Registry
from distributed_llm.coordinator.cluster.weight_sources import let_read, sources_of
from distributed_llm.coordinator.cluster.worker import Worker, WorkerState
from distributed_llm.coordinator.events import Action, Send
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.plan import PipelineStage, Plan, PlannedStage, seconds_from
from distributed_llm.coordinator.serving.event_log import EventKind, EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.speeds.measurements import Measurements

ClusterState = Literal["waiting", "loading", "serving"]


class Pipelines:
    """The pipelines of one cluster, and what their workers are told to load.

    Args:
        model: what is served.
        settings: how.
        draw_key: draws the random key of a plan, by which its workers know each other.

    Attributes:
        epoch: of the newest plan; 0 before the first.
        note: why nothing is served, for people.
        last_failure: why a worker stopped to serve its layers, for people; empty once a pipeline
            serves again.
        recovering: while true, a plan for workers that lost theirs is being made.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: CoordinatorSettings,
        registry: Registry,
        book: RequestBook,
        measurements: Measurements,
        event_log: EventLog,
        draw_key: Callable[[], str],
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = registry
        self._book = book
        self._measurements = measurements
        self._event_log = event_log
        self._draw_key = draw_key
        self._by_epoch: dict[Epoch, Pipeline] = {}  # not the one that a move is loading
        self._by_peer: dict[PeerId, Pipeline] = {}
        self._changed: dict[Epoch, Pipeline] = {}
        self._sequence_ids = count(1)
        self.epoch = NO_EPOCH
        self.note = "No worker has joined yet. Start one with `dllm worker`."
        self.last_failure = ""
        self.has_served = False
        self.recovering = False
        self._form: Quantize | None = None  # of the newest plan's weights

    # -------------------------------------------------------------- what there is

    @property
    def all(self) -> list[Pipeline]:
        """Pipelines that load or serve, newest last; not the one that a move is loading."""
        return list(self._by_epoch.values())

    @property
    def loaded(self) -> list[Pipeline]:
        """Those whose stages are loaded, oldest first: they serve, or are paused for a move."""
        return [pipeline for pipeline in self._by_epoch.values() if pipeline.in_flight]

    def pipeline_of(self, peer: PeerId) -> Pipeline | None:
        """Return the pipeline that the worker at `peer` is part of."""
        return self._by_peer.get(peer)

    @property
    def state(self) -> ClusterState:
        """Whether a pipeline serves; if none does, whether one loads or is being planned again."""
        if self.loaded:
            return "serving"
        return "loading" if self._by_epoch or self.recovering else "waiting"

    @property
    def complete(self) -> bool:
        """Whether there are as many pipelines as are wanted."""
        wanted = self._settings.replicas
        return len(self._by_epoch) >= (1 if wanted == "auto" else wanted)

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache in all of them."""
        return sum(pipeline.kv_tokens for pipeline in self._by_epoch.values())

    def take_changed(self) -> Pipeline | None:
        """Return a pipeline that may begin steps or admit requests since it was last asked."""
        return self._changed.popitem()[1] if self._changed else None

    def tell_capacity(self) -> list[Action]:
        """Fail the requests that exceed the room of the largest pipeline; refuse such from now."""
        rooms = [pipeline.longest_tokens for pipeline in self._by_epoch.values()]
        return self._book.set_capacity(max(rooms)) if rooms else []

    # -------------------------------------------------------------- loading and serving

    def load(self, plans: Sequence[Plan]) -> list[Action]:
        """Have idle workers load plans; free layers that nobody needs any more."""
        self.note = ""
        actions = [action for plan in plans for action in self._load(plan)]
        return [*self.drop_unused(), *actions, *self.tell_capacity()]

    def _load(self, plan: Plan) -> list[Action]:
        pipeline = self.new_pipeline(plan)
        self._by_epoch[pipeline.epoch] = pipeline
        self.assign(pipeline)
        note = self._event_log.note(
            EventKind.PLAN_LOADING, epoch=pipeline.epoch, layer_map=pipeline.layer_map
        )
        return [
            *self.load_orders(pipeline, self._draw_key()),
            note,
            *self._tell_form(pipeline),
            *self._tell_offloaded(pipeline),
        ]

    def _tell_form(self, pipeline: Pipeline) -> list[Action]:
        """Say that weights have other bits than before, or fewer because they would not fit."""
        form, before = pipeline.quantize, self._form or pipeline.quantize
        full, self._form = self._model.cost.quantize, form
        log, epoch, nbytes = self._event_log, pipeline.epoch, self._weight_bytes(form)
        if form != before:
            return [
                log.note(
                    EventKind.WEIGHTS_CHANGED,
                    epoch=epoch,
                    form=self._form_text(form),
                    nbytes=nbytes,
                    earlier_form=self._form_text(before),
                    full=self._weight_bytes(before),
                )
            ]
        if form == full or not self._model.may_shrink:
            return []
        kind, full_bytes = EventKind.WEIGHTS_QUANTIZED, self._weight_bytes(full)
        return [log.note(kind, epoch=epoch, form=form, nbytes=nbytes, full=full_bytes)]

    def _weight_bytes(self, form: Quantize) -> int:
        return self._model.cost_at(form).all_weight_bytes

    def _form_text(self, form: Quantize) -> str:
        return self._model.dtype if form == "none" else form

    def _tell_offloaded(self, pipeline: Pipeline) -> list[Action]:
        """Say what is brought to devices in every step, from where, and how long that takes."""
        seconds = {stage.worker: self._seconds_away(stage) for stage in pipeline.plan}
        kinds = (
            (EventKind.LAYERS_IN_RAM, pipeline.ram_bytes),
            (EventKind.LAYERS_ON_DISK, pipeline.disk_bytes),
        )
        notes: list[Action] = []
        for place, (kind, nbytes) in enumerate(kinds):
            times = {worker: taken[place] for worker, taken in seconds.items() if taken[place]}
            if times:
                told, read_s = list_text(times), sum(times.values())
                notes.append(
                    self._event_log.note(
                        kind, epoch=pipeline.epoch, nbytes=nbytes, workers=told, read_s=read_s
                    )
                )
        return notes

    def _seconds_away(self, stage: PlannedStage) -> tuple[float, float]:
        """Return the seconds in which a step copies from memory, and reads from the disk."""
        machines = {worker.id: worker.capabilities for worker in self._registry.workers}
        machine = self._model.planned(machines[stage.worker])
        return (
            seconds_from(stage.ram_bytes, machine.ram_bytes_per_s),
            seconds_from(stage.disk_bytes, machine.disk_bytes_per_s),
        )

    def new_pipeline(self, plan: Plan) -> Pipeline:
        """Return a pipeline for a plan, under the next epoch; nobody is part of it yet."""
        self.epoch = Epoch(self.epoch + 1)
        workers = {worker.id: worker for worker in self._registry.workers}
        return Pipeline(
            self.epoch,
            plan,
            tuple(
                PipelineStage(
                    workers[s.worker].peer,
                    s.worker,
                    s.layers,
                    workers[s.worker].capabilities.shares,
                    sum(self._seconds_away(s)),
                )
                for s in plan
            ),
            self._model,
            self._settings,
            new_sequence_id=lambda: SequenceId(next(self._sequence_ids)),
            on_change=self._note_change,
        )

    def away_s(self, worker: Worker) -> float:
        """Return what a step of a worker is expected to take for weights not on its device."""
        pipeline = self._by_peer.get(worker.peer)
        stages = pipeline.stages if pipeline else ()
        return sum(stage.away_s for stage in stages if stage.peer == worker.peer)

    def assign(self, pipeline: Pipeline) -> None:
        """Give the idle workers of a pipeline its layers."""
        for stage in pipeline.stages:
            if stage.peer not in self._by_peer:
                self._by_peer[stage.peer] = pipeline
                self.worker(stage).assign(stage.layers, epoch=pipeline.epoch)

    def stage_ready(self, worker: Worker, ready: StageReady) -> list[Action]:
        """Record that a worker has loaded its layers; once all of its plan have, serve."""
        pipeline = self._by_peer.get(worker.peer)
        stale = pipeline is None or ready.epoch != pipeline.epoch
        if pipeline is None or stale or worker.state is not WorkerState.LOADING:
            self._event_log.rejected["stale_epoch"] += 1
            return []
        worker.loaded(weight_bytes=ready.weight_bytes)
        assert worker.layers is not None
        worker.learn_load(worker.layers, ready, ready.weight_bytes)
        actions: list[Action] = [
            self._event_log.note(
                EventKind.STAGE_LOADED,
                worker=worker.id,
                epoch=ready.epoch,
                layers=worker.layers,
                load_s=ready.load_s,
            )
        ]
        if pipeline.stage_ready(worker.peer, ready):
            pipeline.serve()
            self.has_served = True
            self.last_failure = ""
            actions += self.tell_capacity()
            actions.append(
                self._event_log.note(
                    EventKind.PLAN_SERVING,
                    epoch=pipeline.epoch,
                    room=room_text(pipeline.kv_tokens, pipeline.most_texts),
                )
            )
        return actions

    # -------------------------------------------------------------- dissolving and committing

    def dissolve(self, pipeline: Pipeline) -> None:
        """End a pipeline: its workers lose their layers, its requests wait for another one."""
        del self._by_epoch[pipeline.epoch]
        self._changed.pop(pipeline.epoch, None)
        self.unassign(pipeline)
        self.requeue(pipeline)

    def unassign(self, pipeline: Pipeline) -> list[Worker]:
        """Take the layers of a pipeline away from its workers; return those that are connected."""
        unassigned = []
        for stage in pipeline.stages:
            if self._by_peer.get(stage.peer) is pipeline:
                del self._by_peer[stage.peer]
                worker = self._registry.worker(stage.peer)
                if worker is not None:
                    worker.unassign()
                    unassigned.append(worker)
        return unassigned

    def requeue(self, pipeline: Pipeline) -> None:
        """Queue the requests of a pipeline for another one; it serves no more."""
        if pipeline.scheduler:
            self._book.collect(pipeline.scheduler)
        self._book.totals.recovered += self._book.requeue(pipeline.dissolve())

    def commit(self, old: Pipeline, new: Pipeline) -> None:
        """Let the new pipeline of a move take the place of the old one.

        Workers of the old one that are not in the new one lose their layers.
        """
        del self._by_epoch[old.epoch]
        self._changed.pop(old.epoch, None)
        self._by_epoch[new.epoch] = new
        new.lineage = old.lineage
        for stage in old.stages:
            del self._by_peer[stage.peer]
        for stage in new.stages:
            self._by_peer[stage.peer] = new
            worker = self.worker(stage)
            worker.commit(
                stage.layers, epoch=new.epoch, weight_bytes=new.weight_bytes_of(stage.peer)
            )
            worker.link = new.link_of(stage.peer)
        for stage in old.stages:
            if stage.peer not in self._by_peer:
                worker = self.worker(stage)
                worker.unassign()
                worker.epoch = NO_EPOCH

    def drop_unused(self) -> list[Action]:
        """Return the messages that free layers which no pipeline needs any more."""
        actions: list[Action] = []
        for worker in self._registry.workers:
            if worker.layers is None and worker.epoch:
                worker.epoch = NO_EPOCH
                actions.append(Send(worker.peer, DropStage(epoch=self.epoch)))
        return actions

    def skip_epoch(self) -> list[Action]:
        """Skip an epoch, so that all late answers are stale; free layers that nobody needs."""
        self.epoch = Epoch(self.epoch + 1)
        return self.drop_unused()

    # -------------------------------------------------------------- what workers are told

    def load_orders(
        self,
        pipeline: Pipeline,
        key: str,
        *,
        beside: Epoch | None = None,
        transfers: Sequence[Transfer] = (),
    ) -> list[Action]:
        """Return the orders to load a pipeline, last stage first.

        A worker that is dialled must know the epoch by then, so it is told before its sender.

        Args:
            key: the secret by which its workers know each other.
            beside: whose layers workers keep and serve meanwhile.
            transfers: KV cache that they will be sent.
        """
        actions: list[Action] = []
        workers = self._registry.workers
        givers: set[str] = set()
        for before, stage, following in zip(
            (None, *pipeline.stages), pipeline.stages, (*pipeline.stages[1:], None), strict=False
        ):
            after = None if following is None else self.worker(following)
            imports = [one for one in transfers if one.receiver.peer == stage.peer]
            sources = sources_of(stage.layers, self.worker(stage), workers)
            givers.update(source.worker for source in sources)
            senders = [*([before] if before else []), *(one.sender for one in imports)]
            planned = next(s for s in pipeline.plan if s.worker == stage.worker)
            machine = self.worker(stage).capabilities
            order = LoadStage(
                epoch=pipeline.epoch,
                source=self._model.source,
                layers=stage.layers,
                dtype=self._model.dtype_on(machine),
                wire_dtype=self._model.wire_dtype,
                quantize=pipeline.quantize,
                kv_dtype=self._model.kv_dtype,
                context_length=self._model.defaults.context_length,
                digest=self._model.digest(stage.layers),
                kv_tokens=planned.kv_tokens,
                workspace_bytes=self._model.workspace_on(machine),
                from_disk=planned.from_disk,
                from_ram=planned.from_ram,
                link_key=key,
                next_stage=None
                if after is None
                else NextStage(worker=after.id, addresses=after.peer_addresses, key=after.key),
                beside=beside,
                trials=self._wants_trials(stage),
                imports=tuple(one.layers for one in imports),
                senders=tuple(dict.fromkeys(self.worker(one).key for one in senders)),
                sources=sources,
            )
            actions.append(Send(stage.peer, order))
        return [*let_read(givers, workers), *actions[::-1]]

    def draw_key(self) -> str:
        """Return a random key for a plan."""
        return self._draw_key()

    def worker(self, stage: PipelineStage) -> Worker:
        """Return the worker of a stage, which must be connected."""
        worker = self._registry.worker(stage.peer)
        assert worker is not None
        return worker

    def _wants_trials(self, stage: PipelineStage) -> bool:
        """Return whether a worker should time trials on its layers, which are its first."""
        return self._settings.strategy == "speed" and self._measurements.untried(stage.worker)

    def _note_change(self, pipeline: Pipeline) -> None:
        self._changed[pipeline.epoch] = pipeline

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        for epoch, pipeline in self._by_epoch.items():
            assert pipeline.epoch == epoch <= self.epoch
            pipeline.validate()
            assert pipeline.stages[-1].layers.stop == self._model.cost.num_layers
            assert pipeline.stages[0].layers.start == 0
            for stage in pipeline.stages:
                assert self._by_peer[stage.peer] is pipeline
                worker = self._registry.worker(stage.peer)
                assert worker is not None
                assert (worker.layers, worker.epoch) == (stage.layers, epoch)
                assert worker.state in (WorkerState.LOADING, WorkerState.SERVING)
        served = [stage.peer for pipeline in self._by_epoch.values() for stage in pipeline.stages]
        assert len(set(served)) == len(served)
        for peer, pipeline in self._by_peer.items():
            assert (peer in served) == (pipeline.epoch in self._by_epoch)
        assert set(served) <= set(self._by_peer)
