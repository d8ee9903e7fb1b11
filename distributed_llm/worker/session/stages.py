"""Handles the coordinator's orders, tasks and results for the stages of a worker's session. Pure.

A worker holds one stage that is served, and while layers move, one that was loaded beside it for a
later epoch; `STAGE_STATES` in `epoch_stage` says how the prepared stage becomes the served one. A
task is run if its epoch is served and its step is not void. It may come from the coordinator or
from the worker of the previous stage, and its route says where its result goes.

The compute thread carries out orders one after the other, except that it loads a stage beside the
served one in the background. So no order that needs that stage is given before it is loaded.
"""

import math
from collections.abc import Callable
from typing import assert_never

from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    NOT_SERVED,
    CopyKV,
    GiveWeights,
    HandOver,
    KVEnd,
    KVFailed,
    KVPieces,
    KVTaken,
    LoadStage,
    PeerHello,
    PeerProbe,
    PeerProbed,
    ReleaseSequences,
    Remeasured,
    StageFailed,
    StageReady,
    Task,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import Epoch
from distributed_llm.common.wording import layers_text, size_text
from distributed_llm.worker.session.epoch_stage import CREDITS, EpochStage, StageState, failed
from distributed_llm.worker.session.events import (
    Action,
    AssembleKV,
    Computed,
    ComputeFailed,
    Drop,
    ExportKV,
    ImportKV,
    KVEvent,
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
    VoidableOrder,
)
from distributed_llm.worker.session.kv_move import KVMove
from distributed_llm.worker.session.link_events import (
    LinkChange,
    LinkDown,
    LinkReached,
    LinkReceived,
    LinkUp,
    PeerGarbage,
    PeerReceived,
)
from distributed_llm.worker.session.unread import not_done, not_received


