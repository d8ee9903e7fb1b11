"""The pipelines of the moment: who is part of which, and how they come, change and go. Pure.

Every plan that is loaded has a larger epoch than all before; answers of an older epoch are dropped.
A pipeline can take the place of another while requests run: its stages load beside the old ones,
and go on where those stop. What happens meanwhile is the matter of `moves`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count, pairwise

from distributed_llm.common.messages import DropStage, LoadStage, NextStage
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.cluster.move import Move
from distributed_llm.coordinator.cluster.registry import Registry, Worker
from distributed_llm.coordinator.events import Action, Send
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.plan import PipelineStage, Plan
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.request_book import RequestBook


class Pipelines:
    """All pipelines, served or loaded, and what their workers are told of it.

    Args:
        model: what is served.
        settings: how.
        registry: the workers.
        desk: the requests; they wait while their pipeline is gone.
        journal: takes what happens.
        draw_key: gives random keys, with which workers know each other.
        wants_trials: whether a worker should try steps of several sizes on its first layers.

    Attributes:
        epoch: of the newest plan; 0 before the first.
        changed: replicas in which something may be started, by epoch; whoever reads it empties it.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: CoordinatorSettings,
        registry: Registry,
        book: RequestBook,
        event_log: EventLog,
        draw_key: Callable[[], str],
        wants_trials: Callable[[WorkerId], bool],
    ) -> None:
        self._model = model
        self._settings = settings
        self._registry = registry
        self._book = book
        self._event_log = event_log
        self._draw_key = draw_key
        self._wants_trials = wants_trials
        self._pipelines: dict[int, Pipeline] = {}  # by epoch
        self._of: dict[PeerId, Pipeline] = {}
        self._sequence_ids = count(1)
        self.epoch = 0
        self.changed: dict[int, Pipeline] = {}

    @property
    def all(self) -> list[Pipeline]:
        """What is served or loaded, but not what loads beside it; the newest comes last."""
        return list(self._pipelines.values())

    def of(self, peer: PeerId) -> Pipeline | None:
        """Return what the worker at `peer` is part of."""
        return self._of.get(peer)

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache in all of them."""
        return sum(pipeline.kv_tokens for pipeline in self._pipelines.values())

    def tell_capacity(self) -> list[Action]:
        """Tell the desk the room of the largest pipeline: what exceeds it cannot be served."""
        rooms = [pipeline.kv_tokens for pipeline in self._pipelines.values()]
        return self._book.set_capacity(max(rooms)) if rooms else []

    # -------------------------------------------------------------- to come and to go

    def load(self, plans: Sequence[Plan]) -> list[Action]:
        """Have workers that are part of nothing load plans; free what others hold in vain."""
        actions = [action for plan in plans for action in self._load(plan)]
        return [*self.drop_unused(), *actions, *self.tell_capacity()]

    def _load(self, plan: Plan) -> list[Action]:
        pipeline, key = self._new_pipeline(plan), self._draw_key()
        self._pipelines[pipeline.epoch] = pipeline
        for stage in pipeline.stages:
            self._of[stage.peer] = pipeline
            self._worker(stage).assign(stage.layers, epoch=pipeline.epoch)
        text = f"plan {pipeline.epoch}: layers {pipeline.layers_text}"
        return [*self._load_stages(pipeline, key), self._event_log.note(text)]

    def _new_pipeline(self, plan: Plan) -> Pipeline:
        self.epoch += 1
        peers = {worker.id: worker.peer for worker in self._registry.workers}
        return Pipeline(
            self.epoch,
            plan,
            tuple(PipelineStage(peers[s.worker], s.worker, s.layers) for s in plan),
            self._model,
            self._settings,
            new_sequence_id=lambda: next(self._sequence_ids),
            on_change=self._note_change,
        )

    def dissolve(self, pipeline: Pipeline) -> None:
        """Give a pipeline up; its requests wait for another."""
        del self._pipelines[pipeline.epoch]
        self.changed.pop(pipeline.epoch, None)
        for stage in pipeline.stages:
            self._of.pop(stage.peer, None)
            worker = self._registry.worker(stage.peer)
            if worker is not None and worker.layers is not None:
                worker.unassign()
        self._evacuate(pipeline)

    def _evacuate(self, pipeline: Pipeline) -> None:
        """Have the requests of a pipeline wait for another; it serves no more."""
        if pipeline.scheduler:
            self._book.collect(pipeline.scheduler)
            self._book.requeue(pipeline.scheduler.evacuate())
        pipeline.in_flight = pipeline.scheduler = None

    def drop_unused(self) -> list[Action]:
        """Return the messages that free layers which no pipeline needs any more."""
        actions: list[Action] = []
        for worker in self._registry.workers:
            if worker.layers is None and worker.epoch:
                worker.epoch = 0
                actions.append(Send(worker.peer, DropStage(epoch=self.epoch)))
        return actions

    def end_epoch(self) -> list[Action]:
        """Have what is still said of the newest plan dropped; free what nobody needs."""
        self.epoch += 1
        return self.drop_unused()

    # -------------------------------------------------------------- from one plan to another

    def prepare(
        self, old: Pipeline, plan: Plan, *, copies: bool, copy_s: float, now: float
    ) -> tuple[Move, list[Action]]:
        """Have the stages of a plan load beside those of a pipeline that serves.

        Args:
            plan: by workers of `old` and idle ones.
            copies: whether the KV cache goes along.
            copy_s: how long that should take.
        """
        new, key = self._new_pipeline(plan), self._draw_key()
        addresses = {stage.peer: self._worker(stage).peer_addresses for stage in new.stages}
        move = Move(
            old,
            new,
            addresses=addresses,
            link_key=key,
            copies=copies,
            copy_s=copy_s,
            now=now,
        )
        imports: dict[PeerId, tuple[LayerRange, ...]] = {}
        for transfer in move.transfers:
            peer = transfer.receiver.peer
            imports[peer] = (*imports.get(peer, ()), transfer.layers)
        for stage in new.stages:
            worker = self._worker(stage)
            if self._of.get(stage.peer) is old:
                worker.prepare(stage.layers)
            else:
                self._of[stage.peer] = new
                worker.assign(stage.layers, epoch=new.epoch)
        return move, self._load_stages(new, key, beside=True, imports=imports)

    def swap(self, move: Move) -> list[Action]:
        """Serve what a move leads to; the old pipeline is no more."""
        old, new = move.old, move.new
        del self._pipelines[old.epoch]
        self.changed.pop(old.epoch, None)
        self._pipelines[new.epoch] = new
        for stage in old.stages:
            del self._of[stage.peer]
        for stage in new.stages:
            self._of[stage.peer] = new
            worker = self._worker(stage)
            worker.switch(epoch=new.epoch, weight_bytes=new.weight_bytes_of(stage.peer))
            worker.link = new.link_of(stage.peer)
        for stage in old.stages:
            if stage.peer not in self._of:
                worker = self._worker(stage)
                worker.unassign()
                worker.epoch = 0
        new.lineage = old.lineage
        if move.copies:
            new.continue_from(old)
        else:
            self._evacuate(old)
            new.serve()
        return [*move.commit(), *self.tell_capacity()]

    def cancel(self, move: Move) -> list[Action]:
        """Go on with what a move would have left."""
        for stage in move.new.stages:
            worker = self._registry.worker(stage.peer)
            if self._of.get(stage.peer) is move.new:
                del self._of[stage.peer]
                if worker is not None:
                    worker.unassign()
                    worker.epoch = 0
            elif worker is not None:
                worker.next_layers = None
        there = {worker.peer for worker in self._registry.workers}
        return [send for send in move.undo() if send.peer in there]

    # -------------------------------------------------------------- what workers are told

    def _load_stages(
        self,
        pipeline: Pipeline,
        key: str,
        *,
        beside: bool = False,
        imports: Mapping[PeerId, tuple[LayerRange, ...]] | None = None,
    ) -> list[Action]:
        """Return the orders to load; who is dialled comes first, to know the epoch by then."""
        actions: list[Action] = []
        for stage, following in pairwise((*pipeline.stages, None)):
            assert stage is not None
            after = None if following is None else self._worker(following)
            order = LoadStage(
                epoch=pipeline.epoch,
                source=self._model.source,
                layers=stage.layers,
                dtype=self._model.dtype,
                wire_dtype=self._model.wire_dtype,
                digest=self._model.digest(stage.layers),
                kv_tokens=next(s.kv_tokens for s in pipeline.plan if s.worker == stage.worker),
                link_key=key,
                next_stage=None
                if after is None
                else NextStage(worker=after.id, addresses=after.peer_addresses),
                beside=beside,
                trials=self._wants_trials(stage.worker),
                imports=(imports or {}).get(stage.peer, ()),
            )
            actions.append(Send(stage.peer, order))
        return actions[::-1]

    def _worker(self, stage: PipelineStage) -> Worker:
        worker = self._registry.worker(stage.peer)
        assert worker is not None
        return worker

    def _note_change(self, pipeline: Pipeline) -> None:
        self.changed[pipeline.epoch] = pipeline

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        for epoch, pipeline in self._pipelines.items():
            assert pipeline.epoch == epoch <= self.epoch
            pipeline.validate()
            assert pipeline.stages[-1].layers.stop == self._model.cost.num_layers
            assert pipeline.stages[0].layers.start == 0
            for stage in pipeline.stages:
                assert self._of[stage.peer] is pipeline
                worker = self._registry.worker(stage.peer)
                assert worker is not None
                assert (worker.layers, worker.epoch) == (stage.layers, epoch)
                assert worker.state in ("loading", "serving")
        served = {stage.peer for r in self._pipelines.values() for stage in r.stages}
        loading = {peer for peer, r in self._of.items() if r.epoch not in self._pipelines}
        assert set(self._of) == served | loading
        assert len(served) == sum(len(r.stages) for r in self._pipelines.values())
