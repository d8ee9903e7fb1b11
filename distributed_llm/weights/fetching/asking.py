"""Which tensors to begin, and which bytes to ask of whom next. Pure.

The source that will have sent its next chunk first is asked next: for the first bytes that nobody
sends any more, else for the first that nobody was asked for, else for a second copy of bytes that
it would send much sooner than those who owe them.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from distributed_llm.common.messages import MAX_CHUNK_BYTES
from distributed_llm.weights.fetching.book import MOST_OPEN, Book
from distributed_llm.weights.fetching.events import Action, Ask
from distributed_llm.weights.fetching.link import Link
from distributed_llm.weights.fetching.pace import TokenBucket
from distributed_llm.weights.fetching.tensor import Chunk, Tensor, TensorState, up_to_a_grain

_CLAIMED_AHEAD_BYTES = 16 * MAX_CHUNK_BYTES
"""Tensors are claimed until each source may be asked for so many bytes, and nobody was."""

_MOST_LOOKED_AT = 256
"""Tensors, in their order, among which the next one for a source is looked for."""

_MUCH_FASTER = 2.0
_WORTH_A_COPY_S = 0.02
"""A copy is asked for if the first should take so much longer, and `_MUCH_FASTER` times as long."""

_MOST_COPIES_LOOKED_AT = 4
"""Missing chunks, the first ones, that are looked at for whether a copy is worth it."""

_Piece = tuple[Link, Tensor, int, int]
"""Whom to ask, of which tensor, for bytes from where, and how many."""


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
        self._lost: list[tuple[Tensor, Chunk]] = []
        self.paced_until = -math.inf

    def go_on(self, now: float) -> Iterator[Action]:
        """Yield all that can be ordered now, and enter it."""
        yield from self._claims(now)
        for tensor in self._book.open.values():
            if tensor.alone and tensor.state is TensorState.OPEN:
                self._choose_only(tensor, now)
        self.paced_until = -math.inf
        self._lost = self._book.lost()
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
        """Bytes of open tensors that a source may have and nobody was asked for, enough or all."""
        ahead = 0
        for sha256, tensor in reversed(self._book.open.items()):
            if ahead >= _CLAIMED_AHEAD_BYTES:
                break
            if link.may_hold(sha256):
                ahead += tensor.wanted.nbytes - tensor.cut
        return ahead

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
        ready = sorted((x for x in self._book.links.values() if x.is_ready), key=_speed_key)
        found = next((each for link in ready if (each := self._first(link, now))), None)
        found = found or self._copy(ready, now)
        if found is None:
            return None
        link, tensor, offset, length = found
        at = self._bucket.ready_at(length, now)
        if at > now:
            self.paced_until = at
            return None
        self._bucket.take(length)
        tensor.cut_off(offset, length).askers.add(link.source.name)
        link.asked(tensor.wanted.sha256, offset, length, now)
        if self._lost:
            self._lost = self._book.lost()
        return Ask(link.source.name, tensor.wanted.sha256, offset, length)

    def _first(self, link: Link, now: float) -> _Piece | None:
        """Return the first bytes that nobody sends and a source can be asked for."""
        most = min(link.chunk_bytes, self._bucket.chunk_bytes)
        for tensor, chunk in self._lost:
            if tensor.may_be_of(link, now) and not link.owes(tensor.wanted.sha256, chunk.offset):
                length = up_to_a_grain(chunk.offset, chunk.length, most)
                return link, tensor, chunk.offset, length
        for tensor in self._book.open.values():
            piece = tensor.uncut(most)
            if piece is None or not tensor.may_be_of(link, now):
                continue
            if not link.owes(tensor.wanted.sha256, piece[0]):
                return (link, tensor, *piece) if piece[1] <= self._book.room_bytes else None
        return None

    def _copy(self, ready: Sequence[Link], now: float) -> _Piece | None:
        """Return bytes that a source would send much sooner than those who owe them.

        Args:
            ready: sources that have nothing else to do, in the order in which they would send.
            now: clock seconds.
        """
        if not ready:
            return None
        missing = ((t, chunk) for t in self._book.open.values() for chunk in t.missing())
        for tensor, chunk in islice(missing, _MOST_COPIES_LOOKED_AT):
            sha256, offset, length = tensor.wanted.sha256, chunk.offset, chunk.length
            may = (x for x in ready if tensor.may_be_of(x, now) and not x.owes(sha256, offset))
            link = next(may, None)
            own_s = None if link is None else link.sends_within_s(length)
            senders = self._book.senders(chunk)
            if link is None or own_s is None or not senders:
                continue
            others_s = min(sender.owes_for_s(sha256, offset, now) for sender in senders)
            is_worth_it = others_s > max(_MUCH_FASTER * own_s, own_s + _WORTH_A_COPY_S)
            if is_worth_it and length <= self._book.room_for_copies_bytes:
                return link, tensor, offset, length
        return None


def _speed_key(link: Link) -> float:
    """Sorts by who will have sent another chunk first; who is not known yet comes before."""
    return link.sends_within_s(link.chunk_bytes) or 0.0
