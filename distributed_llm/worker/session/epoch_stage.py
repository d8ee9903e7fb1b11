"""A worker's stage of one epoch: its state, its neighbours, and its tasks. Pure.

A stage that loads alone takes tasks at once; they wait until the compute thread has loaded it. A
stage that loads beside the served one is prepared for a move, and served from the commit on.
"""

from enum import Enum

import msgspec

from distributed_llm.common.messages import LoadStage, StageTime, Task, TaskFailed, TaskResult
from distributed_llm.common.states import StateTable
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import Epoch, StepNumber
from distributed_llm.worker.session.events import Action, Computed, ComputeFailed, Run, Send
from distributed_llm.worker.session.link_events import ForwardTask
from distributed_llm.worker.session.peers import Peers

CREDITS = 32
"""Tasks that may wait or run on a worker at once: enough for a pipeline of so many stages."""


class StageState(Enum):
    """What a worker does with its stage of one epoch.

    Attributes:
        NEW: the order to load it is being handled.
        LOADING: loads alone; tasks wait until it has loaded.
        PREPARING: loads beside the served stage.
        PREPARED: loaded beside the served stage; its KV cache arrives or is assembled.
        COMMITTED: the commit came while it was loading beside; served once it has loaded.
        SERVED: loaded, and runs tasks.
        SUSPENDED: loaded, and runs no tasks because the handover of a move has begun.
        GONE: given up.
    """

    NEW = "new"
    LOADING = "loading"
    PREPARING = "preparing"
    PREPARED = "prepared"
    COMMITTED = "committed"
    SERVED = "served"
    SUSPENDED = "suspended"
    GONE = "gone"


class StageCause(Enum):
    """What changes the state of a stage.

    Attributes:
        ORDERED_ALONE: it is to be loaded in the place of all others.
        ORDERED_BESIDE: it is to be loaded beside the served stage, for a move.
        LOADED: its layers are in memory.
        COMMIT: its first task came, or the older epoch was dropped.
        SUSPEND: the handover to a newer epoch has begun.
        RESUME: the move to that epoch was undone.
        GIVE_UP: its epoch was dropped or cancelled, or the session is over.
    """

    ORDERED_ALONE = "ordered alone"
    ORDERED_BESIDE = "ordered beside"
    LOADED = "loaded"
    COMMIT = "commit"
    SUSPEND = "suspend"
    RESUME = "resume"
    GIVE_UP = "give up"


_S, _C = StageState, StageCause
STAGE_STATES = StateTable(
    "a worker's stage of one epoch",
    _S.NEW,
    {
        (_S.NEW, _C.ORDERED_ALONE): _S.LOADING,
        (_S.NEW, _C.ORDERED_BESIDE): _S.PREPARING,
        (_S.LOADING, _C.LOADED): _S.SERVED,
        (_S.PREPARING, _C.LOADED): _S.PREPARED,
        (_S.PREPARING, _C.COMMIT): _S.COMMITTED,
        (_S.COMMITTED, _C.LOADED): _S.SERVED,
        (_S.PREPARED, _C.COMMIT): _S.SERVED,
        (_S.SERVED, _C.SUSPEND): _S.SUSPENDED,
        (_S.SUSPENDED, _C.RESUME): _S.SERVED,
        (_S.LOADING, _C.GIVE_UP): _S.GONE,
        (_S.PREPARING, _C.GIVE_UP): _S.GONE,
        (_S.PREPARED, _C.GIVE_UP): _S.GONE,
        (_S.COMMITTED, _C.GIVE_UP): _S.GONE,
        (_S.SERVED, _C.GIVE_UP): _S.GONE,
        (_S.SUSPENDED, _C.GIVE_UP): _S.GONE,
    },
)


def failed(task: Task, code: str, message: str) -> TaskFailed:
    """Return the answer to a task that cannot be run."""
    return TaskFailed(epoch=task.epoch, step=task.step, code=code, message=message)


