"""What the edge tells the agent (events), and what the agent tells the edge to do (actions).

Actions for the compute thread are called orders; each names the event that answers it. What crosses
links to other workers is in `link_events`.
"""

from dataclasses import dataclass
from typing import Literal

from distributed_llm.common.errors import DistributedLLMError, NotAllowed
from distributed_llm.common.messages import (
    Addresses,
    Goodbye,
    HandedOver,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPieces,
    Leaving,
    LinkReport,
    LoadStage,
    MissingPositions,
    NotUnderstood,
    Remeasured,
    StageFailed,
    StageReady,
    StageTrial,
    Task,
    TaskFailed,
    TaskResult,
    ToWorker,
    WorkerHello,
)
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.types import Epoch, LayerRange, SequenceId
from distributed_llm.worker.session.link_events import LinkAction, LinkEvent

# ------------------------------------------------------------------ orders to the compute thread


@dataclass(frozen=True)
class Load:
    """Order: load a stage, answered by `Loaded` or `LoadFailed`.

    A stage that loads beside the served one leaves it alone; any other takes its place.
    """

    session: int
    order: LoadStage


@dataclass(frozen=True)
class Run:
    """Order: run a task, answered by `Computed` or `ComputeFailed`."""

    session: int
    task: Task
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Release:
    """Order: free the KV cache of sequences in the stage of `epoch`."""

    epoch: Epoch
    sequence_ids: tuple[SequenceId, ...]


@dataclass(frozen=True)
class Drop:
    """Order: unload all stages."""


@dataclass(frozen=True)
class Serve:
    """Order: serve the stage of `epoch`, which was loaded beside; unload the one served so far."""

    epoch: Epoch


@dataclass(frozen=True)
class Unload:
    """Order: undo the move to `epoch`: unload its stage and forget what was exported to it."""

    epoch: Epoch


@dataclass(frozen=True)
class ExportKV:
    """Order: return the next message of a KV cache transfer from the served stage.

    Answered by `KVExported` or `KVOrderFailed`.

    Attributes:
        epoch: to which the layers move.
        number: of the message in the transfer, from 1.
        rest: whether no step runs any more, so that `KVEnd` follows the last pieces.
        set_back: see `HandOver`.
    """

    session: int
    epoch: Epoch
    layers: LayerRange
    number: int
    rest: bool
    set_back: tuple[SequenceId, ...] = ()


@dataclass(frozen=True)
class ImportKV:
    """Order: add a message of a KV cache transfer to what the prepared stage has received.

    Answered by `KVImported` or `KVOrderFailed`.
    """

    session: int
    message: KVPieces | KVEnd
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class AssembleKV:
    """Order: assemble the KV cache of `epoch`'s stage from the served stage's and the imports.

    Answered by `KVAssembled` or `KVOrderFailed`.
    """

    session: int
    epoch: Epoch


@dataclass(frozen=True)
class Probe:
    """Order: measure this machine's speed again, answered by `Probed`."""

    session: int


KVOrder = ExportKV | ImportKV | AssembleKV

VoidableOrder = Load | Run | KVOrder | Probe
"""Orders that the compute thread skips if their results are no longer wanted when it gets there."""

Order = VoidableOrder | Release | Drop | Serve | Unload


# ------------------------------------------------------------------ events: the coordinator


@dataclass(frozen=True)
class Connected:
    """Event: the connection to the coordinator stands.

    Attributes:
        peer_addresses: "HOST:PORT" at which other workers may reach this one, best first.
    """

    peer_addresses: Addresses = ()


@dataclass(frozen=True)
class Disconnected:
    """Event: the connection to the coordinator was lost."""


@dataclass(frozen=True)
class Rejected:
    """Event: the coordinator and this worker do not accept each other's keys."""

    error: NotAllowed


@dataclass(frozen=True)
class Received:
    """Event: the coordinator sent a message."""

    message: ToWorker
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Garbage:
    """Event: the coordinator sent something that cannot be decoded."""

    error: DistributedLLMError


@dataclass(frozen=True)
class Signalled:
    """Event: the operating system sent this process the signal `signal`, to end it."""

    signal: int


@dataclass(frozen=True)
class Stalled:
    """Event: the worker itself stood still; the clock stood still with it."""


# ------------------------------------------------------------------ events: the compute thread


