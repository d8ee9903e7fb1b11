"""One session of a worker: what it reports, its layers, and when it may have others. Pure."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import msgspec

from distributed_llm.common.keys import NOBODY, PublicKey
from distributed_llm.common.messages import (
    Capabilities,
    Heartbeat,
    Remeasured,
    StageReady,
    WorkerStatus,
)
from distributed_llm.common.states import StateTable
from distributed_llm.common.types import NO_EPOCH, Epoch, LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.cluster.weight_stock import WeightStock

_FASTEST_LOAD = 1e12
"""Bytes per second at which no machine loads weights; a report of more is no measurement."""

_LEAST_LOADED_BYTES = 64 << 20
"""Bytes of weights below which a load is too short to learn the load speed from."""

_FIRST_PAUSE_S = 10.0
"""Seconds until a worker whose load failed may be given layers again; twice as many each time."""

_MOST_PAUSE_S = 600.0
"""Seconds that such a pause lasts at most."""

_OTHER_MEMORY = 1.1
"""Factor by which the memory of a worker has to change to be taken as another amount."""

_DECAY = 0.8
"""Weight of the past in the running mean of a stage's time per token."""


class WorkerState(Enum):
    """What a worker does for the cluster; the values are shown by `dllm status`.

    Attributes:
        IDLE: it has no layers.
        LOADING: it loads the layers that it was assigned.
        SERVING: its layers are loaded; also while a move loads others beside them.
        UNFIT: it could not load its layers, and is given no others until a pause has passed.
    """

    IDLE = "idle"
    LOADING = "loading"
    SERVING = "serving"
    UNFIT = "unfit"


class WorkerCause(Enum):
    """What changes the state of a worker.

    Attributes:
        ASSIGNED: it was told to load layers.
        LOADED: it has loaded them.
        COMMITTED: a move was committed; it serves the layers that it loaded for it.
        UNASSIGNED: its layers were taken away, because its pipeline was dissolved or moved.
        FAILED: it cannot load layers.
        TRIED_AGAIN: the pause after that has passed, or it has more memory than then.
    """

    ASSIGNED = "assigned"
    LOADED = "loaded"
    COMMITTED = "committed"
    UNASSIGNED = "unassigned"
    FAILED = "failed"
    TRIED_AGAIN = "tried again"


_S, _C = WorkerState, WorkerCause
WORKER_STATES = StateTable(
    "a worker of the cluster",
    _S.IDLE,
    {
        (_S.IDLE, _C.ASSIGNED): _S.LOADING,
        (_S.LOADING, _C.LOADED): _S.SERVING,
        (_S.LOADING, _C.COMMITTED): _S.SERVING,  # it was idle before the move
        (_S.SERVING, _C.COMMITTED): _S.SERVING,
        (_S.LOADING, _C.UNASSIGNED): _S.IDLE,
        (_S.SERVING, _C.UNASSIGNED): _S.IDLE,
        (_S.IDLE, _C.FAILED): _S.UNFIT,
        (_S.UNFIT, _C.TRIED_AGAIN): _S.IDLE,
    },
)