class EpochStage:
    """One layer range of this worker under one epoch.

    Args:
        session: that the order belongs to.
        order: to load the stage.
        worker: the name of this worker.

    Attributes:
        order: as given.
        peers: the workers of the previous and the next stage.
        state: see `STAGE_STATES`. A stage that failed to load stays as it is until it is given up.
    """

    def __init__(self, session: int, order: LoadStage, worker: str) -> None:
        self.order = order
        self.peers = Peers(order, worker)
        self.state = STAGE_STATES.initial
        self._session = session
        self._oldest = 0  # all smaller steps are void
        self._pending: set[StepNumber] = set()  # steps that wait or run
        self._change(_C.ORDERED_ALONE if order.beside is None else _C.ORDERED_BESIDE)

    @property
    def epoch(self) -> Epoch:
        """The epoch that the stage belongs to."""
        return self.order.epoch

    @property
    def is_prepared_only(self) -> bool:
        """Whether the stage loads or is loaded beside another one, without commit."""
        return self.state in (_S.PREPARING, _S.PREPARED)

    @property
    def is_loaded(self) -> bool:
        """Whether its layers are in memory."""
        return self.state in (_S.PREPARED, _S.SERVED, _S.SUSPENDED)

    def loaded(self) -> None:
        """Note that the layers are in memory."""
        self._change(_C.LOADED)

    def commit(self) -> None:
        """Serve this stage, which was ordered beside another one."""
        self._change(_C.COMMIT)

    def suspend(self, first_step: StepNumber) -> None:
        """Run no more tasks; all steps before `first_step` are void for good."""
        self._change(_C.SUSPEND)
        self._oldest = max(self._oldest, first_step)
        self._pending.clear()

    def resume(self) -> None:
        """Run tasks again."""
        self._change(_C.RESUME)

    def give_up(self) -> list[Action]:
        """Close the links to the neighbours; the stage must not be used any more."""
        self._change(_C.GIVE_UP)
        return self.peers.end()

    def was_void(self, task: Task) -> bool:
        """Return whether a task of this epoch was void when it was sent, as far as is known."""
        return task.step < self._oldest

    def is_void(self, task: Task) -> bool:
        """Return whether the result of a task of this epoch is no longer wanted; thread-safe."""
        return self.state not in (_S.LOADING, _S.SERVED) or task.step < self._oldest

    def run(self, task: Task, frames: tuple[Frame, ...]) -> list[Action]:
        """Have a task of this epoch run, unless it is void, a repetition, or one too many."""
        if task.oldest > self._oldest:
            self._oldest = task.oldest
            self._pending = {step for step in self._pending if step >= task.oldest}
        if task.step < self._oldest or task.step in self._pending:
            return []
        if len(self._pending) >= CREDITS:
            return [Send(failed(task, "too_many_tasks", f"{CREDITS} tasks wait here already"))]
        self._pending.add(task.step)
        return [Run(self._session, task, frames)]

    def computed(self, event: Computed) -> list[Action]:
        """Send the result of a task to the next worker or to the coordinator, as its route says."""
        task = event.run.task
        self._pending.discard(task.step)
        own = StageTime(
            compute_us=event.compute_us, layers_us=event.layers_us, queued_us=event.queued_us
        )
        timings = (*task.timings, own)
        if task.route and task.route[0] and self.peers.link_up:
            masks = len(task.tensors) - bool(task.num_masks)
            onward = msgspec.structs.replace(
                task,
                oldest=self._oldest,
                route=task.route[1:],
                timings=timings,
                tensors=(task.tensors[0], *event.specs, *task.tensors[masks:]),
            )
            frames = event.run.frames
            return [ForwardTask(onward, (frames[0], *event.frames, *frames[masks:]))]
        result = TaskResult(epoch=task.epoch, step=task.step, timings=timings, tensors=event.specs)
        return [Send(result, event.frames)]

    def compute_failed(self, event: ComputeFailed) -> list[Action]:
        """Report that a task could not be run."""
        task = event.run.task
        self._pending.discard(task.step)
        told = failed(task, event.error.code, str(event.error)[:4096])
        told = msgspec.structs.replace(told, missing=event.missing, sequence_ids=event.sequence_ids)
        return [Send(told)]

    def _change(self, cause: StageCause) -> None:
        self.state = STAGE_STATES.after(self.state, cause)
