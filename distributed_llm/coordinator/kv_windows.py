"""What layers with a window keep of a sequence, and what that is charged. Pure values.

A layer with a window sees the last positions of a sequence only. Others are dropped there when
their room is needed, for until then another sequence may begin with them. How far a sequence may be
set back is known: to what all stages have computed. So it keeps, at most, the window before that
and the positions of steps in flight, for which a margin is set aside.

A position is charged the full price once and the price of the windowed layers for as long as they
keep it. Prices are in parts of a block of all layers, as in the stage where the layers with a
window have the least share: all other stages take less than they are charged.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from distributed_llm.common.types import KV_BLOCK

_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class KVWindows:
    """The windows of the layers of a pipeline; by default there are none.

    Attributes:
        window: positions that a token sees in the layer with the widest window, itself included.
        margin: positions that are set aside for steps in flight.
        windowed: price of a block in the layers with a window.
        total: price of a block in all layers.
    """

    window: int = 0
    margin: int = 0
    windowed: int = 0
    total: int = 1

    @classmethod
    def of_stages(cls, stages: Iterable[tuple[int, int, int]], margin: int) -> "KVWindows":
        """Return the windows of stages, of each the window, and bytes of a position.

        Args:
            stages: widest window, bytes in layers with a window, bytes in all layers.
            margin: as in the attributes.
        """
        told = [stage for stage in stages if stage[2]]  # others have no KV cache
        if not told:
            return cls()
        _, windowed, total = min(told, key=lambda one: one[1] / one[2])
        if not 0 < windowed <= total:
            return cls()
        return cls(max(window for window, _, _ in told), margin, windowed, total)

    @property
    def span(self) -> int:
        """Blocks that layers with a window keep of one segment at most, if it can be trimmed."""
        # A block of which the first position was dropped stays, and so does one begun.
        return _blocks(self.window + self.margin) + 2

    def price(self, blocks: int, unseen: int, reached: int) -> int:
        """Return what a segment is charged.

        Args:
            blocks: that layers without a window have room for.
            unseen: first ones of them that layers with a window have dropped.
            reached: those that steps have come to.
        """
        if not self.windowed:
            return self.total * blocks
        kept = max(min(blocks - unseen, self.span), reached - unseen)
        return (self.total - self.windowed) * blocks + self.windowed * kept

    def longest(self, capacity_tokens: int) -> int:
        """Return the positions of the longest sequence that fits if it is alone.

        Args:
            capacity_tokens: positions that there is room for in all layers.
        """
        blocks = capacity_tokens // KV_BLOCK
        if self.windowed and blocks > self.span:
            rest = blocks * self.total - self.windowed * self.span
            full = self.total - self.windowed
            blocks = rest // full if full else _MAX_TOKENS // KV_BLOCK
        return min(blocks, _MAX_TOKENS // KV_BLOCK) * KV_BLOCK

    def seen_from(self, computed: int) -> int:
        """Return the first position that a sequence may still be asked for, in whole blocks.

        Args:
            computed: positions that all stages have computed.
        """
        if not self.windowed:
            return 0
        return max(0, computed + 1 - self.window) // KV_BLOCK * KV_BLOCK

    def sees(self, seen_from: int, position: int) -> bool:
        """Return whether a sequence that is kept from `seen_from` on may go on at `position`."""
        return seen_from <= max(0, position + 1 - self.window)


def margin_tokens(step_tokens: int, num_stages: int) -> int:
    """Return the positions of a sequence that steps in flight may compute.

    They are in as many steps as there are stages, and in one that waits.

    Args:
        step_tokens: tokens per step at most.
        num_stages: of the pipeline.
    """
    return step_tokens * (num_stages + 1)


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)
