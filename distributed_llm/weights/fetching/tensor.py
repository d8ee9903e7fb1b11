"""One tensor on its way: which bytes are written, which are asked for and of whom. Pure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from distributed_llm.common.states import StateTable
from distributed_llm.weights.fetching.events import GRAIN_BYTES, Wanted
from distributed_llm.weights.fetching.link import Link

DISK = ""
"""Stands among the givers for a partial file of an earlier time."""


class TensorState(Enum):
    """How far a tensor is.

    Attributes:
        WAITING: nothing is done for it yet.
        CLAIMING: the cache is looked into.
        BUSY: another process of this machine writes it.
        OPEN: its bytes are fetched.
        CHECKING: it is hashed.
        DONE: it is in the cache.
    """

    WAITING = "waiting"
    CLAIMING = "claiming"
    BUSY = "busy"
    OPEN = "open"
    CHECKING = "checking"
    DONE = "done"


class TensorCause(Enum):
    """What changes the state of a tensor.

    Attributes:
        LOOKED_FOR: it is its turn, or time to look again.
        WAS_BUSY: another process of this machine writes it.
        WAS_HERE: it is in the cache.
        CLAIMED: this process writes it.
        ALL_WRITTEN: all its bytes are in its file.
        WAS_WRONG: it does not have its hash.
        WAS_RIGHT: it has, and is in the cache.
    """

    LOOKED_FOR = "looked for"
    WAS_BUSY = "was busy"
    WAS_HERE = "was here"
    CLAIMED = "claimed"
    ALL_WRITTEN = "all written"
    WAS_WRONG = "was wrong"
    WAS_RIGHT = "was right"


_S, _C = TensorState, TensorCause
TENSOR_STATES = StateTable(
    "a tensor that is fetched",
    _S.WAITING,
    {
        (_S.WAITING, _C.LOOKED_FOR): _S.CLAIMING,
        (_S.BUSY, _C.LOOKED_FOR): _S.CLAIMING,
        (_S.CLAIMING, _C.WAS_BUSY): _S.BUSY,
        (_S.CLAIMING, _C.WAS_HERE): _S.DONE,
        (_S.CLAIMING, _C.CLAIMED): _S.OPEN,
        (_S.OPEN, _C.ALL_WRITTEN): _S.CHECKING,
        (_S.CHECKING, _C.WAS_WRONG): _S.OPEN,
        (_S.CHECKING, _C.WAS_RIGHT): _S.DONE,
    },
)


def up_to_a_grain(offset: int, length: int, most: int) -> int:
    """Return how much of `length` bytes from `offset` make a chunk of at most `most` bytes.

    Args:
        offset: in the tensor.
        length: bytes, above 0.
        most: a multiple of `GRAIN_BYTES`.
    """
    return min(length, most - offset % GRAIN_BYTES)


@dataclass
class Chunk:
    """Bytes that were asked for and are not in the file yet.

    Attributes:
        offset: in the tensor.
        length: bytes.
        askers: names of the sources that were asked for exactly these bytes and have not answered.
        arrived: whether the bytes have come, and wait for those before them.
    """

    offset: int
    length: int
    askers: set[str] = field(default_factory=set)
    arrived: bool = False


class Tensor:
    """One tensor.

    Attributes:
        wanted: as given.
        state: see `TENSOR_STATES`.
        written: bytes in its file.
        cut: bytes that are in its file or in `chunks`.
        chunks: between `written` and `cut`, by offset and in its order.
        givers: names of who gave what is in file and memory.
        alone: whether all bytes are to be of one source, since they were wrong before.
        only: the source that they are to be of; None until one is chosen.
        trusted_errors: how often the trusted source alone gave wrong bytes.
        unexplained_errors: how often bytes of several sources were wrong.
        look_at: when to look again whether it is still busy, clock seconds.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.state = TENSOR_STATES.initial
        self.written = self.cut = wanted.done_bytes
        self.chunks: dict[int, Chunk] = {}
        self.givers: set[str] = set()
        self.alone = False
        self.only: str | None = None
        self.trusted_errors = 0
        self.unexplained_errors = 0
        self.look_at = math.inf

    def enter(self, cause: TensorCause) -> None:
        """Go to the state that follows."""
        self.state = TENSOR_STATES.after(self.state, cause)

    def begin(self, done_bytes: int) -> None:
        """Go on from a partial file.

        Raises:
            ValueError: the file is longer than the tensor.
        """
        if not 0 <= done_bytes <= self.wanted.nbytes:
            raise ValueError(f"{done_bytes} bytes of {self.wanted.name} ({self.wanted.nbytes})")
        self.written = self.cut = done_bytes
        self.chunks = {}
        self.givers = {DISK} if done_bytes else set()

    def uncut(self, most: int) -> tuple[int, int] | None:
        """Return offset and length of the next bytes to ask for; None if all were asked for.

        Args:
            most: length at most, a multiple of `GRAIN_BYTES`.
        """
        if self.cut == self.wanted.nbytes:
            return None
        return self.cut, up_to_a_grain(self.cut, self.wanted.nbytes - self.cut, most)

    def cut_off(self, offset: int, length: int) -> Chunk:
        """Return the chunk with these bytes: a new one, or the beginning of one that is lost."""
        chunk = self.chunks.get(offset)
        if chunk is None:
            assert offset == self.cut
            self.cut += length
            chunk = self.chunks[offset] = Chunk(offset, length)
        elif chunk.length > length:
            rest = Chunk(offset + length, chunk.length - length)
            chunk = Chunk(offset, length)
            self.chunks |= {offset: chunk, rest.offset: rest}
            self.chunks = dict(sorted(self.chunks.items()))
        return chunk

    def written_to(self, done_bytes: int) -> None:
        """The file now has so many bytes.

        Raises:
            ValueError: bytes are among them that have not come.
        """
        written = [chunk for chunk in self.chunks.values() if chunk.offset < done_bytes]
        if not self.written <= done_bytes <= self.cut or not all(c.arrived for c in written):
            raise ValueError(f"{done_bytes} bytes of {self.wanted.name} have not come")
        self.written = done_bytes
        for chunk in written:
            if chunk.offset + chunk.length <= done_bytes:
                del self.chunks[chunk.offset]

    def missing(self) -> Iterator[Chunk]:
        """Yield the chunks that have not come, in order."""
        return (chunk for chunk in self.chunks.values() if not chunk.arrived)

    def may_be_of(self, link: Link, now: float) -> bool:
        """Return whether a source may be asked for bytes of it now."""
        is_other = self.alone and self.only != link.source.name
        return self.state is _S.OPEN and not is_other and link.may_give(self.wanted.sha256, now)

    @property
    def waits_for_bytes(self) -> bool:
        """Whether bytes have to come from a source."""
        return self.state is _S.OPEN and (
            self.cut < self.wanted.nbytes or any(not c.arrived for c in self.chunks.values())
        )

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert 0 <= self.written <= self.cut <= self.wanted.nbytes
        at = self.written
        for offset, chunk in self.chunks.items():
            assert offset == chunk.offset
            assert chunk.offset <= at if at == self.written else chunk.offset == at
            at = chunk.offset + chunk.length
        assert at == self.cut
        assert not self.chunks or self.state is _S.OPEN
        assert self.only is None or self.alone
        assert (self.look_at < math.inf) == (self.state is _S.BUSY)
