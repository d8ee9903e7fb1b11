"""What the worker's edge tells the agent, and what the agent tells the edge to do."""

from dataclasses import dataclass
from typing import Literal

from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import (
    Addresses,
    Goodbye,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPieces,
    Leaving,
    LinkReport,
    LoadStage,
    MissingPositions,
    Remeasured,
    StageFailed,
    StageReady,
    StageTrial,
    Task,
    TaskFailed,
    TaskResult,
    TookOver,
    ToWorker,
    WorkerHello,
)
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.session.link_events import LinkAction, LinkEvent

# ------------------------------------------------------------------ orders, which are actions too


@dataclass(frozen=True)
class Load:
    """Action: load a stage; give up all others first, or keep the served one if it is beside."""

    session: int
    order: LoadStage


@dataclass(frozen=True)
class Run:
    """Action: run a task."""

    session: int
    task: Task
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Release:
    """Action: free the KV cache of sequences in the stage of `epoch`."""

    epoch: int
    sequence_ids: tuple[int, ...]


@dataclass(frozen=True)
class Drop:
    """Action: give up all stages."""


@dataclass(frozen=True)
class Serve:
    """Action: the stage of `epoch`, loaded beside, is the served one now; give up the other."""

    epoch: int


@dataclass(frozen=True)
class Unload:
    """Action: give up what was loaded beside under `epoch`, and what is exported to it."""

    epoch: int


@dataclass(frozen=True)
class ExportKV:
    """Action: hand out the next message with KV cache of these layers of the served stage.

    Answered by `KVExported`.

    Attributes:
        epoch: in which somebody takes the layers over.
        number: of the message in the transfer, from 1.
        rest: no step runs any more: after the last pieces comes what is held.
    """

    session: int
    epoch: int
    layers: LayerRange
    number: int
    rest: bool


@dataclass(frozen=True)
class ImportKV:
    """Action: keep what another worker sent for the stage of `epoch`; answered by `KVImported`."""

    session: int
    message: KVPieces | KVEnd
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class AssembleKV:
    """Action: the stage of `epoch` takes over the KV cache of the served one and of the imports.

    Answered by `KVAssembled`.
    """

    session: int
    epoch: int


@dataclass(frozen=True)
class Probe:
    """Action: measure again how fast this machine is; answered by `Probed`."""

    session: int


# ------------------------------------------------------------------ events: the coordinator


@dataclass(frozen=True)
class Connected:
    """Event: the coordinator's port was reached.

    Attributes:
        peer_addresses: "HOST:PORT" at which other workers may reach this one, best first.
    """

    peer_addresses: Addresses = ()


@dataclass(frozen=True)
class Disconnected:
    """Event: the connection was lost."""


@dataclass(frozen=True)
class Received:
    """Event: the coordinator sent a message."""

    message: ToWorker
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Garbage:
    """Event: the coordinator sent what is no message."""

    error: DistributedLLMError


@dataclass(frozen=True)
class Signalled:
    """Event: somebody at this machine wants the worker to end, and sent the signal `number`."""

    number: int


# ------------------------------------------------------------------ events: the compute thread


@dataclass(frozen=True)
class Loaded:
    """Event: the layers of `epoch` are in memory.

    Attributes:
        kv_tokens: positions that the KV cache has room for.
        trials: what steps took that were tried after that.
    """

    session: int
    epoch: int
    load_s: float
    weight_bytes: int
    kv_tokens: int
    trials: tuple[StageTrial, ...] = ()


@dataclass(frozen=True)
class LoadFailed:
    """Event: the layers of `epoch` cannot be loaded."""

    session: int
    epoch: int
    error: DistributedLLMError


@dataclass(frozen=True)
class Computed:
    """Event: a task was run.

    Attributes:
        specs: of what it gave: hidden states in the wire dtype, or what the last stage answers.
        layers_us: of `compute_us`, inside the layers.
        queued_us: from its arrival until it ran.
    """

    run: Run
    specs: tuple[TensorSpec, ...]
    frames: tuple[Frame, ...]
    compute_us: int
    layers_us: int
    queued_us: int


@dataclass(frozen=True)
class ComputeFailed:
    """Event: a task could not be run."""

    run: Run
    error: DistributedLLMError
    missing: tuple[MissingPositions, ...] = ()


@dataclass(frozen=True)
class KVExported:
    """Event: the next message of a transfer; None if there is nothing to be sent just now."""

    order: ExportKV
    message: KVPieces | KVEnd | None
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class KVImported:
    """Event: what another worker sent is kept."""

    order: ImportKV


@dataclass(frozen=True)
class KVAssembled:
    """Event: the stage of `epoch` has its KV cache."""

    order: AssembleKV


@dataclass(frozen=True)
class KVOrderFailed:
    """Event: an order to export, import or inherit could not be carried out."""

    order: ExportKV | ImportKV | AssembleKV
    error: DistributedLLMError


@dataclass(frozen=True)
class Probed:
    """Event: this machine was measured again."""

    session: int
    memory_bandwidth_bytes_per_s: float
    flops_per_s: float


Event = (
    LinkEvent
    | Connected
    | Disconnected
    | Received
    | Garbage
    | Signalled
    | Loaded
    | LoadFailed
    | Computed
    | ComputeFailed
    | KVExported
    | KVImported
    | KVAssembled
    | KVOrderFailed
    | Probed
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
        | LinkReport
        | Remeasured
        | KVCopied
        | TookOver
        | KVFailed
        | Leaving
        | Goodbye
    )
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class SendHeartbeat:
    """Action: send a heartbeat with the vitals of the moment."""

    epochs: tuple[int, ...]


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
    """Action: end the worker as was wished, after what was said is sent.

    Attributes:
        number: of the signal that wished it; 0 is none.
    """

    number: int


@dataclass(frozen=True)
class Fail:
    """Action: end the worker because of an error."""

    error: DistributedLLMError


Action = (
    LinkAction
    | Send
    | SendHeartbeat
    | Load
    | Run
    | Release
    | Drop
    | Serve
    | Unload
    | ExportKV
    | ImportKV
    | AssembleKV
    | Probe
    | Reconnect
    | Log
    | End
    | Fail
)
