"""One sequence in the KV cache of a pipeline, as its ledger keeps it. Pure."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from distributed_llm.common.messages import SharedPrefix
from distributed_llm.coordinator.serving.kv_charges import Segment


@dataclass(eq=False)
class CachedSequence:
    """A sequence in the KV cache.

    Attributes:
        tokens: token ids; while the sequence runs, its answer's own list, which grows.
        segments: the segments it references, by position.
        length: positions charged for it.
        computed: positions that all stages have computed.
        seen_from: the first position that layers with a window may still be asked for.
        prefix: the prefix it began with, until all stages have confirmed it.
        pins: number of sequences that begin with a prefix of this one and that not all stages have
            confirmed; while there are any, it is not freed.
        ended: whether it is kept only as a prefix for others.
        cut: whether its end was cut off, so that no state is kept there.
        shares_with: only sequences with an equal value begin with a prefix of it.
        set_back: whether its latest step was abandoned, so that some stages are to go on from where
            that began.
        lost: whether a stage has lost positions of it, so that it is freed once it has no pins.
        states: of layers with a state, that are charged for it.
        snapshots: positions at which one is kept, or will be once they are computed; ascending.
    """

    tokens: Sequence[int]
    shares_with: Hashable = None
    segments: list[Segment] = field(default_factory=list)
    length: int = 0
    computed: int = 0
    seen_from: int = 0
    prefix: SharedPrefix | None = None
    pins: int = 0
    ended: bool = False
    cut: bool = False
    set_back: bool = False
    lost: bool = False
    states: int = 0
    snapshots: list[int] = field(default_factory=list)

    @property
    def can_be_freed(self) -> bool:
        """Whether its room can be given to others."""
        return self.ended and not self.pins

    def standing_at(self, length: int) -> int:
        """Return the last of the first `length` positions after which a state is kept, or 0."""
        if self.ended and not self.cut and self.computed <= length:
            return self.computed
        most = min(length, self.computed)
        return max((at for at in self.snapshots if at <= most), default=0)
