"""What the stages of one pipeline hold in their KV caches, and how much room is left. Pure.

Every stage holds the same positions of the same sequences, so one book is enough for all. It is
kept in blocks of `KV_BLOCK` positions and in segments, as the stages keep their buffers: a sequence
that begins like another references that one's segments and goes on in one of its own; a segment
is charged once, until the last sequence that references it is freed. What is charged is no less
than what a stage allocates.

Sequences that have ended stay, as prefixes for later ones, until room is needed: the one that was
used least lately goes first. Prefixes are found by hashes of all tokens up to each multiple of
`_STRIDE` (as in vLLM's prefix caching), and then compared token by token: a hash that lies costs
nothing but the comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from distributed_llm.common.messages import SharedPrefix
from distributed_llm.common.types import KV_BLOCK

_STRIDE = 16
_NOBODY = 0
"""A sequence id that none has."""


@dataclass(eq=False)
class _Segment:
    """A buffer on every stage.

    Attributes:
        start: the first position in it.
        owner: the sequence that goes on in it; it may be gone.
        holders: sequences that reference it.
        blocks: charged for it.
    """

    start: int
    owner: int
    holders: set[int]
    blocks: int = 0


@dataclass(eq=False)
class _Held:
    """One sequence.

    Attributes:
        tokens: the owner's list; positions below `computed` are in the KV cache of all stages.
        segments: that it references.
        length: positions that are charged.
        hashes: under which it can be found.
        prefix: what it began as, until all stages know.
        pins: sequences that are to begin as this one, on stages that may not know them yet.
        ended: it is kept only as a prefix for others; not even that if it is `lost`.
    """

    tokens: Sequence[int]
    segments: list[_Segment] = field(default_factory=list)
    length: int = 0
    computed: int = 0
    hashes: list[int] = field(default_factory=list)
    prefix: SharedPrefix | None = None
    pins: int = 0
    ended: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Match:
    """The first `length` positions of a held sequence are those that are wanted."""

    sequence_id: int
    length: int


class KVLedger:
    """The book of one pipeline.

    Args:
        capacity_tokens: positions that every stage has room for.

    Attributes:
        freed: sequences that the stages are to free, in order; whoever reads it empties it.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens // KV_BLOCK
        self._used = 0
        self._tolerated = 0  # in use when there was room for less
        self._held: dict[int, _Held] = {}
        self._ended: dict[int, None] = {}  # least lately used first
        self._index: dict[int, dict[int, None]] = {}
        self.freed: list[int] = []

    @property
    def used_tokens(self) -> int:
        """Positions that are charged, in whole blocks."""
        return self._used * KV_BLOCK

    @property
    def cached_tokens(self) -> int:
        """Those of them that would be free if all sequences that ended went."""
        segments = {segment for i in self._ended for segment in self._held[i].segments}
        ended = self._ended.keys()
        return KV_BLOCK * sum(s.blocks for s in segments if s.holders <= ended)

    @property
    def sequence_ids(self) -> list[int]:
        """The sequences that are held."""
        return list(self._held)

    def match(self, tokens: Sequence[int], limit: int) -> Match | None:
        """Return the held sequence that shares most with `tokens[:limit]`, if any does."""
        found = None
        state = 0
        for at in range(0, limit - _STRIDE + 1, _STRIDE):
            state = _hash(state, tokens[at : at + _STRIDE])
            holders = self._index.get(state)
            if not holders:
                break
            found = next(reversed(holders))
        if found is None:
            return None
        held = self._held[found]
        length = common_prefix(held.tokens, tokens, min(held.computed, limit))
        return Match(found, length) if length >= _STRIDE else None

    def may_match(self, key: int) -> bool:
        """Return whether `match` may find something; `key` is `prefix_key` of the tokens."""
        return key in self._index

    def open(
        self, sequence_id: int, tokens: Sequence[int], length: int, match: Match | None
    ) -> bool:
        """Begin a sequence with room for `length` positions; False, if there is no room.

        Args:
            tokens: read later too, as it grows.
            match: what to share; `prefix_of` tells whether it was.
        """
        held = self._held[sequence_id] = _Held(tokens)
        if match is not None:
            held.prefix = self._share(sequence_id, match)
        if self.extend(sequence_id, length):
            return True
        self._forget(sequence_id)
        return False

    def prefix_of(self, sequence_id: int) -> SharedPrefix | None:
        """Return what the sequence began as, if that was another's and not all stages know."""
        return self._held[sequence_id].prefix

    def _share(self, sequence_id: int, match: Match) -> SharedPrefix | None:
        """Let a sequence begin as part of another one; None, changing nothing, if it must not.

        An ended sequence of which nothing would be left over is taken: the new one covers it.
        """
        parent, child = self._held[match.sequence_id], self._held[sequence_id]
        covers = parent.ended and match.length >= parent.computed
        if covers and parent.pins:
            return None  # stages that do not know the others yet need it as it is
        for segment in parent.segments:
            if segment.start < match.length:
                segment.holders.add(sequence_id)
                child.segments.append(segment)
        child.length = match.length
        if covers:
            self._take(match.sequence_id, sequence_id)
        else:
            parent.pins += 1
        if parent.ended and not covers:
            self._ended[match.sequence_id] = self._ended.pop(match.sequence_id)  # used just now
        return SharedPrefix(sequence_id=match.sequence_id, length=match.length, take=covers)

    def _take(self, parent: int, child: int) -> None:
        """The child goes on where the parent did.

        Others read nothing beyond: whoever shares more of an ended sequence covers it.
        """
        last = self._held[child].segments[-1]
        if last.owner == parent:
            last.owner = child
        del self._ended[parent]
        self._forget(parent)

    def extend(self, sequence_id: int, length: int) -> bool:
        """Charge the sequence for `length` positions; return False if there is no room.

        Prefixes of ended sequences make room.
        """
        held = self._held[sequence_id]
        if length <= held.length:
            return True
        own = held.segments[-1] if held.segments else None
        if own is None or own.owner != sequence_id:
            own = _Segment(held.length, sequence_id, {sequence_id})
        more = max(0, _blocks(length - own.start) - own.blocks)
        if not self._make_room(more):
            return False
        if own not in held.segments[-1:]:
            held.segments.append(own)
        own.blocks += more
        self._used += more
        held.length = length
        return True

    def computed(self, sequence_id: int, length: int) -> None:
        """All stages have the first `length` positions: others may share them."""
        held = self._held[sequence_id]
        self._confirm(held)
        held.computed = length
        self._index_up_to(sequence_id, held)

    def end(self, sequence_id: int, *, keep: bool) -> None:
        """The sequence is done; keep it as a prefix for others if it is of use."""
        held = self._held[sequence_id]
        held.tokens = list(held.tokens[: held.computed])  # the owner may have dropped some
        held.computed = len(held.tokens)
        if held.segments and self._read_until(held.segments[-1], sequence_id) > held.computed:
            held.segments[-1].owner = _NOBODY  # others read what was dropped: it stays
        useful = keep and held.computed >= _STRIDE and not self._is_covered(sequence_id, held)
        if useful or held.pins:
            held.ended = True
            self._ended[sequence_id] = None
        else:
            self._free(sequence_id)

    def _read_until(self, segment: _Segment, sequence_id: int) -> int:
        """Return up to which position sequences other than this one read a segment."""
        until = 0
        for other in segment.holders - {sequence_id}:
            chain = self._held[other].segments
            beyond = chain[chain.index(segment) + 1 :]
            until = max(until, beyond[0].start if beyond else self._held[other].length)
        return until

    def _is_covered(self, sequence_id: int, held: _Held) -> bool:
        self._unindex(sequence_id, held)
        match = self.match(held.tokens, held.computed)
        if match is not None and match.length >= held.computed:
            return True
        self._index_up_to(sequence_id, held)
        return False

    def _make_room(self, blocks: int) -> bool:
        while self._used + blocks > self._capacity:
            oldest = next((i for i in self._ended if not self._held[i].pins), None)
            if oldest is None:
                return False
            self._free(oldest)
        return True

    def resize(self, capacity_tokens: int) -> bool:
        """Have room for so many positions from now on; False if more than that are in use.

        Prefixes of ended sequences make room. What is in use beyond that stays, and does not grow.
        """
        self._capacity = capacity_tokens // KV_BLOCK
        fits = self._make_room(0)
        self._tolerated = self._used
        return fits

    def trim(self, cached_tokens: int) -> None:
        """Free prefixes of ended sequences until they take no more than so many positions."""
        for sequence_id in [i for i in self._ended if not self._held[i].pins]:
            if self.cached_tokens <= cached_tokens:
                return
            self._free(sequence_id)

    def discard(self, sequence_id: int) -> None:
        """Keep a sequence no longer as a prefix, if it is kept as one: a stage has lost it."""
        held = self._held.get(sequence_id)
        if held is not None and held.ended:
            self._unindex(sequence_id, held)
            held.lost = True
            self._free_lost(sequence_id)

    def _free_lost(self, sequence_id: int) -> None:
        held = self._held[sequence_id]
        if held.lost and not held.pins:
            self._free(sequence_id)

    def _confirm(self, held: _Held) -> None:
        """All stages know what a sequence began as, or it is gone: its parent is free to go."""
        prefix, held.prefix = held.prefix, None
        if prefix and not prefix.take:
            self._held[prefix.sequence_id].pins -= 1
            self._free_lost(prefix.sequence_id)

    def _free(self, sequence_id: int) -> None:
        self._ended.pop(sequence_id, None)
        self._forget(sequence_id)
        self.freed.append(sequence_id)

    def _forget(self, sequence_id: int) -> None:
        held = self._held.pop(sequence_id)
        if held.prefix and held.prefix.take:  # stages that did not see it taken hold it still
            self.freed.append(held.prefix.sequence_id)
        self._unindex(sequence_id, held)
        for segment in held.segments:
            segment.holders.remove(sequence_id)
            if not segment.holders:
                self._used -= segment.blocks
        self._confirm(held)

    def _index_up_to(self, sequence_id: int, held: _Held) -> None:
        state = held.hashes[-1] if held.hashes else 0
        for at in range(len(held.hashes) * _STRIDE, held.computed - _STRIDE + 1, _STRIDE):
            state = _hash(state, held.tokens[at : at + _STRIDE])
            held.hashes.append(state)
            self._index.setdefault(state, {})[sequence_id] = None

    def _unindex(self, sequence_id: int, held: _Held) -> None:
        for state in held.hashes:
            holders = self._index.get(state)
            if holders is not None:
                holders.pop(sequence_id, None)
                if not holders:
                    del self._index[state]
        held.hashes = []

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert 0 <= self._used <= max(self._capacity, self._tolerated)
        holders: dict[_Segment, set[int]] = {}
        for i, held in self._held.items():
            assert held.computed <= held.length
            wanted = [h.prefix for h in self._held.values() if h.prefix and not h.prefix.take]
            assert held.pins == sum(prefix.sequence_id == i for prefix in wanted)
            for segment in held.segments:
                holders.setdefault(segment, set()).add(i)
        assert all(segment.holders == found for segment, found in holders.items())
        assert self._used == sum(segment.blocks for segment in holders)
        assert set(self._ended) == {i for i, held in self._held.items() if held.ended}
        for state, found in self._index.items():
            assert found
            assert all(state in self._held[i].hashes for i in found)


def prefix_key(tokens: Sequence[int]) -> int:
    """Return what sequences have in common that could share anything."""
    return _hash(0, tokens[:_STRIDE])


def common_prefix(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """Return how many of the first `limit` tokens are the same in both."""
    limit = min(limit, len(left), len(right))
    same, step = 0, _STRIDE
    while same < limit:
        stop = min(same + step, limit)
        if left[same:stop] == right[same:stop]:
            same, step = stop, step * 2
        elif step == 1:
            break
        else:
            step = max(1, min(step, stop - same) // 2)
    return same


def _hash(state: int, tokens: Sequence[int]) -> int:
    return hash((state, *tokens))


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)
