"""What the links to other workers tell the agent (events) and what it tells them to do (actions).

A worker is dialled by its peers, and it dials others itself over links: one link to the worker of
the next stage, and one for each KV cache transfer.
"""

from dataclasses import dataclass

from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.keys import NOBODY, PublicKey
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
from distributed_llm.common.types import Epoch, LayerRange, PeerId


@dataclass(frozen=True)
class LinkId:
    """Names a link from this worker to another one.

    Attributes:
        layers: whose KV cache the link transfers; None is the link to the next stage.
    """

    epoch: Epoch
    layers: LayerRange | None = None


# ------------------------------------------------------------------ events


@dataclass(frozen=True)
class PeerReceived:
    """Event: a worker that dialled this one sent a message."""

    peer: PeerId
    message: ToNextWorker
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class PeerGarbage:
    """Event: another worker sent something that cannot be decoded.

    Attributes:
        peer: the worker, if it dialled this one.
        link: over which it came, if that is up.
    """

    error: DistributedLLMError
    peer: PeerId | None = None
    link: LinkId | None = None


@dataclass(frozen=True)
class LinkReached:
    """Event: there is a connection to one of a link's addresses; no hello was sent yet."""

    link: LinkId
    address: Address


@dataclass(frozen=True)
class LinkUp:
    """Event: the other worker welcomed the hello; the link may be used.

    Attributes:
        rtt_s: time from the latest hello on that connection to the welcome.
    """

    link: LinkId
    rtt_s: float


@dataclass(frozen=True)
class LinkDown:
    """Event: a link that was up has broken or is congested; it is closed."""

    link: LinkId


@dataclass(frozen=True)
class LinkReceived:
    """Event: the other worker of a link that is up sent a message."""

    link: LinkId
    message: PeerProbed | KVTaken


LinkChange = LinkReached | LinkUp | LinkDown | LinkReceived
LinkEvent = PeerReceived | PeerGarbage | LinkChange


# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class OpenLink:
    """Action: dial another worker at all of its addresses, closing a link of the same name.

    Attributes:
        key: that the worker has to hold; `NOBODY` without keys.
    """

    link: LinkId
    addresses: Addresses
    key: PublicKey = NOBODY


@dataclass(frozen=True)
class Greet:
    """Action: send a hello to those of these addresses that are connected."""

    link: LinkId
    hello: PeerHello
    addresses: Addresses


@dataclass(frozen=True)
class ForwardTask:
    """Action: send a task to the next worker, over the link of its epoch."""

    task: Task
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class SendOverLink:
    """Action: send any message but a task over a link."""

    link: LinkId
    message: PeerProbe | KVPieces | KVEnd
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class CloseLink:
    """Action: close a link and drop what waits to be sent."""

    link: LinkId


@dataclass(frozen=True)
class SendToPeer:
    """Action: answer a worker that dialled this one."""

    peer: PeerId
    message: ToPreviousWorker


LinkAction = OpenLink | Greet | ForwardTask | SendOverLink | CloseLink | SendToPeer
