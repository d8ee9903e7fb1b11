"""Replanning: has plans made when workers come and go, and loads them. Pure.

Plans take milliseconds to make, so a question about them is answered beside the event loop; one is
open at a time. A reply is outdated if it names a worker that cannot be had any more, or says that
no plan fits while other workers have come: then the question is asked again for the workers of now.
"""

from collections import Counter
from collections.abc import Sequence
from enum import IntEnum

from distributed_llm.common.errors import (
    DistributedLLMError,
    NotReady,
    UnsupportedModel,
    WorkerLost,
)
from distributed_llm.common.messages import StageFailed
from distributed_llm.common.types import WorkerId
from distributed_llm.common.wording import count_text, layers_text, list_text
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.telling import tell
from distributed_llm.coordinator.cluster.worker import Worker, WorkerState
from distributed_llm.coordinator.events import Action, Stop, Study
from distributed_llm.coordinator.plan import Plan
from distributed_llm.coordinator.planning.plan_question import PlanQuestion, PlanReply
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.planning.standing import Standing
from distributed_llm.coordinator.serving.event_log import EventKind
from distributed_llm.coordinator.serving.pipeline import Pipeline

_MAX_FAILURE_CHARS = 2000
"""Characters of a worker's failure that are told to those who ask; the rest is cut off."""


class Need(IntEnum):
    """What plans are needed for; the smaller, the more urgent.

    Attributes:
        RECOVERY: a pipeline was dissolved; workers without layers should serve in its place.
        ANEW: all workers are planned for; pipelines that would change are dissolved.
        ANOTHER: workers without layers should serve the model once more.
        MORE_BITS: all workers are planned for if they can hold weights of more bits than now.
    """

    RECOVERY = 0
    ANEW = 1
    ANOTHER = 2
    MORE_BITS = 3


