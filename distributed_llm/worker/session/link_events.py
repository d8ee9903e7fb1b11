"""What the links to other workers tell the agent, and what the agent tells them to do."""

from dataclasses import dataclass

from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import (
    Address,
    Addresses,
    KVEnd,
    KVPieces,
    KVTaken,
    PeerHello,
    PeerProbe,
    PeerProbed,
    Task,
    ToNextWorker,
    ToPreviousWorker,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import LayerRange, PeerId


@dataclass(frozen=True)
class LinkId:
    """Names a link of this worker to another one.

    Attributes:
        layers: of the transfer that it is for; None is the link to the next stage.
    """

    epoch: int
    layers: LayerRange | None = None


# ------------------------------------------------------------------ events


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
class LinkReached:
    """Event: something at this address of a link speaks our transport."""

    link: LinkId
    address: Address


@dataclass(frozen=True)
class LinkUp:
    """Event: the other worker welcomed the hello; the link may be used.

    Attributes:
        rtt_s: since the latest hello that was said there.
    """

    link: LinkId
    rtt_s: float


@dataclass(frozen=True)
class LinkDown:
    """Event: a link that was up is no more, or takes no more messages; it is closed."""

    link: LinkId


@dataclass(frozen=True)
class LinkReceived:
    """Event: the worker at the other end of a link that is up answered."""

    link: LinkId
    message: PeerProbed | KVTaken


LinkChange = LinkReached | LinkUp | LinkDown | LinkReceived
LinkEvent = PeerReceived | PeerGarbage | LinkChange


# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class OpenLink:
    """Action: dial another worker at all of its addresses; close the link of that name."""

    link: LinkId
    addresses: Addresses


@dataclass(frozen=True)
class Greet:
    """Action: say hello at these addresses of a link; those that are gone again do not matter."""

    link: LinkId
    hello: PeerHello
    addresses: Addresses


@dataclass(frozen=True)
class ForwardTask:
    """Action: send a task over the link of its epoch to the next worker."""

    task: Task
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class SendOverLink:
    """Action: send what is no task over a link."""

    link: LinkId
    message: PeerProbe | KVPieces | KVEnd
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class CloseLink:
    """Action: close a link; what waits there to be sent is void."""

    link: LinkId


@dataclass(frozen=True)
class SendToPeer:
    """Action: answer somebody who connected to this worker."""

    peer: PeerId
    message: ToPreviousWorker


LinkAction = OpenLink | Greet | ForwardTask | SendOverLink | CloseLink | SendToPeer
