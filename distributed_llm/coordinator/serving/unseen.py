"""What layers with a window need not keep of running sequences, and no longer do. Pure.

It is dropped when its room is needed; the stages are told. Ended sequences keep what they have, for
others that may begin like them.
"""

from collections.abc import Iterable, Mapping

from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.coordinator.serving.cached_sequence import CachedSequence
from distributed_llm.coordinator.serving.kv_charges import KVCharges, Segment


class Unseen:
    """Drops positions of sequences that layers with a window do not see any more.

    Args:
        charges: of the KV cache.
        sequences: all there are; they are only read, but for how far they are seen.
    """

    def __init__(self, charges: KVCharges, sequences: Mapping[SequenceId, CachedSequence]) -> None:
        self._charges = charges
        self._sequences = sequences
        self._dropped: dict[SequenceId, int] = {}  # first positions that are seen from now on

    def take(self) -> dict[SequenceId, int]:
        """Return from which positions on sequences are seen since the last call."""
        dropped, self._dropped = self._dropped, {}
        return dropped

    def drop(self, sequence_ids: Iterable[SequenceId]) -> None:
        """Drop what running sequences of these do not see any more, and charge less for it.

        Not of those with which others begin that some stage may not know yet.
        """
        for sequence_id in sequence_ids:
            sequence = self._sequences[sequence_id]
            seen_from = self._charges.windows.seen_from(sequence.computed)
            if not (sequence.ended or sequence.pins) and seen_from > sequence.seen_from:
                sequence.seen_from = self._dropped[sequence_id] = seen_from
                for segment in sequence.segments:
                    self.note(segment)

    def note(self, segment: Segment) -> None:
        """Charge for a segment as far as any sequence that holds it still sees it."""
        seen_from = min(self._sequences[holder].seen_from for holder in segment.holders)
        unseen = min(segment.blocks, max(0, seen_from - segment.start) // KV_BLOCK)
        if unseen > segment.unseen:
            segment.unseen = unseen
            self._charges.charge(segment)
