"""What fetching is told and what it orders: its values, events and actions. Pure.

How an edge serves them, per tensor: `Claim` is answered by `TensorClaimed`, `TensorBusy` or
`TensorHere`. Then data that was asked for with `Ask` comes in, and `ChunkArrived` tells of it. Only
if `Keep` is among the actions that this returns are the bytes kept: they are appended to the
partial file as soon as all before them are in it, and wait in memory till then. `Written` tells
how far the file has come, `Check` has it hashed, which `TensorStored` or `TensorWrong` answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

GRAIN_BYTES = 64 << 10
"""All chunks begin and end at multiples of this in their tensor, but at its end and where a partial
file ended. So bytes that were fetched twice can be compared grain by grain, however they came."""

MAX_SOURCES = 64
"""Sources of one fetch at most."""

WINDOW_BYTES = 48 << 20
"""Bytes that are asked for, or have arrived and are not in their file, at most."""


@dataclass(frozen=True)
class Wanted:
    """A tensor that is to be fetched.

    Attributes:
        sha256: of its bytes, in hexadecimal; its name among sources.
        nbytes: its size.
        name: for people.
        done_bytes: that a partial file is believed to hold; for progress only.
    """

    sha256: str
    nbytes: int
    name: str
    done_bytes: int = 0


@dataclass(frozen=True)
class Source:
    """Somebody who has tensors.

    Attributes:
        name: for people, and in events.
        holds: returns whether it is expected to have the tensor with this SHA-256.
        trusted: whether it is the coordinator.
    """

    name: str
    holds: Callable[[str], bool]
    trusted: bool = False


# ------------------------------------------------------------------ events


@dataclass(frozen=True)
class SourceAdded:
    """There is another source; or the one of this name is now expected to hold other tensors."""

    source: Source


@dataclass(frozen=True)
class SourceUp:
    """A connection to a source is there."""

    source: str


@dataclass(frozen=True)
class SourceDown:
    """There is no connection to a source (any more); it may come back.

    Attributes:
        why: for people.
    """

    source: str
    why: str


@dataclass(frozen=True)
class SourceFailed:
    """A source will not come back.

    Attributes:
        why: for people.
    """

    source: str
    why: str


@dataclass(frozen=True)
class ChunkArrived:
    """Bytes have come; they are dropped unless `Keep` orders otherwise."""

    source: str
    sha256: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ChunkAbsent:
    """A source does not have the tensor of a chunk that it was asked for."""

    source: str
    sha256: str
    offset: int


@dataclass(frozen=True)
class ChunkRefused:
    """A source has the tensor of a chunk that it was asked for, and cannot give the chunk.

    Attributes:
        why: for people.
    """

    source: str
    sha256: str
    offset: int
    why: str


@dataclass(frozen=True)
class TensorClaimed:
    """Nobody else on this machine writes the tensor; its partial file has so many bytes."""

    sha256: str
    done_bytes: int


@dataclass(frozen=True)
class TensorBusy:
    """Another process of this machine is writing the tensor."""

    sha256: str


@dataclass(frozen=True)
class TensorHere:
    """The tensor is in the cache."""

    sha256: str


@dataclass(frozen=True)
class Written:
    """The partial file of a tensor now has so many bytes."""

    sha256: str
    done_bytes: int


@dataclass(frozen=True)
class TensorStored:
    """A tensor has the right hash and is in the cache.

    Attributes:
        suspects: sources that gave other bytes for it when its hash was wrong, found by comparing
            each `GRAIN_BYTES` of what came then and now.
    """

    sha256: str
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorWrong:
    """A tensor had the wrong hash, and its partial file is empty again; the claim still holds."""

    sha256: str


@dataclass(frozen=True)
class WantedMore:
    """More tensors are wanted, after those so far.

    Attributes:
        last: whether there will be no more.
    """

    wanted: tuple[Wanted, ...]
    last: bool


Event = (
    SourceAdded
    | SourceUp
    | SourceDown
    | SourceFailed
    | ChunkArrived
    | ChunkAbsent
    | ChunkRefused
    | TensorClaimed
    | TensorBusy
    | TensorHere
    | Written
    | TensorStored
    | TensorWrong
    | WantedMore
)


# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class Claim:
    """See whether a tensor is in the cache or written by another process; else take it."""

    sha256: str


@dataclass(frozen=True)
class Ask:
    """Ask a source for bytes `[offset, offset + length)` of a tensor."""

    source: str
    sha256: str
    offset: int
    length: int


@dataclass(frozen=True)
class Keep:
    """Keep the bytes of which `ChunkArrived` told just now."""

    source: str
    sha256: str
    offset: int


@dataclass(frozen=True)
class Forget:
    """Drop all bytes of a tensor, in memory and in its partial file; the claim still holds."""

    sha256: str


@dataclass(frozen=True)
class Check:
    """Hash a tensor, whose bytes are all in its file."""

    sha256: str


@dataclass(frozen=True)
class CloseSource:
    """Close the connection to a source for good.

    Attributes:
        why: for people.
    """

    source: str
    why: str


@dataclass(frozen=True)
class Log:
    """Write a line to the log."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True)
class Finished:
    """All tensors are in the cache. Nothing is ordered any more."""


@dataclass(frozen=True)
class Failed:
    """The tensors cannot be had. Nothing is ordered any more.

    Attributes:
        message: what is missing, which sources were tried, and why each did not do; for people.
    """

    message: str


Action = Claim | Ask | Keep | Forget | Check | CloseSource | Log | Finished | Failed