@dataclass(frozen=True)
class Loaded:
    """Event: the layers of `epoch` are in memory.

    Attributes:
        load_s: time that loading took.
        weight_bytes: memory that the weights take.
        kv_tokens: positions that the KV cache has room for, in all layers.
        trials: times of trial steps, if any were wanted.
        kv_token_bytes: what one position takes.
        kv_windowed_bytes: what of that is in layers with a window.
        kv_window: positions that the widest of these see.
        fetched_bytes: of weights that came from other machines.
        fetch_s: how long loading waited for them.
        gives_weights: whether this worker can give the weights of the layers to others.
        kernels: see `StageReady`.
    """

    session: int
    epoch: Epoch
    load_s: float
    weight_bytes: int
    kv_tokens: int
    trials: tuple[StageTrial, ...] = ()
    kv_token_bytes: int = 1
    kv_windowed_bytes: int = 0
    kv_window: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0
    gives_weights: bool = False
    kernels: str = ""


@dataclass(frozen=True)
class LoadFailed:
    """Event: the layers of `epoch` could not be loaded."""

    session: int
    epoch: Epoch
    error: DistributedLLMError


@dataclass(frozen=True)
class Computed:
    """Event: a task has run.

    Attributes:
        specs: of the resulting tensors: hidden states in the wire dtype, or the last stage's answer
            as in `TaskResult`.
        frames: their bytes.
        compute_us: total time.
        layers_us: the part of `compute_us` spent inside the layers.
        queued_us: time from the task's arrival until it ran.
    """

    run: Run
    specs: tuple[TensorSpec, ...]
    frames: tuple[Frame, ...]
    compute_us: int
    layers_us: int
    queued_us: int


@dataclass(frozen=True)
class ComputeFailed:
    """Event: a task could not be run.

    Attributes:
        missing: positions that the KV cache would have needed.
        sequence_ids: the sequences because of which it failed; empty if that is not known.
    """

    run: Run
    error: DistributedLLMError
    missing: tuple[MissingPositions, ...] = ()
    sequence_ids: tuple[SequenceId, ...] = ()


@dataclass(frozen=True)
class KVExported:
    """Event: the next message of a transfer was made; it is None if everything was sent."""

    order: ExportKV
    message: KVPieces | KVEnd | None
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class KVImported:
    """Event: a message of a transfer was added to what the prepared stage has received."""

    order: ImportKV


@dataclass(frozen=True)
class KVAssembled:
    """Event: the prepared stage has its KV cache."""

    order: AssembleKV


@dataclass(frozen=True)
class KVOrderFailed:
    """Event: KV cache could not be exported, imported or assembled."""

    order: KVOrder
    error: DistributedLLMError


@dataclass(frozen=True)
class Probed:
    """Event: what the machine can do was measured again; as in `Capabilities`."""

    session: int
    memory_bandwidth_bytes_per_s: float
    flops_per_s: float
    memory_bytes: int


@dataclass(frozen=True)
class ComputeThreadFailed:
    """Event: the compute thread met a bug, or its device failed; it has ended.

    Nobody knows what its stages hold.
    """

    error: DistributedLLMError


KVEvent = KVExported | KVImported | KVAssembled | KVOrderFailed
ComputeEvent = (
    Loaded | LoadFailed | Computed | ComputeFailed | KVEvent | Probed | ComputeThreadFailed
)
Event = (
    LinkEvent
    | Connected
    | Disconnected
    | Rejected
    | Received
    | Garbage
    | Signalled
    | Stalled
    | ComputeEvent
)


# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class Send:
    """Action: send a message to the coordinator."""

    message: (
        WorkerHello
        | StageReady
        | StageFailed
        | TaskResult
        | TaskFailed
        | NotUnderstood
        | LinkReport
        | Remeasured
        | KVCopied
        | HandedOver
        | KVFailed
        | Leaving
        | Goodbye
    )
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class SendHeartbeat:
    """Action: send the coordinator a heartbeat with this moment's vitals.

    Attributes:
        epochs: of the stages that are loaded or loading.
    """

    epochs: tuple[Epoch, ...]


@dataclass(frozen=True)
class Reconnect:
    """Action: close the connection to the coordinator and open a new one."""


@dataclass(frozen=True)
class Log:
    """Action: write a line for the operator."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True)
class End:
    """Action: end the worker normally, once all messages are sent.

    Attributes:
        signal: number of the signal that asked for it; 0 is none.
    """

    signal: int


@dataclass(frozen=True)
class Fail:
    """Action: end the worker with an error."""

    error: DistributedLLMError


Action = Order | LinkAction | Send | SendHeartbeat | Reconnect | Log | End | Fail