@dataclass
class Worker:
    """One session of a worker: what it reports, and which layers it has.

    Attributes:
        note: why it is unfit.
        told: what its operator was told last; empty once it has got layers.
        failures: loads in a row that failed.
        fit_at: when the pause after the latest of them ends, clock seconds.
        failed_with_bytes: the memory that it offered when that failed.
        leaving: it is to leave, so it is given no layers.
        layers: what it serves or loads, under `epoch`.
        epoch: the newest plan that it was told of and still holds layers of; 0 is none.
        instance: names its process, which may come back in another session.
        wanted_name: the name that it asked for; it has another one while that is taken.
        link: how its results reach the next stage.
        peer_addresses: where other workers may reach it, best first.
        loading: whether it loads layers, by its last heartbeat; perhaps for an older order.
        progress_age_s: since its tasks made progress, by its last heartbeat; 0 without tasks.
        seconds_per_token: running mean over steps that only decode, or None before any.
        key: that it holds; `NOBODY` without keys.
        load_bytes_per_s: at which it loaded weights from its disk last; None before that was
            measured.
        stock: weights on its disk that came from other machines.
        kernels: by what its GPU multiplies weights of integers, for people.
    """

    peer: PeerId
    id: WorkerId
    capabilities: Capabilities
    last_heard_at: float
    instance: str
    wanted_name: str
    note: str = ""
    told: str = ""
    failures: int = 0
    fit_at: float = 0.0
    failed_with_bytes: int = 0
    leaving: bool = False
    layers: LayerRange | None = None
    epoch: Epoch = NO_EPOCH
    link: Literal["direct", "relayed", ""] = ""
    peer_addresses: tuple[str, ...] = ()
    weight_bytes: int = 0
    memory_used_bytes: int = 0
    kv_bytes: int = 0
    loading: bool = False
    progress_age_s: float = 0.0
    tasks_done: int = 0
    compute_s: float = 0.0
    seconds_per_token: float | None = None
    load_bytes_per_s: float | None = None
    stock: WeightStock = field(default_factory=WeightStock)
    kernels: str = ""
    key: PublicKey = NOBODY
    _state: WorkerState = field(default=WORKER_STATES.initial)
    _load: tuple[Epoch, int] = (NO_EPOCH, 0)  # the one that is waited for, and its progress
    _load_at: float = 0.0  # when that changed last, clock seconds

    @property
    def state(self) -> WorkerState:
        """What the worker does for the cluster."""
        return self._state

    def assign(self, layers: LayerRange, *, epoch: Epoch) -> None:
        """Record that it was told to load layers."""
        self._change(WorkerCause.ASSIGNED)
        self._forget_stage()
        self.told = ""
        self.layers, self.epoch = layers, epoch

    def loaded(self, *, weight_bytes: int) -> None:
        """Record that it serves the layers that it was assigned."""
        self._change(WorkerCause.LOADED)
        self.failures = 0
        self.weight_bytes = weight_bytes

    def commit(self, layers: LayerRange, *, epoch: Epoch, weight_bytes: int) -> None:
        """Record that it serves what it loaded for a move."""
        self._change(WorkerCause.COMMITTED)
        self.failures = 0
        self._forget_stage()
        self.layers, self.epoch = layers, epoch
        self.weight_bytes = weight_bytes

    def unassign(self) -> None:
        """Take its layers away; `epoch` stays until the worker is told."""
        self._change(WorkerCause.UNASSIGNED)
        self._forget_stage()
        self.layers = None

    def fail(self, why: str, *, now: float) -> None:
        """Record that it could not load its layers, and has none.

        What was in the way may pass: a full memory, a network drive. So it may try again, after a
        pause that doubles with every failure.
        """
        self._change(WorkerCause.FAILED)
        self.note = why
        self.fit_at = now + min(_FIRST_PAUSE_S * 2.0**self.failures, _MOST_PAUSE_S)
        self.failures = min(self.failures + 1, 64)
        self.failed_with_bytes = self.capabilities.memory_bytes

    def may_try_again(self, *, now: float) -> bool:
        """Return whether it is unfit, and may be given layers again."""
        if self.state is not _S.UNFIT or self.leaving or self.loading:
            return False
        more = self.capabilities.memory_bytes > _OTHER_MEMORY * self.failed_with_bytes
        return more or now >= self.fit_at

    def try_again(self) -> None:
        """Let it be given layers again."""
        self._change(WorkerCause.TRIED_AGAIN)
        self.note = ""

    def pause_text(self, *, now: float) -> str:
        """Return when it may be given layers again, as it follows "again"."""
        if self.loading:
            return "once that load has ended"
        return f"in {max(1.0, self.fit_at - now):.0f} s"

    def _change(self, cause: WorkerCause) -> None:
        self._state = WORKER_STATES.after(self._state, cause)

    def _forget_stage(self) -> None:
        self.link = ""
        self.weight_bytes = 0
        self.seconds_per_token = None

    def load_age_s(self, epoch: Epoch, beat: Heartbeat, *, now: float) -> float:
        """Return how long its load for `epoch` has made no progress, as its heartbeats tell."""
        if self._load != (load := (epoch, beat.load_progress)):
            self._load, self._load_at = load, now
        return now - self._load_at

    def learn_load(self, layers: LayerRange, ready: StageReady, added_bytes: int) -> None:
        """Learn from a load of `layers` that read `added_bytes` of weights."""
        self.stock.loaded(layers, ready)
        self.kernels = ready.kernels
        load_s = ready.load_s - ready.fetch_s
        if added_bytes >= _LEAST_LOADED_BYTES and load_s > 0.0:
            self.load_bytes_per_s = min(added_bytes / load_s, _FASTEST_LOAD)

    def remeasured(self, probe: Remeasured) -> None:
        """Take what the latest probe of its machine measured."""
        memory_bytes = self.capabilities.memory_bytes
        if not memory_bytes / _OTHER_MEMORY <= probe.memory_bytes <= memory_bytes * _OTHER_MEMORY:
            memory_bytes = probe.memory_bytes
        self.capabilities = msgspec.structs.replace(
            self.capabilities,
            memory_bytes=memory_bytes,
            memory_bandwidth_bytes_per_s=probe.memory_bandwidth_bytes_per_s,
            flops_per_s=probe.flops_per_s,
        )

    def count_task(self, compute_s: float, decode_tokens: int) -> None:
        """Count a task that took `compute_s`; `decode_tokens` is 0 if it held part of a prompt."""
        self.tasks_done += 1
        self.compute_s += compute_s
        if decode_tokens:
            sample = compute_s / decode_tokens
            past = sample if self.seconds_per_token is None else self.seconds_per_token
            self.seconds_per_token = _DECAY * past + (1 - _DECAY) * sample

    def status(
        self,
        *,
        next_layers: LayerRange | None,
        prediction_error: float | None,
        gain: float | None,
        advice: str,
        kv_used_bytes: int,
        kv_room_bytes: int,
        now: float,
    ) -> WorkerStatus:
        """Return what is known of it.

        Args:
            next_layers: what a move that is under way gives it instead.
            prediction_error: of its latest tasks, as a share.
            gain: how much more is answered with it than without, as a share, if that is known.
            advice: what that means, for people.
            kv_used_bytes: KV cache of its stage that answers and prefixes take.
            kv_room_bytes: KV cache that its stage may grow to.
            now: clock seconds.
        """
        note = self.note
        if self.state is _S.UNFIT:
            when = self.pause_text(now=now)
            note = f"{note[:4000].rstrip('.')}. It may be given layers again {when}."
        return WorkerStatus(
            name=self.id,
            state="leaving" if self.leaving else self._state.value,
            note=note,
            layers=self.layers,
            next_layers=next_layers,
            epoch=self.epoch,
            link=self.link,
            capabilities=self.capabilities,
            memory_used_bytes=self.memory_used_bytes,
            kv_bytes=self.kv_bytes,
            weight_bytes=self.weight_bytes,
            tasks_done=self.tasks_done,
            compute_s=self.compute_s,
            seconds_per_token=self.seconds_per_token,
            prediction_error=prediction_error,
            gain=gain,
            advice=advice,
            last_heard_s=max(0.0, now - self.last_heard_at),
            kv_used_bytes=kv_used_bytes,
            kv_room_bytes=kv_room_bytes,
            progress_age_s=self.progress_age_s,
            load_bytes_per_s=self.load_bytes_per_s,
            fetch=self.stock.progress,
            kernels=self.kernels,
        )
