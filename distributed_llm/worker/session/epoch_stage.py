"""One stage that a worker holds or loads: its neighbours, and the tasks that wait or run. Pure."""

import msgspec

from distributed_llm.common.messages import LoadStage, StageTime, Task, TaskFailed, TaskResult
from distributed_llm.common.tensors import Frame
from distributed_llm.worker.session.events import Action, Computed, ComputeFailed, Run, Send
from distributed_llm.worker.session.link_events import ForwardTask
from distributed_llm.worker.session.peers import Peers

CREDITS = 32
"""Tasks that may wait or run: so many steps fill a pipeline of that many stages."""


def failed(task: Task, code: str, message: str) -> TaskFailed:
    """Return the answer to a task that cannot be run."""
    return TaskFailed(epoch=task.epoch, step=task.step, code=code, message=message)


class EpochStage:
    """The layers of one epoch on this worker.

    Args:
        worker: the name of this worker.

    Attributes:
        loaded: the layers are in memory.
        handed_over: its tasks are void, because its KV cache goes on elsewhere.
    """

    def __init__(self, session: int, order: LoadStage, worker: str) -> None:
        self.order = order
        self.peers = Peers(order, worker)
        self.loaded = False
        self.handed_over = False
        self._session = session
        self._oldest = self._next = 0  # steps; all that came are before `_next`
        self._held: set[int] = set()

    @property
    def epoch(self) -> int:
        """Under which it serves or will serve."""
        return self.order.epoch

    def hand_over(self) -> None:
        """Give up all tasks that came."""
        self.handed_over = True
        self._oldest = self._next
        self._held.clear()

    def go_on(self) -> None:
        """Take tasks again."""
        self.handed_over = False

    def is_void(self, task: Task) -> bool:
        """Return whether nobody waits for a task of its epoch; may be called from any thread."""
        return self.handed_over or task.step < self._oldest

    def take(self, task: Task, frames: tuple[Frame, ...]) -> list[Action]:
        """Have a task of its epoch run."""
        self._next = max(self._next, task.step + 1)
        if task.oldest > self._oldest:
            self._oldest = task.oldest
            self._held = {step for step in self._held if step >= task.oldest}
        if task.step < self._oldest or task.step in self._held:
            return []
        if len(self._held) >= CREDITS:
            return [Send(failed(task, "too_many_tasks", f"{CREDITS} tasks wait here already"))]
        self._held.add(task.step)
        return [Run(self._session, task, frames)]

    def computed(self, done: Computed) -> list[Action]:
        """Send what a task gave on its way."""
        task = done.run.task
        self._held.discard(task.step)
        own = StageTime(
            compute_us=done.compute_us, layers_us=done.layers_us, queued_us=done.queued_us
        )
        timings = (*task.timings, own)
        if task.route and task.route[0] and self.peers.link_up:
            onward = msgspec.structs.replace(
                task,
                oldest=self._oldest,
                route=task.route[1:],
                timings=timings,
                tensors=(task.tensors[0], *done.specs),
            )
            return [ForwardTask(onward, (done.run.frames[0], *done.frames))]
        result = TaskResult(epoch=task.epoch, step=task.step, timings=timings, tensors=done.specs)
        return [Send(result, done.frames)]

    def broke(self, broke: ComputeFailed) -> list[Action]:
        """Tell that a task could not be run."""
        task = broke.run.task
        self._held.discard(task.step)
        told = failed(task, broke.error.code, str(broke.error)[:4096])
        return [Send(msgspec.structs.replace(told, missing=broke.missing))]
