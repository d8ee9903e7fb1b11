"""What is wanted, what is under way and who there is: the state that fetching decides on. Pure."""

import math
from collections.abc import Iterable

from distributed_llm.common.messages import MAX_CHUNK_BYTES
from distributed_llm.weights.fetching.events import (
    MAX_SOURCES,
    WINDOW_BYTES,
    Claim,
    Source,
    Wanted,
)
from distributed_llm.weights.fetching.link import Link
from distributed_llm.weights.fetching.tensor import Chunk, Tensor, TensorCause, TensorState

MOST_OPEN = 64
"""Tensors that are fetched at a time at most; each is an open file."""

SECOND_COPIES_BYTES = 8 * MAX_CHUNK_BYTES
"""Part of the window that only second copies may take."""

_S, _C = TensorState, TensorCause


class Book:
    """The tensors and the sources of one fetch.

    Attributes:
        tensors: by SHA-256, in the order in which they are needed.
        waiting: those that nothing is done for yet, in the same order.
        busy: those that another process writes.
        open: those from `CLAIMING` to `CHECKING`, at most `MOST_OPEN`.
        links: by the names of sources, at most `MAX_SOURCES`.
        bytes_total: of all tensors.
    """

    def __init__(self, wanted: Iterable[Wanted], sources: Iterable[Source]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.waiting: dict[str, Tensor] = {}
        self.busy: dict[str, Tensor] = {}
        self.open: dict[str, Tensor] = {}
        self.links: dict[str, Link] = {}
        self.bytes_total = 0
        self.want(wanted)
        for source in sources:
            self.add(source)

    # -------------------------------------------------------------- sources

    def add(self, source: Source) -> None:
        """Take a source.

        Raises:
            ValueError: there are `MAX_SOURCES` already.
        """
        if len(self.links) == MAX_SOURCES:
            raise ValueError(f"more than {MAX_SOURCES} sources")
        self.links[source.name] = Link(source)

    def heard(self) -> list[Link]:
        """Return the sources that are up and not silent."""
        return [link for link in self.links.values() if link.up and not link.silent]

    def drop_owed(self, link: Link, why: str) -> None:
        """A source is not up any more: it will not send what it owes."""
        for sha256, offset in link.gone(why):
            self.unasked(link.source.name, sha256, offset)

    def unasked(self, name: str, sha256: str, offset: int) -> None:
        """A source will not send a chunk."""
        chunk = self.tensors[sha256].chunks.get(offset)
        if chunk is not None:
            chunk.askers.discard(name)

    def senders(self, chunk: Chunk) -> list[Link]:
        """Return the sources that were asked for a chunk, and are not silent."""
        return [link for name in chunk.askers if not (link := self.links[name]).silent]

    # -------------------------------------------------------------- tensors

    def want(self, wanted: Iterable[Wanted]) -> None:
        """Take more tensors; those that are known already count once.

        Raises:
            ValueError: two differ in size, and have the same SHA-256.
        """
        for each in wanted:
            known = self.tensors.get(each.sha256)
            if known is None:
                tensor = self.tensors[each.sha256] = self.waiting[each.sha256] = Tensor(each)
                self.bytes_total += tensor.wanted.nbytes
            elif known.wanted.nbytes != each.nbytes:
                raise ValueError(f"{each.name} and {known.wanted.name} differ in size")

    def claim(self, tensor: Tensor) -> Claim:
        """Claim a tensor that is waiting or busy."""
        sha256 = tensor.wanted.sha256
        tensor.enter(_C.LOOKED_FOR)
        tensor.look_at = math.inf
        before = self.waiting if sha256 in self.waiting else self.busy
        self.open[sha256] = before.pop(sha256)
        return Claim(sha256)

    def put_off(self, tensor: Tensor, look_at: float) -> None:
        """Another process writes a tensor."""
        sha256 = tensor.wanted.sha256
        tensor.enter(_C.WAS_BUSY)
        tensor.look_at = look_at
        self.busy[sha256] = self.open.pop(sha256)

    def done(self, tensor: Tensor, cause: TensorCause) -> None:
        """A tensor is in the cache."""
        tensor.enter(cause)
        tensor.written = tensor.cut = tensor.wanted.nbytes
        tensor.givers = set()
        del self.open[tensor.wanted.sha256]

    @property
    def all_done(self) -> bool:
        """Whether all tensors that are wanted so far are in the cache."""
        return not (self.waiting or self.busy or self.open)

    def lacking(self) -> list[Tensor]:
        """Return the open tensors of which bytes have to come from a source."""
        return [tensor for tensor in self.open.values() if tensor.waits_for_bytes]

    def lost(self) -> list[tuple[Tensor, Chunk]]:
        """Return the chunks that were asked for and that nobody sends any more, in order."""
        return [
            (tensor, chunk)
            for tensor in self.open.values()
            for chunk in tensor.missing()
            if not self.senders(chunk)
        ]

    # -------------------------------------------------------------- the window

    @property
    def room_bytes(self) -> int:
        """Bytes that may be asked for that nobody was asked for."""
        return WINDOW_BYTES - SECOND_COPIES_BYTES - self._window_bytes()

    @property
    def room_for_copies_bytes(self) -> int:
        """Bytes that may be asked for a second time."""
        owed = sum(link.owed_bytes for link in self.heard())
        first = sum(
            chunk.length
            for tensor in self.open.values()
            for chunk in tensor.missing()
            if self.senders(chunk)
        )
        return WINDOW_BYTES - self._window_bytes() - (owed - first)

    def _window_bytes(self) -> int:
        """Bytes that were asked for, of whomever, and are not written."""
        return sum(tensor.cut - tensor.written for tensor in self.open.values())

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert len(self.links) <= MAX_SOURCES
        assert len(self.open) <= MOST_OPEN
        assert self.room_bytes >= 0
        for link in self.links.values():
            link.validate()
        for sha256, tensor in self.tensors.items():
            tensor.validate()
            assert (sha256 in self.waiting) == (tensor.state is _S.WAITING)
            assert (sha256 in self.busy) == (tensor.state is _S.BUSY)
            assert (sha256 not in self.open) == (tensor.state in (_S.WAITING, _S.BUSY, _S.DONE))
            for chunk in tensor.chunks.values():
                for name in chunk.askers:
                    assert self.links[name].owes(sha256, chunk.offset)