class Stages:
    """The stages of one session.

    Args:
        session: its number; results of other sessions are ignored.
        worker: the name of this worker.
        warn: returns a line for the operator, or nothing if there were many in the last minute.
    """

    def __init__(
        self, session: int, worker: str, warn: Callable[[str, float], list[Action]]
    ) -> None:
        self._session = session
        self._worker = worker
        self._warn = warn
        self._newest = 0  # newest epoch ordered or dropped; orders to load older ones are late
        # The older epoch first: the served stage, then the prepared one.
        self._by_epoch: dict[Epoch, EpochStage] = {}
        self._kv_move: KVMove | None = None  # always there while a stage is prepared
        self._readers: frozenset[PublicKey] = frozenset()

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        """The epochs of the stages that are loaded or loading."""
        return tuple(self._by_epoch)

    @property
    def serving(self) -> LoadStage | None:
        """The order of the stage that is served; None if there is none, or it is not loaded."""
        return self._served.order if self._served and self._served.is_loaded else None

    @property
    def _served(self) -> EpochStage | None:
        return next((s for s in self._by_epoch.values() if not s.is_prepared_only), None)

    @property
    def _prepared(self) -> EpochStage | None:
        return next((s for s in self._by_epoch.values() if s.is_prepared_only), None)

    def is_void(self, order: VoidableOrder) -> bool:
        """Return whether the result of an order is no longer wanted; thread-safe."""
        if order.session != self._session:
            return True
        match order:
            case Run(task=task):
                stage = self._by_epoch.get(task.epoch)
                return stage is None or stage.is_void(task)
            case Load(order=load):
                return load.epoch not in self._by_epoch
            case Probe():
                return bool(self._by_epoch)
            case ImportKV(message=message):
                return self._is_kv_move_over(message.epoch)
            case ExportKV(epoch=epoch) | AssembleKV(epoch=epoch):
                return self._is_kv_move_over(epoch)
            case _:
                assert_never(order)

    def _is_kv_move_over(self, epoch: Epoch) -> bool:
        move = self._kv_move
        return move is None or move.epoch != epoch or move.has_failed

    def end(self) -> list[Action]:
        """Give up all stages because the session is over.

        The served layers stay in memory: the next session may want them again.
        """
        served, move = self._served, self._kv_move
        actions = self._give_up_all()
        if served and served.state is StageState.COMMITTED:
            return [*actions, Drop()]
        return [*actions, Unload(move.epoch)] if move else actions

    # -------------------------------------------------------------- the coordinator's orders

    def rename(self, worker: str) -> None:
        """Call this worker so in stages that are yet to be loaded."""
        self._worker = worker

    def load(self, order: LoadStage, now: float) -> list[Action]:
        """Load a stage: beside the served one, or in the place of all others."""
        if order.epoch <= self._newest:
            return [_ignored(order.epoch)]
        self._newest = order.epoch
        actions: list[Action] = []
        served = self._served
        if served is None or served.epoch != order.beside:  # its end may not have been heard of
            actions += self._give_up_all()
        elif self._kv_move:
            actions += self.undo_move(self._kv_move.epoch)
        if order.beside is not None:
            if not self._by_epoch:  # layers of another epoch or session may still be in memory
                actions.append(Drop())
            self._kv_move = KVMove(self._session, order.epoch, order.imports, has_new_stage=True)
        stage = EpochStage(self._session, order, self._worker)
        self._by_epoch[order.epoch] = stage
        return [
            *actions,
            *stage.peers.begin(now),
            Log(f"loading {layers_text(order.layers)} (plan {order.epoch})"),
            Load(self._session, order),
        ]

    def copy_kv(self, order: CopyKV, now: float) -> list[Action]:
        """Copy KV cache of the served stage to the workers of the new epoch, as ordered."""
        served, epoch = self._served, order.epoch
        if served and epoch <= served.epoch:
            return [_ignored(epoch)]
        held = served.order.layers if served and served.is_loaded else None
        if held is None or not all(
            held.start <= transfer.layers.start < transfer.layers.stop <= held.stop
            for transfer in order.transfers
        ):
            return self._refuse(epoch, f"KV cache of layers that are not served here ({held})")
        if self._kv_move is None:
            self._kv_move = KVMove(self._session, epoch, has_new_stage=False)
        if self._kv_move.epoch != epoch:
            return self._refuse(epoch, f"plan {self._kv_move.epoch} is to come next")
        return self._kv_move.copy(order, now)

    def hand_over(self, order: HandOver, now: float) -> list[Action]:
        """Begin the handover to an epoch: no step of the served epoch runs any more."""
        served, prepared, epoch = self._served, self._prepared, order.epoch
        if served and epoch <= served.epoch:
            return [_ignored(epoch)]
        if self._kv_move is None or self._kv_move.epoch != epoch:
            return self._refuse(epoch, "nothing was loaded or copied for it")
        if prepared and not prepared.is_loaded:
            return self._kv_move.fail("not_ready", _not_loaded(prepared))
        if served and served.state is StageState.SERVED:
            served.suspend(order.first_step)
        return self._kv_move.hand_over(order.set_back, now)

    def _refuse(self, epoch: Epoch, why: str) -> list[Action]:
        message = f"Cannot move KV cache to plan {epoch}: {why}."
        told = KVFailed(epoch=epoch, worker="", code="bad_order", message=message)
        return [Send(told), Log(message, "warning")]

    def undo_move(self, epoch: Epoch) -> list[Action]:
        """Undo the move to `epoch`: give up its stage and transfers, resume the served stage."""
        if self._kv_move is None or self._kv_move.epoch != epoch:
            return [_ignored(epoch)]
        actions: list[Action] = []
        if prepared := self._prepared:
            actions += self._give_up(prepared)
        actions += self._end_kv_move()
        if self._served and self._served.state is StageState.SUSPENDED:
            self._served.resume()
        return [*actions, Log(f"plan {epoch} is cancelled"), Unload(epoch)]

    def drop(self, epoch: Epoch) -> list[Action]:
        """Give up all stages up to `epoch`; a newer one that is prepared is served from now on."""
        newest = max(self._by_epoch, default=None)
        if newest is None and epoch < self._newest:
            return [_ignored(epoch)]
        if newest is None or newest <= epoch:
            self._newest = max(self._newest, epoch)
            return [*self._give_up_all(), Log("no layers to serve; waiting"), Drop()]
        prepared, served = self._prepared, self._served
        if prepared and (served is None or served.epoch <= epoch):
            return self._commit(prepared)
        return []  # the first task of the new epoch came before this order, and committed it

    def release(self, order: ReleaseSequences) -> list[Action]:
        """Free the KV cache of sequences."""
        if order.epoch not in self._by_epoch:
            return []
        return [Release(order.epoch, order.sequence_ids)]

    def _commit(self, prepared: EpochStage) -> list[Action]:
        """Serve the prepared stage; while it is still loading, the compute thread is told later."""
        actions = self._give_up(self._served) if self._served else []
        actions += self._end_kv_move()
        prepared.commit()
        actions.append(Log(f"serving {layers_text(prepared.order.layers)} (plan {prepared.epoch})"))
        return [*actions, Serve(prepared.epoch)] if prepared.is_loaded else actions

    def _give_up(self, stage: EpochStage) -> list[Action]:
        del self._by_epoch[stage.epoch]
        return stage.give_up()

    def _give_up_all(self) -> list[Action]:
        stages = list(self._by_epoch.values())
        actions = [action for stage in stages for action in self._give_up(stage)]
        return actions + self._end_kv_move()

    def _end_kv_move(self) -> list[Action]:
        ended, self._kv_move = self._kv_move, None
        return ended.end() if ended else []

    # -------------------------------------------------------------- tasks

    def admits(self, key: PublicKey) -> bool:
        """Return whether the worker that holds `key` may connect to this one."""
        stages = self._by_epoch.values()
        return key in self._readers or any(stage.peers.admits(key) for stage in stages)

    def give_weights(self, order: GiveWeights) -> None:
        """Let the workers that an order names read weights, and no others any more."""
        self._readers = frozenset(order.readers)

    def may_read(self, key: PublicKey) -> bool:
        """Return whether the worker that holds `key` may read weights."""
        return key in self._readers

    def run(self, task: Task, frames: tuple[Frame, ...], now: float) -> list[Action]:
        """Have a task run.

        The first task of a prepared stage commits the move to it, and the first one of a suspended
        stage undoes it: what the coordinator says about that may come later.
        """
        stage = self._by_epoch.get(task.epoch)
        if stage is None:
            why = f"Worker {self._worker} does not serve plan {task.epoch}."
            told = failed(task, NOT_SERVED, why)
            return [Send(told), *self._warn(f"cannot run a task of plan {task.epoch}", now)]
        match stage.state:
            case StageState.LOADING | StageState.SERVED:
                return stage.run(task, frames)
            case StageState.PREPARED if self._kv_move and self._kv_move.is_assembling:
                why = f"The KV cache of {layers_text(stage.order.layers)} is not assembled yet."
                return [Send(failed(task, "not_ready", why))]
            case StageState.PREPARED:
                return [*self._commit(stage), *stage.run(task, frames)]
            case StageState.PREPARING | StageState.COMMITTED:
                return [Send(failed(task, "not_ready", _not_loaded(stage)))]
            case StageState.SUSPENDED if stage.was_void(task):
                return []
            case StageState.SUSPENDED:
                assert self._kv_move is not None
                return [*self.undo_move(self._kv_move.epoch), *stage.run(task, frames)]
            case StageState.NEW | StageState.GONE:
                raise AssertionError(f"a stage that is {stage.state.value} is held")
            case _:
                assert_never(stage.state)

    # -------------------------------------------------------------- messages that cannot be read

    def unread(self, error: RemoteProtocolError) -> list[Action]:
        """Tell the coordinator of a message from it that cannot be read, as that one's answer."""
        return [Send(not_done(error))]

    def unread_of_peer(self, event: PeerGarbage) -> list[Action]:
        """Tell the coordinator of a message of another worker that cannot be read."""
        return not_received(event, self._by_epoch, self._kv_move)

    # -------------------------------------------------------------- other workers

    def peer_received(self, event: PeerReceived, now: float) -> list[Action]:
        """Handle a message of a worker that dialled this one; all but hellos need a welcome."""
        message, peer = event.message, event.peer
        stage = self._by_epoch.get(message.epoch)
        if isinstance(message, PeerHello):
            if stage and stage.peers.is_forged(message):
                return self._warn("dropped a hello with a wrong key", now)
            return stage.peers.greeted(peer, message) if stage else []
        if stage is None or not stage.peers.knows(peer):
            what = type(message).__name__
            return self._warn(f"dropped a {what} of somebody who said no hello", now)
        match message:
            case Task():
                return self.run(message, event.frames, now)
            case PeerProbe():
                return stage.peers.probed_by(peer)
            case KVPieces() | KVEnd():
                if self._kv_move is None or not stage.is_prepared_only:
                    return self._warn("dropped KV cache that came too late", now)
                if not stage.is_loaded:
                    return self._kv_move.fail("not_ready", _not_loaded(stage))
                return self._kv_move.received(peer, message, event.frames, now)
            case _:
                assert_never(message)

    def link_changed(self, event: LinkChange, now: float) -> list[Action]:
        """Handle an event of a link to another worker."""
        link = event.link
        if link.layers is not None:
            if self._kv_move is None or self._kv_move.epoch != link.epoch:
                return []
            return self._kv_move.link_changed(event, now)
        stage = self._by_epoch.get(link.epoch)
        if stage is None:
            return []
        match event:
            case LinkReached(address=address):
                return stage.peers.reached(address, now)
            case LinkUp(rtt_s=rtt_s):
                return stage.peers.welcomed(rtt_s, now)
            case LinkDown():
                return stage.peers.lost(now)
            case LinkReceived(message=message):
                return self._next_worker_said(stage, message, now)
            case _:
                assert_never(event)

    def _next_worker_said(
        self, stage: EpochStage, message: PeerProbed | KVTaken, now: float
    ) -> list[Action]:
        match message:
            case PeerProbed():
                return stage.peers.probed(now)
            case KVTaken():
                return self._warn("dropped an acknowledgment of KV cache that was not sent", now)
            case _:
                assert_never(message)

    # -------------------------------------------------------------- the compute thread

    def loaded(self, event: Loaded) -> list[Action]:
        """Report that a stage is ready, and serve it if its commit came before."""
        stage = self._by_epoch.get(event.epoch)
        if stage is None or event.session != self._session:
            return []
        serve = [Serve(stage.epoch)] if stage.state is StageState.COMMITTED else []
        stage.loaded()
        ready = StageReady(
            epoch=event.epoch,
            credits=CREDITS,
            load_s=event.load_s,
            weight_bytes=event.weight_bytes,
            kv_tokens=event.kv_tokens,
            kv_token_bytes=event.kv_token_bytes,
            kv_windowed_bytes=event.kv_windowed_bytes,
            kv_window=event.kv_window,
            trials=event.trials,
            fetched_bytes=event.fetched_bytes,
            fetch_s=event.fetch_s,
            gives_weights=event.gives_weights,
            kernels=event.kernels,
        )
        text = (
            f"loaded {layers_text(stage.order.layers)} in {event.load_s:.1f} s (plan {event.epoch})"
        )
        if event.fetched_bytes:
            text += f"; {size_text(event.fetched_bytes)} of weights came from other machines"
        return [*serve, Send(ready), Log(text)]

    def load_failed(self, event: LoadFailed) -> list[Action]:
        """Report that a stage cannot be loaded; return nothing if nobody waits for it."""
        if event.epoch not in self._by_epoch or event.session != self._session:
            return []
        error = event.error
        return [Send(StageFailed(epoch=event.epoch, code=error.code, message=str(error)[:4096]))]

    def computed(self, event: Computed) -> list[Action]:
        """Send the result of a task on its way, unless it is void."""
        if self.is_void(event.run):
            return []
        return self._by_epoch[event.run.task.epoch].computed(event)

    def compute_failed(self, event: ComputeFailed) -> list[Action]:
        """Report that a task could not be run, unless it is void."""
        if self.is_void(event.run):
            return []
        return self._by_epoch[event.run.task.epoch].compute_failed(event)

    def kv_order_done(self, event: KVEvent, now: float) -> list[Action]:
        """Go on with the KV cache of a move, unless the order is void."""
        if self._kv_move is None or self.is_void(event.order):
            return []
        return self._kv_move.order_done(event, now)

    def probed(self, event: Probed) -> list[Action]:
        """Report what the machine can do now, unless there are layers by now."""
        if self.is_void(Probe(event.session)):
            return []
        measured = Remeasured(
            memory_bandwidth_bytes_per_s=event.memory_bandwidth_bytes_per_s,
            flops_per_s=event.flops_per_s,
            memory_bytes=event.memory_bytes,
        )
        return [Send(measured)]

    # -------------------------------------------------------------- time

    def next_deadline(self) -> float:
        """Return when `on_timer` is next due, clock seconds; infinity if never."""
        dues = [stage.peers.next_deadline() for stage in self._by_epoch.values()]
        return min([*dues, self._kv_move.next_deadline() if self._kv_move else math.inf])

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        stages = self._by_epoch.values()
        actions = [action for stage in stages for action in stage.peers.on_timer(now)]
        return actions + (self._kv_move.on_timer(now) if self._kv_move else [])


def _not_loaded(stage: EpochStage) -> str:
    return (
        f"{layers_text(stage.order.layers).capitalize()} of plan {stage.epoch} are not loaded yet."
    )


def _ignored(epoch: Epoch) -> Log:
    return Log(f"ignored an order of plan {epoch}", "warning")
