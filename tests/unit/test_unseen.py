"""What layers with a window drop of running sequences, and how that is told and charged."""

from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.serving.cached_sequence import CachedSequence
from distributed_llm.coordinator.serving.kv_charges import KVCharges, Segment
from distributed_llm.coordinator.serving.unseen import Unseen

HALF = KVWindows(window=128, margin=64, windowed=1, total=2)
"""One of two layers has a window."""

ONE, TWO = SequenceId(1), SequenceId(2)


class Bench:
    """Sequences of 16 blocks, all of which hold one segment."""

    def __init__(self, *sequence_ids: SequenceId) -> None:
        self.charges = KVCharges(1000 * KV_BLOCK, HALF)
        self.segment = Segment(0, ONE, set(sequence_ids), blocks=16, reached=16)
        self.charges.keep(self.segment, len(sequence_ids))
        self.charges.charge(self.segment)
        self.sequences = {
            i: CachedSequence([], segments=[self.segment], computed=1000) for i in sequence_ids
        }
        self.unseen = Unseen(self.charges, self.sequences)


def test_what_no_token_sees_any_more_is_dropped_told_once_and_charged_no_more() -> None:
    bench = Bench(ONE)
    before = bench.charges.used
    bench.unseen.drop([ONE])
    assert bench.unseen.take() == {ONE: 832}
    assert bench.unseen.take() == {}
    assert bench.sequences[ONE].seen_from == 832
    assert bench.segment.unseen == 832 // KV_BLOCK
    assert bench.charges.used < before
    bench.unseen.drop([ONE])
    assert bench.unseen.take() == {}, "there is nothing more"


def test_only_running_sequences_that_nobody_is_about_to_share_drop_anything() -> None:
    bench = Bench(ONE, TWO)
    bench.sequences[ONE].ended = True
    bench.sequences[TWO].pins = 1
    bench.unseen.drop(bench.sequences)
    assert bench.unseen.take() == {}
    bench.sequences[TWO].pins = 0
    bench.unseen.drop(bench.sequences)
    assert bench.unseen.take() == {TWO: 832}


def test_what_another_one_sees_stays_charged_until_it_sees_it_no_more() -> None:
    bench = Bench(ONE, TWO)
    bench.sequences[TWO].computed = 300
    bench.unseen.drop([ONE])
    assert bench.segment.unseen == 0
    bench.unseen.drop([TWO])
    assert bench.segment.unseen == 128 // KV_BLOCK
    bench.segment.holders.remove(TWO)
    bench.unseen.note(bench.segment)
    assert bench.segment.unseen == 832 // KV_BLOCK
