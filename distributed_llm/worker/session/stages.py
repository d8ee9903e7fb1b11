"""The stages of a worker in one session, and what its messages about work mean for them. Pure.

One stage is served, and at most one is beside it, of a later epoch, to be served next:

    nothing --LoadStage(beside)--> beside --its first task, or DropStage of what is served--> served
    nothing --LoadStage--> served                  beside --CancelStage--> nothing

A task is run if its epoch is the one that is served and its step is not void. It may come from the
coordinator or from the worker of the stage before, and its result goes where its route says.

The compute thread takes orders one after the other, but loads beside them: nothing that needs such
a stage is ordered before it is loaded.
"""

import math
from collections.abc import Callable
from typing import assert_never

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.messages import (
    CancelStage,
    CopyKV,
    DropStage,
    KVEnd,
    KVFailed,
    KVPieces,
    LoadStage,
    PeerHello,
    PeerProbe,
    PeerProbed,
    ReleaseSequences,
    Remeasured,
    StageFailed,
    StageReady,
    TakeOver,
    Task,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.worker.session.epoch_stage import CREDITS, EpochStage, failed
from distributed_llm.worker.session.events import (
    Action,
    AssembleKV,
    Computed,
    ComputeFailed,
    Drop,
    ExportKV,
    Fail,
    ImportKV,
    KVAssembled,
    KVExported,
    KVImported,
    KVOrderFailed,
    Load,
    Loaded,
    LoadFailed,
    Log,
    Probe,
    Probed,
    Release,
    Run,
    Send,
    Serve,
    Unload,
)
from distributed_llm.worker.session.kv_handover import KVHandover
from distributed_llm.worker.session.link_events import (
    LinkChange,
    LinkDown,
    LinkReached,
    LinkReceived,
    LinkUp,
    PeerReceived,
)

WorkMessage = LoadStage | CopyKV | TakeOver | CancelStage | DropStage | Task | ReleaseSequences
ComputeEvent = (
    Loaded
    | LoadFailed
    | Computed
    | ComputeFailed
    | KVExported
    | KVImported
    | KVAssembled
    | KVOrderFailed
    | Probed
)


class Stages:
    """What a worker holds.

    Args:
        session: in which; what comes of other sessions is not for this.
        worker: its name.
        warn: returns a line for the operator, unless there was one a moment ago.

    Attributes:
        newest: epoch that was ordered or dropped; orders to load older ones are ignored.
    """

    def __init__(
        self, session: int, worker: str, warn: Callable[[str, float], list[Action]]
    ) -> None:
        self.newest = 0
        self._session = session
        self._worker = worker
        self._warn = warn
        self._served: EpochStage | None = None
        self._beside: EpochStage | None = None
        self._hand_over: KVHandover | None = None

    @property
    def epochs(self) -> tuple[int, ...]:
        """Of the stages that are held or loaded."""
        return tuple(stage.epoch for stage in (self._served, self._beside) if stage)

    @property
    def serving(self) -> LoadStage | None:
        """The order for the stage that is served; None if there is none, or not yet."""
        return self._served.order if self._served and self._served.loaded else None

    def is_void(self, order: Load | Run | ExportKV | ImportKV | AssembleKV | Probe) -> bool:
        """Return whether nobody waits for this any more; may be called from any thread."""
        if order.session != self._session:
            return True
        match order:
            case Run(task=task):
                served = self._served
                return served is None or served.epoch != task.epoch or served.is_void(task)
            case Load(order=LoadStage(epoch=epoch)):
                return self._find(epoch) is None
            case Probe():
                return bool(self.epochs)
            case ImportKV(message=KVPieces(epoch=epoch) | KVEnd(epoch=epoch)):
                pass
            case ExportKV(epoch=epoch) | AssembleKV(epoch=epoch):
                pass
        hand_over = self._hand_over
        return hand_over is None or hand_over.epoch != epoch or hand_over.over

    def end(self) -> list[Action]:
        """Give up all of it: the session is over. The layers that were served stay in memory."""
        actions = self._end_links()
        if self._served and self._served.order.beside and not self._served.loaded:
            actions.append(Drop())
        elif self._hand_over:
            actions.append(Unload(self._hand_over.epoch))
        self._served = self._beside = self._hand_over = None
        return actions

    # -------------------------------------------------------------- orders

    def obey(self, message: WorkMessage, frames: tuple[Frame, ...], now: float) -> list[Action]:
        """Do what the coordinator says."""
        match message:
            case Task():
                return self._task(message, frames, now)
            case LoadStage():
                return self._load(message, now)
            case CopyKV():
                return self._copy(message, now)
            case TakeOver(epoch=epoch):
                return self._take_over(epoch, now)
            case CancelStage(epoch=epoch):
                return self._cancel(epoch)
            case DropStage(epoch=epoch):
                return self._drop(epoch)
            case ReleaseSequences(epoch=epoch, sequence_ids=ids):
                return [Release(epoch, ids)] if self._find(epoch) else []
            case _:
                assert_never(message)

    def _load(self, order: LoadStage, now: float) -> list[Action]:
        if order.epoch <= self.newest:
            return [_ignored(order.epoch)]
        self.newest = order.epoch
        stage = EpochStage(self._session, order, self._worker)
        actions: list[Action] = []
        if order.beside:
            if self._hand_over:
                actions += self._cancel(self._hand_over.epoch)
            if self._served is None:  # layers of an older session may still be in memory
                actions.append(Drop())
            self._beside = stage
            self._hand_over = KVHandover(self._session, order.epoch, order.imports, inherits=True)
        else:
            actions += self._end_links()
            self._served, self._beside, self._hand_over = stage, None, None
        return [
            *actions,
            *stage.peers.begin(now),
            Log(f"loading layers {order.layers} (plan {order.epoch})"),
            Load(self._session, order),
        ]

    def _copy(self, order: CopyKV, now: float) -> list[Action]:
        served, epoch = self._served, order.epoch
        if served and epoch <= served.epoch:
            return [_ignored(epoch)]
        held = served.order.layers if served and served.loaded else None
        if held is None or not all(
            held.start <= what.layers.start < what.layers.stop <= held.stop
            for what in order.transfers
        ):
            return self._refuse(epoch, f"KV cache of layers that are not served here ({held})")
        if self._hand_over is None:
            self._hand_over = KVHandover(self._session, epoch, inherits=False)
        if self._hand_over.epoch != epoch:
            return self._refuse(epoch, f"plan {self._hand_over.epoch} is to come next")
        return self._hand_over.copy(order, now)

    def _take_over(self, epoch: int, now: float) -> list[Action]:
        if self._served and epoch <= self._served.epoch:
            return [_ignored(epoch)]
        if self._hand_over is None or self._hand_over.epoch != epoch:
            return self._refuse(epoch, "nothing was loaded or copied for it")
        if self._beside and not self._beside.loaded:
            return self._hand_over.fail("not_ready", _not_loaded(self._beside))
        if self._served:
            self._served.hand_over()
        return self._hand_over.take_over(now)

    def _refuse(self, epoch: int, why: str) -> list[Action]:
        message = f"Cannot hand layers over to plan {epoch}: {why}."
        told = KVFailed(epoch=epoch, worker="", code="bad_order", message=message)
        return [Send(told), Log(message, "warning")]

    def _cancel(self, epoch: int) -> list[Action]:
        loads = self._beside is not None and self._beside.epoch == epoch
        moves = self._hand_over is not None and self._hand_over.epoch == epoch
        if not loads and not moves:
            return [_ignored(epoch)]
        actions: list[Action] = []
        if self._beside:
            actions += self._beside.peers.end()
        actions += self._end_hand_over()
        self._beside = None
        if self._served:
            self._served.go_on()
        return [*actions, Log(f"plan {epoch} is cancelled"), Unload(epoch)]

    def _drop(self, epoch: int) -> list[Action]:
        newest = max(self.epochs, default=None)
        if newest is None and epoch < self.newest:
            return [_ignored(epoch)]
        if newest is None or newest <= epoch:
            self.newest = max(self.newest, epoch)
            actions = self._end_links()
            self._served = self._beside = self._hand_over = None
            return [*actions, Log("no layers to serve; waiting"), Drop()]
        if self._beside and (self._served is None or self._served.epoch <= epoch):
            return self._serve(self._beside)
        return []  # its first task came before this

    def _serve(self, stage: EpochStage) -> list[Action]:
        """Serve what was beside; if it is still loading, the compute thread hears of it then."""
        actions = self._served.peers.end() if self._served else []
        actions += self._end_hand_over()
        self._served, self._beside = stage, None
        serve = [Serve(stage.epoch)] if stage.loaded else []
        return [*actions, Log(f"serves layers {stage.order.layers} (plan {stage.epoch})"), *serve]

    def _end_hand_over(self) -> list[Action]:
        ended, self._hand_over = self._hand_over, None
        return ended.end() if ended else []

    def _end_links(self) -> list[Action]:
        actions = [a for s in (self._served, self._beside) if s for a in s.peers.end()]
        return actions + (self._hand_over.end() if self._hand_over else [])

    # -------------------------------------------------------------- tasks

    def _task(self, task: Task, frames: tuple[Frame, ...], now: float) -> list[Action]:
        stage = self._find(task.epoch)
        if stage is None or stage.handed_over:
            return self._warn(f"ignored a task of plan {task.epoch}", now)
        if stage.order.beside and not stage.loaded:
            return [Send(failed(task, "not_ready", _not_loaded(stage)))]
        if stage is not self._beside:
            return stage.take(task, frames)
        if self._hand_over and self._hand_over.is_inheriting:
            why = f"The KV cache of layers {stage.order.layers} is still being taken over."
            return [Send(failed(task, "not_ready", why))]
        return [*self._serve(stage), *stage.take(task, frames)]

    # -------------------------------------------------------------- other workers

    def peer_received(self, event: PeerReceived, now: float) -> list[Action]:
        """Somebody who connected to this worker sent a message; believe whom was welcomed."""
        message, peer = event.message, event.peer
        stage = self._find(message.epoch)
        if isinstance(message, PeerHello):
            if stage and stage.peers.is_forged(message):
                return self._warn("dropped a hello with a wrong key", now)
            return stage.peers.greeted(peer, message) if stage else []
        if stage is None or not stage.peers.knows(peer):
            what = type(message).__name__
            return self._warn(f"dropped a {what} of somebody who said no hello", now)
        match message:
            case Task():
                return self._task(message, event.frames, now)
            case PeerProbe():
                return stage.peers.probed_by(peer)
            case KVPieces() | KVEnd():
                if self._hand_over is None or stage is not self._beside:
                    return self._warn("dropped KV cache that came too late", now)
                if not stage.loaded:
                    return self._hand_over.fail("not_ready", _not_loaded(stage))
                return self._hand_over.arrived(peer, message, event.frames, now)
            case _:
                assert_never(message)

    def linked(self, event: LinkChange, now: float) -> list[Action]:
        """Something happened to a link of this worker."""
        if event.link.layers is not None:
            if self._hand_over is None or self._hand_over.epoch != event.link.epoch:
                return []
            return self._hand_over.linked(event, now)
        stage = self._find(event.link.epoch)
        if stage is None:
            return []
        match event:
            case LinkReached(address=address):
                return stage.peers.reached(address, now)
            case LinkUp(rtt_s=rtt_s):
                return stage.peers.welcomed(rtt_s, now)
            case LinkDown():
                return stage.peers.lost(now)
            case LinkReceived(message=PeerProbed()):
                return stage.peers.probed(now)
            case LinkReceived():
                return []
            case _:
                assert_never(event)

    # -------------------------------------------------------------- the compute thread

    def done(self, event: ComputeEvent, now: float) -> list[Action]:
        """Tell what came of an order, if anybody waits for that."""
        match event:
            case Computed(run=run):
                stage = None if self.is_void(run) else self._served
                return stage.computed(event) if stage else []
            case ComputeFailed(run=run):
                stage = None if self.is_void(run) else self._served
                return stage.broke(event) if stage else []
            case Loaded() | LoadFailed():
                stage = self._find(event.epoch)
                if stage is None or event.session != self._session:
                    return []
                return self._loaded(stage, event)
            case KVExported() | KVImported() | KVAssembled() | KVOrderFailed():
                if self._hand_over is None or self.is_void(event.order):
                    return []
                return self._moved(self._hand_over, event, now)
            case Probed(session=session):
                return [] if self.is_void(Probe(session)) else [Send(_remeasured(event))]
            case _:
                assert_never(event)

    def _loaded(self, stage: EpochStage, event: Loaded | LoadFailed) -> list[Action]:
        if isinstance(event, Loaded):
            stage.loaded = True
            ready = StageReady(
                epoch=event.epoch,
                credits=CREDITS,
                load_s=event.load_s,
                weight_bytes=event.weight_bytes,
                kv_tokens=event.kv_tokens,
                trials=event.trials,
            )
            due = stage.order.beside and stage is self._served
            serve = [Serve(stage.epoch)] if due else []
            return [*serve, Send(ready), Log(f"layers are loaded in {event.load_s:.1f} s")]
        error = event.error
        said = Send(StageFailed(epoch=event.epoch, code=error.code, message=str(error)[:4096]))
        if isinstance(error, CheckpointError) and self.serving is None:
            return [said, Fail(error)]
        return [said, Log(str(error), "error")]

    def _moved(
        self,
        hand_over: KVHandover,
        event: KVExported | KVImported | KVAssembled | KVOrderFailed,
        now: float,
    ) -> list[Action]:
        match event:
            case KVExported():
                return hand_over.exported(event, now)
            case KVImported():
                return hand_over.imported(event)
            case KVAssembled():
                return hand_over.inherited()
            case KVOrderFailed():
                return hand_over.failed(event)
            case _:
                assert_never(event)

    # -------------------------------------------------------------- time

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        dues = [stage.peers.next_deadline() for stage in (self._served, self._beside) if stage]
        return min([*dues, self._hand_over.next_deadline() if self._hand_over else math.inf])

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        actions: list[Action] = []
        for stage in (self._served, self._beside):
            if stage:
                actions += stage.peers.on_timer(now)
        return actions + (self._hand_over.on_timer(now) if self._hand_over else [])

    def _find(self, epoch: int) -> EpochStage | None:
        for stage in (self._served, self._beside):
            if stage is not None and stage.epoch == epoch:
                return stage
        return None


def _remeasured(event: Probed) -> Remeasured:
    return Remeasured(
        memory_bandwidth_bytes_per_s=event.memory_bandwidth_bytes_per_s,
        flops_per_s=event.flops_per_s,
    )


def _not_loaded(stage: EpochStage) -> str:
    return f"Layers {stage.order.layers} of plan {stage.epoch} are not loaded yet."


def _ignored(epoch: int) -> Log:
    return Log(f"ignored an order of plan {epoch}", "warning")
