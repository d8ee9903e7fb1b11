"""The ledger of the KV cache of one pipeline: sequences, shared prefixes and free room. Pure.

Every stage has the same positions of the same sequences in its KV cache, so one ledger is enough
for all of them. It mirrors their buffers: each sequence references a chain of segments, which are
charged in blocks of `KV_BLOCK` positions. A sequence that begins like another one references that
one's segments and continues in a segment of its own. A segment is charged once, and until the last
sequence that references it is freed. The ledger never charges less than a stage allocates.

A sequence that has ended stays as a prefix for later ones (`prefixes.py`) until its room is needed;
the least recently used one goes first. What layers with a window need not keep of running sequences
is dropped when its room is needed (`unseen.py`).

Layers with a state of their own go on only from positions where one is kept: a *snapshot*, of which
the ledger knows where it stands, or the end of an ended sequence. Prefixes end there.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

from distributed_llm.common.layer_states import HELD_STATES
from distributed_llm.common.messages import SharedPrefix
from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.serving.cached_sequence import CachedSequence
from distributed_llm.coordinator.serving.kv_charges import KVCharges, Segment, blocks_of
from distributed_llm.coordinator.serving.prefix_index import STRIDE
from distributed_llm.coordinator.serving.prefixes import Match, Prefixes
from distributed_llm.coordinator.serving.state_counts import StateCounts
from distributed_llm.coordinator.serving.unseen import Unseen

_NOBODY = SequenceId(0)
"""An id that no sequence has: nothing more is appended to a segment that it owns."""


class KVLedger:
    """The KV cache of one pipeline.

    Args:
        capacity_tokens: positions that every stage has room for, in all its layers.
        windows: of the layers.
    """

    def __init__(self, capacity_tokens: int, windows: KVWindows | None = None) -> None:
        self._charges = KVCharges(capacity_tokens, windows or KVWindows())
        self._sequences: dict[SequenceId, CachedSequence] = {}
        self._ended: dict[SequenceId, None] = {}  # ordered set, least recently used first
        self._prefixes = Prefixes(self._charges.windows)
        self._unseen = Unseen(self._charges, self._sequences)
        self._freed: list[SequenceId] = []
        self._is_short = False  # whether a sequence waits for room

    @property
    def used_tokens(self) -> int:
        """Positions charged, in whole blocks of all layers."""
        return self._charges.windows.tokens(self._charges.used)

    @property
    def cached_tokens(self) -> int:
        """Positions that would become free if all ended sequences were freed."""
        segments = {segment for i in self._ended for segment in self._sequences[i].segments}
        ended = self._ended.keys()
        price = sum(one.price for one in segments if one.holders <= ended)
        states = sum(self._sequences[i].states for i in ended)
        return self._charges.windows.tokens(price + states * self._charges.windows.state)

    def needed_tokens(self, windows: KVWindows) -> int:
        """Return the positions of capacity without which what cannot be freed has no room.

        Args:
            windows: of the layers of the plan that has the room.
        """
        kept = [one for one in self._sequences.values() if not one.can_be_freed]
        segments = {segment for one in kept for segment in one.segments}
        price = sum(windows.price(one.blocks, one.unseen, one.reached) for one in segments)
        return windows.tokens(price + windows.state * sum(one.states for one in kept))

    @property
    def room_tokens(self) -> int:
        """Positions that one more sequence may take, if all is freed that can be."""
        return self._charges.room_tokens

    @property
    def keeps_states(self) -> bool:
        """Whether layers have a state of their own, so that positions alone are not enough."""
        return bool(self._charges.windows.state)

    @property
    def sequence_ids(self) -> list[SequenceId]:
        """All sequences, ended ones included."""
        return list(self._sequences)

    def take_freed(self) -> list[SequenceId]:
        """Return the sequences that the stages are to free, in this order, and forget them."""
        freed, self._freed = self._freed, []
        return freed

    def take_dropped(self) -> dict[SequenceId, int]:
        """Return from which positions on sequences are seen in layers with a window; forget it.

        The stages are to drop others there, after they freed what is to be freed.
        """
        return self._unseen.take()

    def match(
        self, tokens: Sequence[int], limit: int, shares_with: Hashable = None
    ) -> Match | None:
        """Return the sequence with the longest common prefix with `tokens[:limit]`.

        None if none has at least `STRIDE` tokens in common.

        Args:
            shares_with: only sequences with an equal value are looked at.
        """
        return self._prefixes.match(tokens, limit, shares_with)

    def may_match(self, key: int) -> bool:
        """Return whether `match` may find a sequence.

        Args:
            key: `prefix_key` of the tokens.
        """
        return self._prefixes.may_match(key)

    def open(
        self,
        sequence_id: SequenceId,
        tokens: Sequence[int],
        length: int,
        match: Match | None,
        shares_with: Hashable = None,
    ) -> bool:
        """Begin a sequence with room for `length` positions; return False if there is no room.

        Ended sequences are freed as needed, but none if all of them together would not suffice.

        Args:
            tokens: a list that grows with the sequence; it is kept and read again.
            match: a prefix to share if possible; `prefix_of` returns what is shared.
            shares_with: only sequences with an equal value share its prefixes.
        """
        if match is not None and self._covers(match) and self._sequences[match.sequence_id].pins:
            match = None  # stages have not confirmed others that begin with it
        self._is_short = not self._has_room(length, match)
        if self._is_short:
            self._unseen.drop(self._sequences)
            if match is not None and not self._prefixes.is_seen(match):
                return False
            if not self._has_room(length, match):
                return False
            self._is_short = False
        sequence = self._sequences[sequence_id] = CachedSequence(tokens, shares_with)
        if match is not None:
            sequence.prefix = self._share(sequence_id, match)
        self._free_for(self._states_of(match) * self._charges.windows.state)
        self._add_states(sequence, self._states_of(match))
        extended = self.extend(sequence_id, length)
        assert extended
        return True

    def _has_room(self, length: int, match: Match | None) -> bool:
        """Return whether a sequence of `length` positions that shares `match` can begin."""
        own, kept = Segment(0, _NOBODY, set()), 0
        if match is not None:
            segments = self._sequences[match.sequence_id].segments
            kept = sum(segment.price for segment in segments if not segment.num_keeping)
            if self._sequences[match.sequence_id].can_be_freed and not self._covers(match):
                kept += self._sequences[match.sequence_id].states * self._charges.windows.state
            own.start = match.length
            if self._covers(match) and segments[-1].owner == match.sequence_id:
                own = segments[-1]
        states = self._states_of(match) * self._charges.windows.state
        more = self._charges.more_for_length(own, length) + states
        return self._charges.has_room(more, kept=kept)

    @staticmethod
    def _states_of(match: Match | None) -> int:
        """Return how many states a sequence has that begins with `match`, the shared one too."""
        return HELD_STATES + (match is not None)

    def _add_states(self, sequence: CachedSequence, count: int) -> None:
        sequence.states += count
        self._charges.charge_states(count, reclaimable=sequence.can_be_freed)

    def keep_snapshot(self, sequence_id: SequenceId, position: int) -> bool:
        """Charge for a state that is kept after a position; return False if there is no room.

        Ended sequences are freed as needed. Others may share the sequence up to there once that
        many positions are computed.
        """
        sequence, price = self._sequences[sequence_id], self._charges.windows.state
        if position in sequence.snapshots:
            return True  # a step that computes it again
        if not price or not self._charges.has_room(price):
            return False
        self._free_for(price)
        self._add_states(sequence, 1)
        sequence.snapshots = sorted([*sequence.snapshots, position])
        return True

    def set_back(self, sequence_id: SequenceId, computed: int) -> None:
        """Forget snapshots of steps that were abandoned: later ones may end elsewhere.

        Args:
            computed: positions that all stages have computed.
        """
        sequence = self._sequences[sequence_id]
        sequence.set_back = True
        kept = [at for at in sequence.snapshots if at <= computed]
        self._add_states(sequence, len(kept) - len(sequence.snapshots))
        sequence.snapshots = kept

    @property
    def were_set_back(self) -> list[SequenceId]:
        """Sequences of which the latest step was abandoned, in models whose layers have a state."""
        return [i for i, sequence in self._sequences.items() if sequence.set_back]

    @property
    def states(self) -> StateCounts:
        """How many states all sequences keep."""
        return StateCounts.of(self._sequences.values() if self._charges.windows.state else ())

    def has_snapshot(self, sequence_id: SequenceId, position: int) -> bool:
        """Return whether a state is kept after a position of a sequence, or will be."""
        return position in self._sequences[sequence_id].snapshots

    def latest_snapshot(self, sequence_id: SequenceId) -> int:
        """Return the last position of a sequence at which a snapshot is kept or will be, or 0."""
        return max(self._sequences[sequence_id].snapshots, default=0)

    def _covers(self, match: Match) -> bool:
        """Return whether a sequence that shares `match` takes the other one over."""
        parent = self._sequences[match.sequence_id]
        return parent.ended and match.length >= parent.computed

    def prefix_of(self, sequence_id: SequenceId) -> SharedPrefix | None:
        """Return the prefix that a sequence shares, until `computed` is first called for it."""
        return self._sequences[sequence_id].prefix

    def _share(self, sequence_id: SequenceId, match: Match) -> SharedPrefix:
        """Let a sequence begin with a prefix of another one, and return that.

        An ended sequence that is shared as a whole is taken over: the new one continues its last
        segment.
        """
        parent, child = self._sequences[match.sequence_id], self._sequences[sequence_id]
        covers = self._covers(match)
        for segment in parent.segments:
            if segment.start < match.length:
                self._hold(segment, sequence_id)
                child.segments.append(segment)
        child.length = match.length
        child.snapshots = [match.length]
        child.seen_from = parent.seen_from
        if covers:
            self._take(match.sequence_id, sequence_id)
        else:
            self._pin(parent, 1)
        if parent.ended and not covers:
            self._ended[match.sequence_id] = self._ended.pop(match.sequence_id)  # recently used
        return SharedPrefix(sequence_id=match.sequence_id, length=match.length, take=covers)

    def _take(self, parent: SequenceId, child: SequenceId) -> None:
        """Let `child` append to the last segment of `parent`, and forget `parent`.

        No other sequence reads the positions that `child` will write: one that shares the whole of
        an ended sequence takes it.
        """
        last = self._sequences[child].segments[-1]
        if last.owner == parent:
            last.owner = child
        del self._ended[parent]
        self._forget(parent)

    def extend(self, sequence_id: SequenceId, length: int) -> bool:
        """Charge a sequence for `length` positions; return False if there is no room.

        Ended sequences are freed as needed.
        """
        sequence = self._sequences[sequence_id]
        if length <= sequence.length:
            return True
        own = sequence.segments[-1] if sequence.segments else None
        if own is None or own.owner != sequence_id:
            own = Segment(sequence.length, sequence_id, set())
        more = self._charges.more_for_length(own, length)
        if not self._charges.has_free(more):
            self._unseen.drop(self._sequences)
            more = self._charges.more_for_length(own, length)
        if not self._charges.has_room(more):
            return False
        self._free_for(more)
        if own not in sequence.segments[-1:]:
            self._hold(own, sequence_id)
            sequence.segments.append(own)
        own.blocks = max(own.blocks, blocks_of(length - own.start))
        self._charges.charge(own)
        sequence.length = length
        return True

    def reach(self, sequence_id: SequenceId, start: int, stop: int) -> int:
        """Have a step compute positions of a sequence, which has room for them; return their end.

        Layers with a window keep them all as long as there is room that nobody has. Where there is
        none, the step goes no further than what was set aside for them. If others that share the
        sequence's segment hold that, ended sequences are freed for one more position.

        Args:
            sequence_id: of the step.
            start: first position; `start` is returned if there is no room at all.
            stop: end of the positions that are wanted.
        """
        charges, own = self._charges, self._sequences[sequence_id].segments[-1]
        wanted = max(own.reached, blocks_of(stop - own.start))
        if not charges.has_free(charges.more_for_reach(own, wanted)):
            self._unseen.drop([sequence_id])
            wanted = max(own.reached, min(wanted, own.unseen + charges.windows.span))
            least = max(wanted, blocks_of(start + 1 - own.start))
            if least > wanted:
                more = charges.more_for_reach(own, least)
                if not charges.has_room(more):
                    return start
                self._free_for(more)
                wanted = least
        own.reached = wanted
        charges.charge(own)
        return min(stop, own.start + wanted * KV_BLOCK)

    def computed(self, sequence_id: SequenceId, length: int) -> None:
        """Record that all stages have computed `length` positions; others may share them now."""
        sequence = self._sequences[sequence_id]
        self._confirm(sequence)
        sequence.computed, sequence.set_back = length, False
        self._prefixes.add(sequence_id, sequence)
        if self._is_short:
            self._unseen.drop([sequence_id])

    def end(self, sequence_id: SequenceId, *, keep: bool) -> None:
        """End a sequence.

        Args:
            keep: keep it as a prefix, if it is long enough and no other sequence covers it.
        """
        sequence = self._sequences[sequence_id]
        sequence.cut = len(sequence.tokens) < sequence.computed  # the answer has dropped some
        sequence.tokens = list(sequence.tokens[: sequence.computed])
        sequence.computed = len(sequence.tokens)
        last = sequence.segments[-1] if sequence.segments else None
        if last and self._read_until(last, sequence_id) > sequence.computed:
            last.owner = _NOBODY  # others read past its end: nobody may append
        useful = keep and sequence.computed >= STRIDE
        if (useful and not self._prefixes.is_covered(sequence_id, sequence)) or sequence.pins:
            sequence.ended = True
            self._ended[sequence_id] = None
            if not sequence.pins:
                self._keep(sequence, -1)
        else:
            self._free(sequence_id)

    def _read_until(self, segment: Segment, sequence_id: SequenceId) -> int:
        """Return the end of the positions in `segment` that sequences other than this one read."""
        until = 0
        for other in segment.holders - {sequence_id}:
            segments = self._sequences[other].segments
            later = segments[segments.index(segment) + 1 :]
            until = max(until, later[0].start if later else self._sequences[other].length)
        return until

    def _free_for(self, price: int) -> None:
        """Free ended sequences until there is room for `price`, as far as there are any."""
        while not self._charges.has_free(price):
            oldest = next((i for i in self._ended if not self._sequences[i].pins), None)
            if oldest is None:
                return
            self._free(oldest)

    def resize(self, capacity_tokens: int, windows: KVWindows | None = None) -> bool:
        """Set the capacity; return False if more positions than that are in use.

        Ended sequences are freed as needed. Positions in use beyond the capacity stay, but no
        sequence grows until there is room again.

        Args:
            capacity_tokens: positions that every stage has room for, in all its layers.
            windows: of the layers; None: as before.
        """
        charges = self._charges
        if windows is not None and windows != charges.windows:
            for sequence in self._sequences.values():
                charges.charge_states(-sequence.states, reclaimable=sequence.can_be_freed)
            charges.windows = self._prefixes.windows = windows
            for segment in {one for held in self._sequences.values() for one in held.segments}:
                charges.charge(segment)
            for sequence in self._sequences.values():
                charges.charge_states(sequence.states, reclaimable=sequence.can_be_freed)
        charges.resize(capacity_tokens)
        if not charges.has_free(0):
            self._unseen.drop(self._sequences)
        self._free_for(0)
        return charges.tolerate()

    def trim(self, cached_tokens: int) -> None:
        """Free ended sequences, least recently used first, down to `cached_tokens` positions."""
        used, cached = self.used_tokens, self.cached_tokens
        for sequence_id in [i for i in self._ended if not self._sequences[i].pins]:
            if cached - (used - self.used_tokens) <= cached_tokens:
                return
            self._free(sequence_id)

    def discard(self, sequence_id: SequenceId) -> None:
        """Free an ended sequence of which a stage has lost positions: it is no good as a prefix."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None and sequence.ended:
            self._prefixes.remove(sequence_id)
            sequence.lost = True
            self._free_lost(sequence_id)

    def _free_lost(self, sequence_id: SequenceId) -> None:
        sequence = self._sequences[sequence_id]
        if sequence.lost and not sequence.pins:
            self._free(sequence_id)

    def _confirm(self, sequence: CachedSequence) -> None:
        """Unpin the parent of a sequence that all stages have confirmed, or that is gone."""
        prefix, sequence.prefix = sequence.prefix, None
        if prefix and not prefix.take:
            self._pin(self._sequences[prefix.sequence_id], -1)
            self._free_lost(prefix.sequence_id)

    def _free(self, sequence_id: SequenceId) -> None:
        self._ended.pop(sequence_id, None)
        self._forget(sequence_id)
        self._freed.append(sequence_id)

    def _forget(self, sequence_id: SequenceId) -> None:
        sequence = self._sequences.pop(sequence_id)
        if sequence.prefix and sequence.prefix.take:  # some stages may still hold it
            self._freed.append(sequence.prefix.sequence_id)
        self._prefixes.remove(sequence_id)
        if not sequence.can_be_freed:
            self._keep(sequence, -1)
        self._charges.charge_states(-sequence.states, reclaimable=True)
        for segment in sequence.segments:
            segment.holders.remove(sequence_id)
            if segment.holders:
                self._unseen.note(segment)
            else:
                self._charges.free(segment)
        self._confirm(sequence)

    def _hold(self, segment: Segment, sequence_id: SequenceId) -> None:
        """Let a sequence that runs reference a segment."""
        segment.holders.add(sequence_id)
        self._charges.keep(segment, 1)

    def _pin(self, sequence: CachedSequence, by: int) -> None:
        """Change how many sequences rely on `sequence` until all stages have confirmed them."""
        could = sequence.can_be_freed
        sequence.pins += by
        if could != sequence.can_be_freed:
            self._keep(sequence, 1 if could else -1)

    def _keep(self, sequence: CachedSequence, by: int) -> None:
        """Record that a sequence can (-1) or cannot (1) be freed any more."""
        for segment in sequence.segments:
            self._charges.keep(segment, by)
        self._charges.keep_states(sequence.states, by)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        holders: dict[Segment, set[SequenceId]] = {}
        wanted = [sequence.prefix for sequence in self._sequences.values() if sequence.prefix]
        pins = Counter(prefix.sequence_id for prefix in wanted if not prefix.take)
        for i, sequence in self._sequences.items():
            assert sequence.computed <= sequence.length
            assert sequence.pins == pins[i]
            for segment in sequence.segments:
                holders.setdefault(segment, set()).add(i)
        assert all(segment.holders == ids for segment, ids in holders.items())
        for segment, held_by in holders.items():
            kept_by = [i for i in held_by if not self._sequences[i].can_be_freed]
            assert segment.num_keeping == len(kept_by)
        states = [(one.states, one.can_be_freed) for one in self._sequences.values()]
        free_states = sum(count for count, can_be_freed in states if can_be_freed)
        self._charges.validate(set(holders), sum(count for count, _ in states), free_states)
        assert set(self._ended) == {i for i, sequence in self._sequences.items() if sequence.ended}
        self._prefixes.validate(self._sequences)
