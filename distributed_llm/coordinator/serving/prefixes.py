"""Which sequence of a KV cache others may begin like, and how far. Pure.

Prefixes are found by their hashes (`prefix_index.py`), and then compared token by token, so that a
collision of hashes costs a comparison and no wrong result. What layers with a window have dropped
cannot be shared, and layers with a state of their own go on only from where one is kept.
"""

from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass

from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.serving.cached_sequence import CachedSequence
from distributed_llm.coordinator.serving.prefix_index import STRIDE, PrefixIndex, common_prefix


@dataclass(frozen=True)
class Match:
    """A sequence whose first `length` tokens are those looked for."""

    sequence_id: SequenceId
    length: int


class Prefixes:
    """The sequences of one KV cache that others may begin like.

    Args:
        windows: of the layers.

    Attributes:
        windows: as given; they may be others after a move.
    """

    def __init__(self, windows: KVWindows) -> None:
        self.windows = windows
        self._sequences: dict[SequenceId, CachedSequence] = {}
        self._index = PrefixIndex()

    def add(self, sequence_id: SequenceId, sequence: CachedSequence) -> None:
        """Let others begin like a sequence, as far as it is computed."""
        self._sequences[sequence_id] = sequence
        tokens, computed = sequence.tokens, sequence.computed
        self._index.add(sequence_id, tokens, computed, sequence.shares_with)

    def remove(self, sequence_id: SequenceId) -> None:
        """Let no other begin like a sequence any more."""
        self._index.remove(sequence_id)
        self._sequences.pop(sequence_id, None)

    def may_match(self, key: int) -> bool:
        """Return whether `match` may find a sequence.

        Args:
            key: `prefix_key` of the tokens.
        """
        return self._index.may_find(key)

    def match(self, tokens: Sequence[int], limit: int, shares_with: Hashable) -> Match | None:
        """Return the sequence with the longest common prefix with `tokens[:limit]`.

        None if none has at least `STRIDE` tokens in common.

        Args:
            tokens: looked for.
            limit: how many of them may be shared.
            shares_with: only sequences with an equal value are looked at.
        """
        best = None
        for sequence_id in self._index.find(tokens, limit, shares_with):
            sequence = self._sequences[sequence_id]
            if sequence.shares_with != shares_with:
                continue  # a collision of hashes
            length = common_prefix(sequence.tokens, tokens, min(sequence.computed, limit))
            if self.windows.state:
                length = sequence.standing_at(length)
            match = Match(sequence_id, length)
            if length >= STRIDE and self.is_seen(match):
                if not self.windows.state:
                    return match
                best = match if best is None or length > best.length else best
        return best

    def is_seen(self, match: Match) -> bool:
        """Return whether layers with a window have what one that shares `match` sees."""
        return self.windows.sees(self._sequences[match.sequence_id].seen_from, match.length)

    def is_covered(self, sequence_id: SequenceId, sequence: CachedSequence) -> bool:
        """Return whether another sequence has all tokens of this one; if not, add this one."""
        self.remove(sequence_id)
        match = self.match(sequence.tokens, sequence.computed, sequence.shares_with)
        if match is not None and match.length >= sequence.computed:
            return True
        self.add(sequence_id, sequence)
        return False

    def validate(self, known: Container[SequenceId]) -> None:
        """Assert the invariants.

        Args:
            known: the sequences that there are.
        """
        assert all(sequence_id in known for sequence_id in self._sequences)
        self._index.validate(self._sequences)
