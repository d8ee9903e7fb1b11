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
class Export:
    """Action: hand out the next message with KV cache of these layers of the served stage.

    Answered by `Exported`.

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
class Import:
    """Action: keep what another worker sent for the stage of `epoch`; answered by `Imported`."""

    session: int
    message: KVPieces | KVEnd
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Inherit:
    """Action: the stage of `epoch` takes over the KV cache of the served one and of the imports.

    Answered by `Inherited`.
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
class Broke:
    """Event: a task could not be run."""

    run: Run
    error: DistributedLLMError
    missing: tuple[MissingPositions, ...] = ()


@dataclass(frozen=True)
class Exported:
    """Event: the next message of a transfer; None if there is nothing to be sent just now."""

    order: Export
    message: KVPieces | KVEnd | None
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Imported:
    """Event: what another worker sent is kept."""

    order: Import


@dataclass(frozen=True)
class Inherited:
    """Event: the stage of `epoch` has its KV cache."""

    order: Inherit


@dataclass(frozen=True)
class HandOverFailed:
    """Event: an order to export, import or inherit could not be carried out."""

    order: Export | Import | Inherit
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
    | Broke
    | Exported
    | Imported
    | Inherited
    | HandOverFailed
    | Probed
)


# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class Say:
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
class Beat:
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
class Exit:
    """Action: end the worker because of an error."""

    error: DistributedLLMError


Action = (
    LinkAction
    | Say
    | Beat
    | Load
    | Run
    | Release
    | Drop
    | Serve
    | Unload
    | Export
    | Import
    | Inherit
    | Probe
    | Reconnect
    | Log
    | End
    | Exit
)
