"""What the segments of a KV cache are charged, and whether there is room for more. Pure.

A segment is charged once, however many sequences reference it, by the prices of `kv_windows.py`:
for its blocks in layers without a window, and for what layers with a window keep of them. States
of layers that have one are charged to the sequence that they are of.
"""

from dataclasses import dataclass

from distributed_llm.common.layer_states import HELD_STATES
from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows


@dataclass(eq=False)
class Segment:
    """A buffer of KV cache, which every stage has.

    Attributes:
        start: its first position.
        owner: the sequence that appends to it; it may be gone.
        holders: sequences that reference it.
        blocks: blocks that it has in layers without a window.
        unseen: first ones of them that layers with a window have dropped.
        reached: those of them that steps have come to.
        price: what is charged for all that.
        num_keeping: holders that cannot be freed now: they run, or are pinned.
    """

    start: int
    owner: SequenceId
    holders: set[SequenceId]
    blocks: int = 0
    unseen: int = 0
    reached: int = 0
    price: int = 0
    num_keeping: int = 0


class KVCharges:
    """What all segments of one KV cache are charged.

    Args:
        capacity_tokens: positions that every stage has room for, in all its layers.
        windows: of the layers.

    Attributes:
        windows: as given; see `resize`.
        used: what is charged.
        reclaimable: what becomes free if all is freed that can be.
    """

    def __init__(self, capacity_tokens: int, windows: KVWindows) -> None:
        self.windows = windows
        self.used = 0
        self.reclaimable = 0
        self._capacity = capacity_tokens // KV_BLOCK * windows.total
        self._tolerated = 0  # what was charged when the capacity was last set

    @property
    def room_tokens(self) -> int:
        """Positions that a new sequence may take, if all is freed that can be."""
        free = self._capacity - self.used + self.reclaimable - HELD_STATES * self.windows.state
        return max(0, free // self.windows.total * KV_BLOCK)

    def has_free(self, price: int) -> bool:
        """Return whether there is room for `price` more, and nothing has to be freed for it."""
        return self.used + price <= self._capacity

    def has_room(self, price: int, *, kept: int = 0) -> bool:
        """Return whether there is room for `price` more if all is freed that can be.

        Args:
            price: of what would be added.
            kept: price of what could be freed, and is needed.
        """
        return self.has_free(price - (self.reclaimable - kept))

    def more_for_length(self, segment: Segment, length: int) -> int:
        """Return what is charged more once a segment holds its sequence up to `length`."""
        blocks = max(segment.blocks, blocks_of(length - segment.start))
        return self.windows.price(blocks, segment.unseen, segment.reached) - segment.price

    def more_for_reach(self, segment: Segment, reached: int) -> int:
        """Return what is charged more once steps have come to `reached` blocks of a segment."""
        return self.windows.price(segment.blocks, segment.unseen, reached) - segment.price

    def charge(self, segment: Segment) -> None:
        """Charge for what a segment has now."""
        more = self.more_for_reach(segment, segment.reached)
        segment.price += more
        self.used += more
        if not segment.num_keeping:
            self.reclaimable += more

    def keep(self, segment: Segment, by: int) -> None:
        """Record that more (1) or fewer (-1) holders of a segment cannot be freed."""
        if not segment.num_keeping:
            self.reclaimable -= segment.price
        segment.num_keeping += by
        if not segment.num_keeping:
            self.reclaimable += segment.price

    def free(self, segment: Segment) -> None:
        """Charge nothing more for a segment that nobody holds."""
        self.used -= segment.price
        self.reclaimable -= segment.price

    def charge_states(self, count: int, *, reclaimable: bool) -> None:
        """Charge for more states, or fewer.

        Args:
            count: of states; negative for fewer.
            reclaimable: whether the sequence that they are of can be freed.
        """
        self.used += count * self.windows.state
        if reclaimable:
            self.reclaimable += count * self.windows.state

    def keep_states(self, count: int, by: int) -> None:
        """Record that a sequence with so many states can (-1) or cannot (1) be freed any more."""
        self.reclaimable -= by * count * self.windows.state

    def resize(self, capacity_tokens: int) -> None:
        """Set the capacity; what is charged beyond it stays."""
        self._capacity = capacity_tokens // KV_BLOCK * self.windows.total

    def tolerate(self) -> bool:
        """Take what is charged now for right, even beyond the capacity; return whether it fits."""
        self._tolerated = self.used
        return self.has_free(0)

    def validate(self, segments: set[Segment], states: int, free_states: int) -> None:
        """Assert the invariants.

        Args:
            segments: all there are.
            states: all there are.
            free_states: those of them that are of sequences which can be freed.
        """
        price = self.windows.state
        assert 0 <= self.used <= max(self._capacity, self._tolerated)
        assert self.used == sum(segment.price for segment in segments) + states * price
        freeable = (segment.price for segment in segments if not segment.num_keeping)
        assert self.reclaimable == sum(freeable) + free_states * price
        for segment in segments:
            assert segment.unseen <= segment.blocks
            assert segment.reached <= segment.blocks


def blocks_of(tokens: int) -> int:
    """Return how many blocks so many positions take."""
    return -(-tokens // KV_BLOCK)
