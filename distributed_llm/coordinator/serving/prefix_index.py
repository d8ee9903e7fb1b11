"""Which sequences begin with the same tokens: found by hashes of their prefixes. Pure.

The tokens up to each multiple of `STRIDE` are hashed, each hash continuing the one before, as in
vLLM's prefix caching. Hashes may collide, so whoever asks compares the tokens.
"""

from collections.abc import Container, Hashable, Iterator, Sequence
from itertools import chain

from distributed_llm.common.types import SequenceId

STRIDE = 16
"""Positions by which indexed prefixes grow; a shorter prefix is not shared."""

_TRIES = 8
"""Sequences that are found for one prompt, at most."""


class PrefixIndex:
    """The prefixes of the sequences of one KV cache."""

    def __init__(self) -> None:
        self._sequences: dict[int, dict[SequenceId, None]] = {}  # by hash of a prefix
        self._hashes: dict[SequenceId, list[int]] = {}  # of its prefixes, one per stride

    def find(
        self, tokens: Sequence[int], limit: int, shares_with: Hashable
    ) -> Iterator[SequenceId]:
        """Yield sequences that probably share a prefix with `tokens[:limit]`.

        Those with the longest prefixes come first, among them the newest; each comes once.
        """
        found: list[dict[SequenceId, None]] = []
        state = _seed(shares_with)
        for at in range(0, limit - STRIDE + 1, STRIDE):
            state = _hash(state, tokens[at : at + STRIDE])
            sharing = self._sequences.get(state)
            if not sharing:
                break
            found.append(sharing)
        tried: dict[SequenceId, None] = {}
        for sequence_id in chain.from_iterable(map(reversed, reversed(found))):
            if sequence_id in tried:
                continue
            if len(tried) == _TRIES:
                return
            tried[sequence_id] = None
            yield sequence_id

    def may_find(self, key: int) -> bool:
        """Return whether `find` may yield a sequence.

        Args:
            key: `prefix_key` of the tokens.
        """
        return key in self._sequences

    def add(
        self, sequence_id: SequenceId, tokens: Sequence[int], computed: int, shares_with: Hashable
    ) -> None:
        """Add the prefixes of `tokens[:computed]` that are not known yet."""
        hashes = self._hashes.setdefault(sequence_id, [])
        state = hashes[-1] if hashes else _seed(shares_with)
        for at in range(len(hashes) * STRIDE, computed - STRIDE + 1, STRIDE):
            state = _hash(state, tokens[at : at + STRIDE])
            hashes.append(state)
            self._sequences.setdefault(state, {})[sequence_id] = None

    def remove(self, sequence_id: SequenceId) -> None:
        """Remove all prefixes of a sequence."""
        for state in self._hashes.pop(sequence_id, ()):
            sharing = self._sequences.get(state)
            if sharing is not None:
                sharing.pop(sequence_id, None)
                if not sharing:
                    del self._sequences[state]

    def validate(self, known: Container[SequenceId]) -> None:
        """Assert the invariants.

        Args:
            known: the sequences that there are.
        """
        for state, ids in self._sequences.items():
            assert ids
            assert all(i in known and state in self._hashes[i] for i in ids)


def prefix_key(tokens: Sequence[int], shares_with: Hashable = None) -> int:
    """Return a key that is equal for all sequences that may share a prefix."""
    return _hash(_seed(shares_with), tokens[:STRIDE])


def common_prefix(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """Return the length of the common prefix of `left` and `right`, at most `limit`.

    Slices that double in length are compared, then halved where they differ.
    """
    limit = min(limit, len(left), len(right))
    same, step = 0, STRIDE
    while same < limit:
        stop = min(same + step, limit)
        if left[same:stop] == right[same:stop]:
            same, step = stop, step * 2
        elif step == 1:
            break
        else:
            step = max(1, min(step, stop - same) // 2)
    return same


def _seed(shares_with: Hashable) -> int:
    return 0 if shares_with is None else hash(shares_with)


def _hash(state: int, tokens: Sequence[int]) -> int:
    return hash((state, *tokens))
