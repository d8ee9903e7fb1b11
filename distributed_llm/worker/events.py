"""What the worker's edge tells the agent, and what the agent tells the edge to do."""

from dataclasses import dataclass
from typing import Literal

from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import (
    Address,
    Addresses,
    Goodbye,
    KVEnd,
    KVPieces,
    LinkReport,
    LoadStage,
    MissingPositions,
    PeerHello,
    PeerWelcome,
    StageFailed,
    StageReady,
    Task,
    TaskFailed,
    TaskResult,
    ToNextWorker,
    ToWorker,
    WorkerHello,
)
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.types import LayerRange, PeerId

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


# ------------------------------------------------------------------ events: other workers


@dataclass(frozen=True)
class PeerReceived:
    """Event: somebody who connected to this worker sent a message."""

    peer: PeerId
    message: ToNextWorker
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class PeerGarbage:
    """Event: somebody who connected to this worker sent what is no message."""

    error: DistributedLLMError


@dataclass(frozen=True)
class NextReached:
    """Event: something at this address of the link of `epoch` speaks our transport."""

    epoch: int
    address: Address


@dataclass(frozen=True)
class LinkUp:
    """Event: the next worker welcomed the hello of `epoch`; tasks may be handed on.

    Attributes:
        rtt_s: since the latest hello that was said there.
    """

    epoch: int
    rtt_s: float


@dataclass(frozen=True)
class LinkDown:
    """Event: the link of `epoch` that was up is no more, or takes no more tasks; it is closed."""

    epoch: int


# ------------------------------------------------------------------ events: the compute thread


@dataclass(frozen=True)
class Loaded:
    """Event: the layers of `epoch` are in memory.

    Attributes:
        kv_tokens: positions that the KV cache has room for.
    """

    session: int
    epoch: int
    load_s: float
    weight_bytes: int
    kv_tokens: int


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


Event = (
    Connected
    | Disconnected
    | Received
    | Garbage
    | PeerReceived
    | PeerGarbage
    | NextReached
    | LinkUp
    | LinkDown
    | Loaded
    | LoadFailed
    | Computed
    | Broke
    | Exported
    | Imported
    | Inherited
    | HandOverFailed
)


# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class Say:
    """Action: send a message to the coordinator."""

    message: WorkerHello | StageReady | StageFailed | TaskResult | TaskFailed | LinkReport | Goodbye
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Beat:
    """Action: send a heartbeat with the vitals of the moment."""

    epoch: int


@dataclass(frozen=True)
class OpenLink:
    """Action: dial the next worker at all of its addresses; close the link that there was."""

    epoch: int
    addresses: Addresses


@dataclass(frozen=True)
class Greet:
    """Action: say hello at these addresses of the link; those that are gone again do not matter."""

    hello: PeerHello
    addresses: Addresses


@dataclass(frozen=True)
class HandOn:
    """Action: send a task to the next worker, over the link that is up."""

    task: Task
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class CloseLink:
    """Action: close the link to the next worker; what waits there to be sent is void."""


@dataclass(frozen=True)
class PeerSay:
    """Action: answer somebody who connected to this worker."""

    peer: PeerId
    message: PeerWelcome


@dataclass(frozen=True)
class Reconnect:
    """Action: close the connection to the coordinator and open a new one."""


@dataclass(frozen=True)
class Log:
    """Action: write a line for the operator."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True)
class Exit:
    """Action: end the worker."""

    error: DistributedLLMError


Action = (
    Say
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
    | OpenLink
    | Greet
    | HandOn
    | CloseLink
    | PeerSay
    | Reconnect
    | Log
    | Exit
)
