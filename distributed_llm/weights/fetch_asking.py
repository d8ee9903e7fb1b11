"""Which tensors to begin, and which bytes to ask of whom next. Pure.

The source that will have sent its next chunk first is asked next: for the first bytes that nobody
sends any more, else for the first that nobody was asked for, else for a second copy of bytes that
it would send much sooner than those who owe them.
"""

import math
from collections.abc import Iterator
from itertools import islice

from distributed_llm.weights.fetch_book import MOST_OPEN, Book
from distributed_llm.weights.fetch_events import MAX_CHUNK_BYTES, Action, Ask
from distributed_llm.weights.fetch_link import Link
from distributed_llm.weights.fetch_pace import TokenBucket
from distributed_llm.weights.fetch_tensor import Tensor, TensorState

_CLAIMED_AHEAD_BYTES = 16 * MAX_CHUNK_BYTES
"""Tensors are claimed until each source may be asked for so many bytes, and nobody was."""

_MOST_LOOKED_AT = 256
"""Tensors, in their order, among which the next one for a source is looked for."""

_MUCH_FASTER = 2.0
_WORTH_A_COPY_S = 0.02
"""A copy is asked for if the first should take so much longer, and `_MUCH_FASTER` times as long."""

_Piece = tuple[Tensor, int, int]
"""A tensor, an offset in it, and a length."""


class Asking:
    """Chooses what to ask for.

    Args:
        book: that it chooses from, and enters what it chose in.
        max_bytes_per_s: None is without limit.

    Attributes:
        paced_until: when the next chunk may be asked for, clock seconds, if a limit delays it.
    """

    def __init__(self, book: Book, max_bytes_per_s: float | None) -> None:
        self._book = book
        self._bucket = TokenBucket(max_bytes_per_s)
        self.paced_until = -math.inf

    def go_on(self, now: float) -> Iterator[Action]:
        """Yield all that can be ordered now, and enter it."""
        yield from self._claims(now)
        for tensor in self._book.open.values():
            if tensor.alone and tensor.state is TensorState.OPEN:
                self._choose_only(tensor, now)
        self.paced_until = -math.inf
        while (ask := self._next_ask(now)) is not None:
            yield ask

    # -------------------------------------------------------------- tensors

    def _claims(self, now: float) -> Iterator[Action]:
        """Claim tensors that may not be busy any more, and those whose turn it is."""
        book = self._book
        for tensor in list(book.busy.values()):
            if tensor.look_at <= now and len(book.open) < MOST_OPEN:
                yield book.claim(tensor)
        for link in book.heard():
            while len(book.open) < MOST_OPEN and self._ahead_bytes(link) < _CLAIMED_AHEAD_BYTES:
                first = islice(book.waiting.items(), _MOST_LOOKED_AT)
                found = next((t for sha256, t in first if link.may_give(sha256, now)), None)
                if found is None:
                    break
                yield book.claim(found)
        if book.waiting and not book.open:  # nobody has them; they may have appeared in the cache
            yield book.claim(next(iter(book.waiting.values())))

    def _ahead_bytes(self, link: Link) -> int:
        """Bytes of open tensors that a source may have, and nobody was asked for."""
        return sum(
            tensor.wanted.nbytes - tensor.cut
            for sha256, tensor in self._book.open.items()
            if link.may_hold(sha256)
        )

    def _choose_only(self, tensor: Tensor, now: float) -> None:
        """Choose the source that is to give all of a tensor, or the rest, if the last one fails."""
        sha256 = tensor.wanted.sha256
        usable = {x.source.name: x for x in self._book.heard() if x.may_give(sha256, now)}
        if not usable or tensor.only in usable:
            return
        best = min(usable.values(), key=lambda link: (not link.source.trusted, _speed_key(link)))
        tensor.only = best.source.name

    # -------------------------------------------------------------- chunks

    def _next_ask(self, now: float) -> Ask | None:
        """Return the next thing to ask for; None if there is none, or it is too early."""
        ready = [link for link in self._book.links.values() if link.is_ready]
        for link in sorted(ready, key=_speed_key):
            found = self._lost(link, now) or self._new(link, now) or self._copy(link, now)
            if found is None:
                continue
            tensor, offset, length = found
            at = self._bucket.ready_at(length, now)
            if at > now:
                self.paced_until = at
                return None
            self._bucket.take(length)
            tensor.cut_off(offset, length).askers.add(link.source.name)
            link.asked(tensor.wanted.sha256, offset, length, now)
            return Ask(link.source.name, tensor.wanted.sha256, offset, length)
        return None

    def _lost(self, link: Link, now: float) -> _Piece | None:
        """Return the first bytes that were asked for and that nobody sends any more."""
        most = self._chunk_bytes(link)
        for tensor in self._book.askable(link, now):
            for chunk in tensor.missing():
                owes = link.owes(tensor.wanted.sha256, chunk.offset)
                if not owes and not self._book.senders(chunk):
                    return tensor, chunk.offset, min(chunk.length, most)
        return None

    def _new(self, link: Link, now: float) -> _Piece | None:
        """Return the first bytes that nobody was asked for, if there is room for them."""
        for tensor in self._book.askable(link, now):
            piece = tensor.next_piece(self._chunk_bytes(link))
            if piece is not None:
                return (tensor, *piece) if piece[1] <= self._book.room_bytes else None
        return None

    def _copy(self, link: Link, now: float) -> _Piece | None:
        """Return the first bytes that a source would send much sooner than those who owe them."""
        room = self._book.room_for_copies_bytes
        for tensor in self._book.askable(link, now):
            sha256 = tensor.wanted.sha256
            for chunk in tensor.missing():
                own_s = link.sends_within_s(chunk.length)
                if own_s is None or chunk.length > room or link.owes(sha256, chunk.offset):
                    continue
                owers = self._book.senders(chunk)
                others_s = min(each.owes_for_s(sha256, chunk.offset, now) for each in owers)
                if others_s > max(_MUCH_FASTER * own_s, own_s + _WORTH_A_COPY_S):
                    return tensor, chunk.offset, chunk.length
        return None

    def _chunk_bytes(self, link: Link) -> int:
        return min(link.chunk_bytes, self._bucket.chunk_bytes)


def _speed_key(link: Link) -> float:
    """Sorts by who will have sent another chunk first; who is not known yet comes before."""
    return link.sends_within_s(link.chunk_bytes) or 0.0
