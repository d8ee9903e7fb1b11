"""What layers with a window or a state keep of a sequence, and what that is charged. Pure values.

A layer with a window sees the last positions of a sequence only. Others are dropped there when
their room is needed, for until then another sequence may begin with them. How far a sequence may be
set back is known: to what all stages have computed. So it keeps, at most, the window before that
and the positions of steps in flight, for which a margin is set aside.

A position is charged the full price once and the price of the windowed layers for as long as they
keep it. Prices are in parts of a block of all layers, as in the stage where the layers with a
window have the least share: all other stages take less than they are charged. So a price is one of
a plan: what sequences take in another plan is what they are charged there, by its own prices. Room
and need are compared in *positions of capacity*, each of which has the price of a position in all
layers (`KVWindows.tokens`); windows and states make them differ from positions of sequences.

A state is charged like positions: so much that as many states as there is room for fill the whole
capacity, on the stage that has room for the fewest. Then positions and states together fit on every
stage: no stage has room for fewer positions than the capacity, nor for fewer states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_llm.common.layer_states import HELD_STATES
from distributed_llm.common.types import KV_BLOCK

_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class StageKV:
    """What the layers of a stage keep of sequences.

    Attributes:
        tokens: positions that there is room for; bytes of room, if no layer keeps positions.
        token_bytes: bytes of a position in all layers.
        window: positions that a token sees in the layer with the widest window; 0 without any.
        windowed_bytes: bytes of a position in layers with a window.
        state_bytes: bytes of a state of a sequence.
    """

    tokens: int
    token_bytes: int
    window: int = 0
    windowed_bytes: int = 0
    state_bytes: int = 0


@dataclass(frozen=True)
class KVWindows:
    """The windows and states of the layers of a pipeline; by default there are none.

    Attributes:
        window: positions that a token sees in the layer with the widest window, itself included.
        margin: positions that are set aside for steps in flight.
        windowed: price of a block in the layers with a window.
        total: price of a block in all layers.
        state: price of a state of a sequence.
    """

    window: int = 0
    margin: int = 0
    windowed: int = 0
    total: int = 1
    state: int = 0

    @classmethod
    def of_stages(cls, stages: Sequence[StageKV], margin: int) -> "KVWindows":
        """Return the windows and states of stages.

        Args:
            stages: of the pipeline.
            margin: as in the attributes.
        """
        state_tokens = _state_tokens(stages)
        told = [stage for stage in stages if stage.token_bytes]
        least = min(told, key=lambda one: one.windowed_bytes / one.token_bytes, default=None)
        window = max((stage.window for stage in told), default=0)
        if least is None or not 0 < least.windowed_bytes <= least.token_bytes:
            # Others may have dropped some before. A state is seldom charged whole blocks.
            total = least.token_bytes if least and state_tokens else 1
            return cls(window, total=total, state=_blocks(total * state_tokens))
        return cls(
            window,
            margin,
            least.windowed_bytes,
            least.token_bytes,
            _blocks(least.token_bytes * state_tokens),
        )

    @property
    def span(self) -> int:
        """Blocks that layers with a window keep of one segment at most, if it can be trimmed."""
        # A block of which the first position was dropped stays, and so does one begun.
        return _blocks(self.window + self.margin) + 2

    @property
    def state_tokens(self) -> float:
        """Positions that a state is charged as."""
        return self.state / self.total * KV_BLOCK

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

    def tokens(self, price: int) -> int:
        """Return the positions of capacity that this is the price of, in whole blocks."""
        return -(-price // self.total) * KV_BLOCK

    def longest(self, capacity_tokens: int) -> int:
        """Return the positions of the longest sequence that fits if it is alone.

        Args:
            capacity_tokens: positions that there is room for in all layers.
        """
        states = -(-HELD_STATES * self.state // self.total)
        blocks = max(0, capacity_tokens // KV_BLOCK - states)
        if self.windowed and blocks > self.span:
            rest = blocks * self.total - self.windowed * self.span
            full = self.total - self.windowed
            blocks = rest // full if full else _MAX_TOKENS // KV_BLOCK
        return min(blocks, _MAX_TOKENS // KV_BLOCK) * KV_BLOCK

    def capacity(self, tokens: int) -> int:
        """Return the positions of capacity without which a sequence does not fit alone.

        Args:
            tokens: positions of the sequence.
        """
        blocks = _blocks(tokens)
        if self.windowed and blocks > self.span:
            price = (self.total - self.windowed) * blocks + self.windowed * self.span
            blocks = max(self.span + 1, -(-price // self.total))
        states = -(-HELD_STATES * self.state // self.total)
        return (blocks + states * (blocks > 0)) * KV_BLOCK

    def most_sequences(self, capacity_tokens: int) -> int:
        """Return how many sequences have room for their states at once; 0 if they keep none.

        Args:
            capacity_tokens: as in `longest`.
        """
        if not self.state:
            return 0
        return capacity_tokens // KV_BLOCK * self.total // (HELD_STATES * self.state)

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


def _state_tokens(stages: Sequence[StageKV]) -> int:
    """Return how many positions a state is charged as."""
    capacity = min((stage.tokens for stage in stages), default=0)
    rooms = [(s.state_bytes, s.tokens * max(1, s.token_bytes)) for s in stages]
    return max((-(-capacity * size // max(1, room)) for size, room in rooms), default=0)


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)
