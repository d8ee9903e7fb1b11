"""What layers with a window are charged, and how long a sequence may be."""

from dataclasses import replace

import pytest

from distributed_llm import summary
from distributed_llm.common.messages import PipelineStatus
from distributed_llm.common.types import KV_BLOCK, Epoch, LayerRange, SequenceId, WorkerId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import longest_tokens_of, plan_of
from distributed_llm.coordinator.planning.dry_run import DryRun
from distributed_llm.coordinator.serving.kv_ledger import KVLedger
from tests.wire.test_status_command import status, worker

HALF = KVWindows(window=128, margin=64, windowed=1, total=2)
"""Half of the layers have a window; a sequence keeps five blocks in them: 128 + 64 and two."""


def test_without_windows_a_block_costs_one() -> None:
    none = KVWindows.of_stages([(0, 0, 512), (0, 0, 256)], margin=64)
    assert none == KVWindows()
    assert none.price(7, 0, 3) == 7
    assert none.longest(1000) == 15 * KV_BLOCK
    assert none.seen_from(10_000) == 0
    assert none.sees(0, 10_000)


def test_stages_are_charged_as_the_one_with_the_least_share() -> None:
    told = [(128, 300, 400), (0, 0, 0), (256, 100, 400)]
    assert KVWindows.of_stages(told[::2], margin=9) == KVWindows(256, 9, 100, 400)
    assert KVWindows.of_stages([(128, 300, 400), (0, 0, 400)], margin=9) == KVWindows()
    assert KVWindows.of_stages([(128, 500, 400)], margin=9) == KVWindows(), (
        "a worker tells nonsense"
    )


@pytest.mark.parametrize(
    ("blocks", "unseen", "reached", "kept"),
    [
        (3, 0, 0, 3),
        (100, 0, 0, 5),  # set aside for its window and the steps in flight
        (100, 0, 40, 40),  # kept, for there is room
        (100, 38, 40, 5),
        (40, 38, 40, 2),
    ],
)
def test_prices(blocks: int, unseen: int, reached: int, kept: int) -> None:
    assert HALF.price(blocks, unseen, reached) == blocks + kept


def test_a_sequence_alone_may_be_longer_than_the_room_in_all_layers() -> None:
    assert HALF.longest(4 * KV_BLOCK) == 4 * KV_BLOCK
    assert HALF.longest(100 * KV_BLOCK) == (200 - 5) * KV_BLOCK
    assert KVWindows(128, 64, 2, 2).longest(100 * KV_BLOCK) > 10**9, "all layers have a window"
    ledger = KVLedger(100 * KV_BLOCK, HALF)
    longest = HALF.longest(100 * KV_BLOCK)
    assert not ledger.open(SequenceId(1), [1] * longest, longest + 1, None)
    assert ledger.open(SequenceId(1), [1] * (longest - 1), longest, None)
    start = 0
    while start < longest:
        stop = ledger.reach(SequenceId(1), start, longest)
        assert stop > start
        ledger.computed(SequenceId(1), start := min(stop, longest))
        ledger.validate()
    assert ledger.take_dropped()[SequenceId(1)] > longest - 5 * KV_BLOCK


def test_a_prefix_is_shared_only_if_all_is_there_that_is_seen() -> None:
    tokens = list(range(1000))
    ledger = KVLedger(100 * KV_BLOCK, HALF)
    assert ledger.open(SequenceId(1), tokens, 1000, None)
    assert ledger.reach(SequenceId(1), 0, 1000) == 1000, "nobody else needs the room"
    ledger.computed(SequenceId(1), 1000)
    found = ledger.match(tokens[:500] + [7] * 50, 549)
    assert found
    assert found.length == 500
    assert not ledger.open(SequenceId(2), [5] * 11500, 11500, None)  # what is not seen goes
    assert ledger.take_dropped() == {SequenceId(1): 832}
    assert ledger.match(tokens[:500] + [7] * 50, 549) is None
    assert ledger.match(tokens[:958] + [7] * 50, 1007) is None
    found = ledger.match(tokens[:960] + [7] * 50, 1009)
    assert found
    assert found.length == 960


def test_who_is_shared_keeps_what_is_seen_until_all_stages_know() -> None:
    tokens = list(range(1000))
    ledger = KVLedger(100 * KV_BLOCK, HALF)
    assert ledger.open(SequenceId(1), tokens, 1000, None)
    ledger.computed(SequenceId(1), 1000)
    child = tokens[:500] + [7] * 50
    assert ledger.open(SequenceId(2), child, 551, ledger.match(child, 549))
    assert not ledger.open(SequenceId(3), [5] * 11500, 11500, None)
    assert ledger.take_dropped() == {}
    ledger.computed(SequenceId(2), 550)
    assert ledger.take_dropped() == {SequenceId(2): 384}  # somebody waits for room
    assert not ledger.open(SequenceId(3), [5] * 11500, 11500, None)
    assert ledger.take_dropped() == {SequenceId(1): 832}
    ledger.validate()


def test_a_plan_says_how_long_one_request_may_be() -> None:
    cost = ModelCost((100,) * 4, 0, 0, 0, (1,) * 4, windows=(128, 0, 128, 0))
    layer_map = ((WorkerId("a"), LayerRange(0, 2)), (WorkerId("b"), LayerRange(2, 4)))
    plan = plan_of(cost, {WorkerId("a"): 200 + 6400, WorkerId("b"): 200 + 12800}, layer_map)
    windows = KVWindows(128, 30, 1, 2)
    assert longest_tokens_of(plan, cost, 10) == windows.longest(3200) == (100 - 5) * KV_BLOCK
    plain = ModelCost((100,) * 4, 0, 0, 0, (1,) * 4)
    assert longest_tokens_of(plan, plain, 10) == 3200


def test_who_asks_for_a_plan_or_the_status_is_told() -> None:
    cost = ModelCost((100,) * 4, 0, 0, 0, (1,) * 4, windows=(128, 0, 128, 0))
    plan = plan_of(cost, {WorkerId("a"): 400 + 12800}, ((WorkerId("a"), LayerRange(0, 4)),))
    run = DryRun(cost, (plan,), {WorkerId("a"): 13200}, 1.0, 2.0, {}, (), longest_tokens=(6080,))
    assert (
        "context: up to 6,080 tokens in one request, for 2 of 4 layers keep the last 128 and those "
        "of steps under way only"
    ) in summary.plan_lines(run)
    alike = replace(run, longest_tokens=(3200,))
    assert not any("context" in line for line in summary.plan_lines(alike))
    pipeline = PipelineStatus(
        epoch=Epoch(3),
        lineage=Epoch(3),
        state="serving",
        stages=(),
        links=(),
        kv_tokens=65_536,
        kv_longest_tokens=100_000,
    )
    shown = status(worker("a", layers=LayerRange(0, 36)), pipelines=(pipeline,))
    told = "of 65,536 tokens of context in use, and room for 100,000 in one request"
    assert summary.headline(shown).endswith(told)
