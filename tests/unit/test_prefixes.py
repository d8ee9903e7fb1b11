"""Which sequence is found for a prompt, and how much of it others may share."""

from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.serving import prefix_index
from distributed_llm.coordinator.serving.cached_sequence import CachedSequence
from distributed_llm.coordinator.serving.prefix_index import common_prefix, prefix_key
from distributed_llm.coordinator.serving.prefixes import Match, Prefixes

TEXT = list(range(1000))


class Bench:
    """Sequences that others may begin like."""

    def __init__(self, windows: KVWindows | None = None) -> None:
        self.prefixes = Prefixes(windows or KVWindows())
        self.sequences: dict[SequenceId, CachedSequence] = {}

    def add(self, number: int, tokens: Sequence[int], **given: object) -> CachedSequence:
        """Add a sequence that is computed as a whole."""
        sequence = CachedSequence(tokens, computed=len(tokens), **given)  # type: ignore[arg-type]
        self.sequences[SequenceId(number)] = sequence
        self.prefixes.add(SequenceId(number), sequence)
        self.prefixes.validate(self.sequences)
        return sequence

    def match(
        self, tokens: Sequence[int], limit: int = 1000, shares_with: Hashable = None
    ) -> tuple[int, int] | None:
        """Return the sequence that is found, and how much of it is shared."""
        found = self.prefixes.match(tokens, limit, shares_with)
        return (found.sequence_id, found.length) if found else None


@pytest.mark.parametrize(
    ("common", "found"), [(15, None), (16, 16), (17, 17), (31, 31), (100, 100)]
)
def test_alike_up_to_the_last_token(common: int, found: int | None) -> None:
    """Sixteen positions are worth it; what is beyond a multiple of sixteen counts, too."""
    bench = Bench()
    bench.add(1, TEXT[:100])
    match = bench.match(TEXT[:common] + [7777] * 50, common + 49)
    assert match == ((1, found) if found else None)


def test_the_longest_is_found() -> None:
    bench = Bench()
    bench.add(1, TEXT[:64] + [5001] * 64)
    bench.add(2, TEXT[:96] + [5002] * 64)
    bench.add(3, TEXT[:32] + [5003] * 64)
    assert bench.match(TEXT[:200], 199) == (2, 96)


def test_no_more_is_shared_than_is_computed_and_may_be() -> None:
    bench = Bench()
    tokens = TEXT[:40]
    sequence = bench.add(1, tokens)
    tokens += TEXT[40:80]
    assert bench.match(TEXT[:200]) == (1, 40)
    sequence.computed = 80
    bench.prefixes.add(SequenceId(1), sequence)
    assert bench.match(TEXT[:200]) == (1, 80)
    assert bench.match(TEXT[:200], 33) == (1, 33)


def test_a_hash_that_lies_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_index, "_hash", lambda state, tokens: 1)
    bench = Bench()
    bench.add(1, TEXT[:100])
    assert bench.match(TEXT[500:600], 99) is None
    assert bench.match(TEXT[:20] + TEXT[500:580], 99) == (1, 20)
    assert bench.match(TEXT[:100], 99, shares_with="others") is None


def test_only_equal_values_share() -> None:
    bench = Bench()
    bench.add(1, TEXT[:100], shares_with="a")
    assert bench.match(TEXT[:200], shares_with="a") == (1, 100)
    assert bench.match(TEXT[:200], shares_with="b") is None
    assert bench.prefixes.may_match(prefix_key(TEXT[:20], "a"))
    assert not bench.prefixes.may_match(prefix_key(TEXT[:20], "b"))


def test_who_is_removed_is_found_no_more() -> None:
    bench = Bench()
    bench.add(1, TEXT[:100])
    bench.prefixes.remove(SequenceId(1))
    bench.prefixes.remove(SequenceId(1))
    bench.prefixes.validate(())
    assert bench.match(TEXT[:200]) is None


def test_what_layers_with_a_window_have_dropped_is_not_shared() -> None:
    bench = Bench(KVWindows(window=128, margin=64, windowed=1, total=2))
    sequence = bench.add(1, TEXT)
    assert bench.match([*TEXT[:500], 7]) == (1, 500)
    sequence.seen_from = 832
    assert bench.match([*TEXT[:500], 7]) is None
    assert bench.match([*TEXT[:958], 7]) is None
    assert bench.match([*TEXT[:960], 7]) == (1, 960)
    assert not bench.prefixes.is_seen(Match(SequenceId(1), 500))


def test_with_states_the_longest_is_shared_that_one_stands_at() -> None:
    """Though another sequence has more tokens in common."""
    bench = Bench(KVWindows(state=1))
    bench.add(1, [*TEXT[:100], 5], snapshots=[50, 90])
    bench.add(2, [*TEXT[:150], 5], snapshots=[64])
    assert bench.match(TEXT[:200]) == (1, 90)
    bench.add(3, TEXT[:120], ended=True)
    assert bench.match(TEXT[:200]) == (3, 120)
    assert bench.match(TEXT[:80]) == (2, 64)


def test_a_sequence_is_covered_by_one_that_goes_on() -> None:
    bench = Bench()
    long, short = bench.add(1, TEXT[:100]), bench.add(2, TEXT[:80])
    assert not bench.prefixes.is_covered(SequenceId(1), long)
    assert bench.match(TEXT[:100]) == (1, 100), "it is still found"
    assert bench.prefixes.is_covered(SequenceId(2), short)
    bench.prefixes.remove(SequenceId(1))
    assert bench.match(TEXT[:100]) is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    left=st.lists(st.integers(0, 1), max_size=80),
    right=st.lists(st.integers(0, 1), max_size=80),
    same=st.integers(0, 300),
    limit=st.integers(0, 400),
)
def test_common_prefix(left: list[int], right: list[int], same: int, limit: int) -> None:
    left, right = TEXT[:same] + left, TEXT[:same] + right
    assert common_prefix(left, right, limit) == naive_common(left[:limit], right[:limit])


def naive_common(left: Sequence[int], right: Sequence[int]) -> int:
    at = 0
    while at < min(len(left), len(right)) and left[at] == right[at]:
        at += 1
    return at