class Replanning:
    """The replanning of one cluster.

    Attributes:
        replan_at: when to plan for a worker that joined, clock seconds, or None.
        replan_when_idle: whether to plan anew once no request is running.
        counts: plans that were loaded, by what they were needed for.
    """

    def __init__(self, cluster: Cluster, planner: Planner) -> None:
        self._cluster = cluster
        self._pipelines = cluster.pipelines
        self._planner = planner
        self._needs: set[Need] = set()
        self._open: tuple[Need, PlanQuestion] | None = None
        self._dissolved: Pipeline | None = None  # the last one that served
        self._lost: WorkerId | None = None  # for whom a pipeline was dissolved last
        self.replan_at: float | None = None
        self.replan_when_idle = False
        self.counts: Counter[Need] = Counter()

    @property
    def busy(self) -> bool:
        """Whether plans are being made."""
        return self._open is not None

    # -------------------------------------------------------------- asking

    def joined(self, *, now: float) -> None:
        """Plan with a worker that joined once nobody else has joined for a while."""
        self.replan_at = now + self._cluster.settings.settle_s
        if self._pipelines.state == "waiting":
            there = count_text(len(self._cluster.registry.workers), "worker")
            self._pipelines.note = self._with_last_failure(
                f"The layers are about to be shared out; joined so far: {there}. Ask again in a "
                "moment."
            )

    def plan_anew(self) -> list[Action]:
        """Have plans made for all workers that are there, if enough have joined."""
        self.replan_at, self.replan_when_idle = None, False
        fit, wanted = len(self._cluster.registry.fit), self._cluster.settings.min_workers
        if self._pipelines.epoch == 0 and fit < wanted:
            ready = f"{fit} of {count_text(wanted, 'worker')} can serve so far."
            self._pipelines.note = self._with_last_failure(
                f"{ready} Start the others with `dllm worker`."
            )
            return self._tell_idle(f"waiting: {ready}")
        return self._ask_for(Need.ANEW)

    def add_pipeline(self) -> list[Action]:
        """Have workers without layers serve the model once more, if they can hold it."""
        self.replan_at, self.replan_when_idle = None, True
        return self._ask_for(Need.ANOTHER)

    def ask_for_more_bits(self) -> list[Action]:
        """Have plans made with more bits than weights have now.

        They are loaded once no request runs, so that no answer changes for that.
        """
        self.replan_at, self.replan_when_idle = None, False
        return self._ask_for(Need.MORE_BITS)

    @property
    def may_have_more_bits(self) -> bool:
        """Whether weights that are served have fewer bits because they did not fit otherwise."""
        served = self._pipelines.all
        return bool(served) and self._planner.more_than(served[0].quantize) is not None

    def recover(self, worker: Worker, why: str = "") -> list[Action]:
        """Dissolve the pipeline of a worker that serves no more; have another one planned.

        Args:
            worker: that serves no more.
            why: what happened to it, if that was no wish of its own, for people.
        """
        pipeline = self._pipelines.pipeline_of(worker.peer)
        if pipeline is None:
            return []
        if why:
            self._pipelines.last_failure = f"Worker {worker.id} {why}."
        self._dissolve(pipeline)
        return self._ask_for_recovery(worker)

    def _dissolve(self, pipeline: Pipeline) -> None:
        """Dissolve a pipeline; what its workers have loaded may be kept."""
        if pipeline.in_flight:
            self._dissolved = pipeline
        self._pipelines.dissolve(pipeline)

    def _ask_for_recovery(self, worker: Worker) -> list[Action]:
        self._pipelines.recovering, self._lost = True, worker.id
        return self._ask_for(Need.RECOVERY)

    def left_waiting(self, *, now: float) -> None:
        """Say anew why nothing is served after a worker has left that had no layers."""
        if self._pipelines.state != "waiting":
            return
        if self._cluster.registry.fit:
            self.replan_at = now + self._cluster.settings.settle_s
        else:
            self._pipelines.note = self._with_last_failure(self._nobody_text())

    def try_again(self, worker: Worker) -> list[Action]:
        """Count a worker in again that could not load its layers; use it where one is missing.

        Nothing that serves is dissolved for it, as it may fail again.
        """
        worker.try_again()
        note = self._cluster.event_log.note(EventKind.WORKER_TRIED_AGAIN, worker=worker.id)
        if self._pipelines.state == "waiting":
            return [note, *self.plan_anew()]
        return [note] if self._pipelines.complete else [note, *self.add_pipeline()]

    def stage_failed(self, worker: Worker, failed: StageFailed, *, now: float) -> list[Action]:
        """Plan without a worker that cannot load its layers.

        Stops the coordinator if the model cannot be split and nobody is there who might do it, or
        ever served it.
        """
        if failed.epoch != worker.epoch or worker.state is WorkerState.UNFIT:
            self._cluster.event_log.rejected["stale_epoch"] += 1
            return []
        layers = worker.layers
        pipeline = self._pipelines.pipeline_of(worker.peer)  # None: another of its stages failed
        if pipeline is not None:
            self._dissolve(pipeline)
        worker.fail(failed.message, now=now)
        what = layers_text(layers) if layers else "its layers"
        failure = f"Worker {worker.id} cannot serve {what}: {failed.message}"
        self._pipelines.last_failure = failure[:_MAX_FAILURE_CHARS]
        note = self._cluster.event_log.note(
            EventKind.STAGE_FAILED, worker=worker.id, epoch=failed.epoch, why=failed.message
        )
        others = self._cluster.registry.fit or self._pipelines.has_served
        if failed.code == UnsupportedModel.code and not others:
            return [Stop(UnsupportedModel(f"{failed.message} Worker {worker.id} found that."))]
        return [note, *(self._ask_for_recovery(worker) if pipeline else [])]

    def _ask_for(self, *needs: Need) -> list[Action]:
        """Record what plans are needed for; ask for the most urgent, unless a question is open."""
        self._needs.update(needs)
        if self._open is not None or not self._needs:
            return []
        need = min(self._needs)
        self._needs.remove(need)
        workers = self._candidates(need)
        question = PlanQuestion(
            self._planner_for(need),
            self._cluster.measurements.machines(self._cluster.memory_of(workers)),
            several=need in (Need.ANEW, Need.MORE_BITS),
            doubted=frozenset(worker.id for worker in workers if worker.failures),
            standing=self._standing(workers) if need is Need.RECOVERY else Standing(),
        )
        self._open = need, question
        return [Study(question)]

    def _standing(self, workers: Sequence[Worker]) -> Standing:
        """Return what is still loaded by workers of the pipeline that was dissolved last."""
        dissolved = self._dissolved
        if dissolved is None:
            return Standing()
        there = {worker.id for worker in workers if worker.epoch == dissolved.epoch}
        return Standing(
            tuple((worker, layers) for worker, layers in dissolved.layer_map if worker in there),
            dissolved.quantize,
            {one.id: one.load_bytes_per_s for one in workers if one.load_bytes_per_s},
        )

    def _planner_for(self, need: Need) -> Planner:
        """Return the planner: what is added to pipelines that serve has their weights."""
        others = self._pipelines.all
        if need is Need.ANEW or not others:
            return self._planner
        bits = others[0].quantize
        if need is Need.MORE_BITS:
            return self._planner.more_than(bits) or self._planner
        return self._planner.only(bits)

    def _candidates(self, need: Need) -> list[Worker]:
        registry = self._cluster.registry
        return registry.fit if need in (Need.ANEW, Need.MORE_BITS) else registry.idle

    # -------------------------------------------------------------- replies

    def replied(self, reply: PlanReply, *, moving: bool) -> list[Action]:
        """Load the plans, or ask again if they are outdated; then ask for other plans needed.

        Args:
            moving: whether a move is under way; plans for all workers wait for its end.
        """
        assert self._open is not None
        (need, question), self._open = self._open, None
        assert reply.question is question
        if self._is_outdated(need, reply):
            return self._ask_for(need)
        if reply.error is not None:
            actions = self._plan_failed(need, reply.error)
        elif need in (Need.ANEW, Need.MORE_BITS):
            actions = self._load_anew(reply.plans, moving)
        else:
            actions = self._load(need, reply.plans)
        return [*actions, *self._ask_for()]

    def _is_outdated(self, need: Need, reply: PlanReply) -> bool:
        there = {worker.id for worker in self._candidates(need)}
        if reply.error is not None:
            return there != set(reply.question.machines.memory_bytes)
        return any(stage.worker not in there for plan in reply.plans for stage in plan)

    def _load_anew(self, plans: Sequence[Plan], moving: bool) -> list[Action]:
        if self._pipelines.all and (moving or self._cluster.book.busy):
            self.replan_when_idle = True
            return []
        kept = {pipeline.plan for pipeline in self._pipelines.all} & set(plans)
        for pipeline in self._pipelines.all:
            if pipeline.plan not in kept:
                self._pipelines.dissolve(pipeline)
        self._needs.discard(Need.RECOVERY)  # the workers that it is for are planned for
        return self._load(Need.ANEW, [plan for plan in plans if plan not in kept])

    def _load(self, need: Need, plans: Sequence[Plan]) -> list[Action]:
        self.counts[need] += len(plans)
        self._pipelines.recovering = Need.RECOVERY in self._needs
        return [*self._pipelines.load(plans), *self._tell_left_out()]

    def _plan_failed(self, need: Need, error: DistributedLLMError) -> list[Action]:
        """Go on without the plans that were needed: none fits."""
        log, pipelines = self._cluster.event_log, self._pipelines
        why = self._nobody_text() if isinstance(error, NotReady) else str(error)
        match need:
            case Need.ANOTHER | Need.MORE_BITS:
                return []
            case Need.ANEW if pipelines.all:
                note = log.note(EventKind.PLAN_KEPT, why=why)
                return [note, *self._tell_idle(f"no layers: {why}")]
            case Need.ANEW:
                return self._wait(why)
            case Need.RECOVERY:
                pipelines.recovering = Need.RECOVERY in self._needs
                if pipelines.all:
                    self.replan_when_idle = True
                    note = log.note(
                        EventKind.PIPELINE_LOST,
                        worker=self._lost,
                        pipelines=len(pipelines.all),
                        why="" if isinstance(error, NotReady) else why,
                    )
                    return [*pipelines.drop_unused(), note, *pipelines.tell_capacity()]
                reason = self._with_last_failure(why)
                broken = WorkerLost(f"Worker {self._lost} serves its layers no longer. {reason}")
                failed = self._cluster.book.fail_all(broken)
                return [*pipelines.skip_epoch(), *failed, *self._wait(why)]

    def _wait(self, why: str) -> list[Action]:
        self._pipelines.note, self.replan_when_idle = self._with_last_failure(why), False
        note = self._cluster.event_log.note(EventKind.WAITING, why=why)
        return [note, *self._tell_idle(f"no layers yet: {why}")]

    def _with_last_failure(self, why: str) -> str:
        """Return why nothing is served, and what happened before."""
        failure = self._pipelines.last_failure
        return f"{why} {failure}"[:4096] if failure else why[:4096]

    def _nobody_text(self) -> str:
        """Return who is there, if nobody can be given layers."""
        workers = self._cluster.registry.workers
        if not workers:
            return "No worker is there. Start one with `dllm worker`."
        names = list_text(worker.id for worker in workers)
        verb = "is" if len(workers) == 1 else "are"
        return (
            f"{count_text(len(workers), 'worker')} {verb} connected ({names}), but none can be "
            "given layers; `dllm status` shows why. Start another one with `dllm worker`."
        )

    # -------------------------------------------------------------- what idle workers are told

    def tell_waiting(self) -> list[Action]:
        """Tell workers that joined while requests run when they will be given layers."""
        return self._tell_idle("no layers yet: they are dealt anew once no request runs")

    def _tell_left_out(self) -> list[Action]:
        """Tell workers for which a plan has no layers why; `Rebalancing` does for "speed"."""
        strategy = self._cluster.settings.strategy
        if strategy == "speed":
            return []
        if strategy == "custom":
            return self._tell_idle("no layers: the setting `layers` does not name this worker")
        cost = self._cluster.model.cost
        why = f", and {cost.together_text}" if cost.together_text else ""
        return self._tell_idle(
            f"no layers: with strategy {strategy}, others serve all of them{why}"
        )

    def _tell_idle(self, text: str) -> list[Action]:
        return [action for worker in self._cluster.registry.idle for action in tell(worker, text)]

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert self._open is not None or not self._needs
        wanted = Need.RECOVERY in self._needs or (self._open and self._open[0] is Need.RECOVERY)
        assert bool(wanted) == self._pipelines.recovering
