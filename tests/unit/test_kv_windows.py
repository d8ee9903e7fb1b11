"""What layers with a window are charged, and how long a sequence may be."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_llm import summary
from distributed_llm.common.messages import PipelineStatus
from distributed_llm.common.types import KV_BLOCK, Epoch, LayerRange, SequenceId, WorkerId
from distributed_llm.coordinator.kv_windows import KVWindows, StageKV
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import PlannedStage, longest_tokens_of, plan_of
from distributed_llm.coordinator.planning.dry_run import DryRun
from distributed_llm.coordinator.serving.kv_ledger import KVLedger
from tests.wire.test_status_command import status, worker

HALF = KVWindows(window=128, margin=64, windowed=1, total=2)
"""Half of the layers have a window; a sequence keeps five blocks in them: 128 + 64 and two."""


def test_without_windows_a_block_costs_one() -> None:
    none = KVWindows.of_stages([StageKV(100, 512), StageKV(90, 256)], margin=64)
    assert none == KVWindows()
    assert none.price(7, 0, 3) == 7
    assert none.longest(1000) == 15 * KV_BLOCK
    assert none.seen_from(10_000) == 0
    assert none.sees(0, 10_000)


def test_stages_are_charged_as_the_one_with_the_least_share() -> None:
    told = [StageKV(64, 400, 128, 300), StageKV(64, 0), StageKV(64, 400, 256, 100)]
    assert KVWindows.of_stages(told, margin=9) == KVWindows(256, 9, 100, 400)
    assert KVWindows.of_stages([told[0], StageKV(64, 400)], margin=9) == KVWindows(128)
    nonsense = StageKV(64, 400, 128, 500)
    assert KVWindows.of_stages([nonsense], margin=9) == KVWindows(128)


stages = st.builds(
    StageKV,
    tokens=st.integers(1, 10_000),
    token_bytes=st.integers(0, 50),
    state_bytes=st.integers(0, 3000),
)


@given(told=st.lists(stages, min_size=1, max_size=4), states=st.integers(0, 40))
def test_what_is_charged_for_positions_and_states_fits_on_every_stage(
    told: list[StageKV], states: int
) -> None:
    """Whatever the states leave of the capacity is filled with positions."""
    windows = KVWindows.of_stages(told, margin=0)
    capacity = min(stage.tokens for stage in told)
    left = capacity // KV_BLOCK - -(-states * windows.state // windows.total)
    if left < 0:
        return
    for stage in told:
        taken = left * KV_BLOCK * stage.token_bytes + states * stage.state_bytes
        assert taken <= stage.tokens * max(1, stage.token_bytes)


plans = st.builds(
    lambda windowed, state, room: KVWindows.of_stages(
        [StageKV(room, 256, 70 if windowed else 0, windowed, state)], margin=64
    ),
    windowed=st.integers(0, 256),
    state=st.one_of(st.just(0), st.integers(1, 5000)),
    room=st.integers(640, 10_000),
)


@given(
    plans=st.tuples(plans, plans),
    answers=st.lists(
        st.tuples(st.integers(1, 400), st.integers(0, 2), st.booleans()), min_size=1, max_size=5
    ),
)
def test_what_a_plan_needs_is_what_is_charged_in_it(
    plans: tuple[KVWindows, KVWindows], answers: list[tuple[int, int, bool]]
) -> None:
    """Answers of some length with snapshots, of which some have ended, go on in another plan."""
    old, new = plans
    book = KVLedger(10**6, old)
    for number, (length, snapshots, ends) in enumerate(answers, 1):
        tokens = [number] * length
        assert book.open(SequenceId(number), tokens, length, None, shares_with=number)
        assert book.reach(SequenceId(number), 0, length) == length
        for each in range(min(snapshots, length)):
            book.keep_snapshot(SequenceId(number), each + 1)
        book.computed(SequenceId(number), length)
        if ends:
            book.end(SequenceId(number), keep=True)
    needed = book.needed_tokens(new)
    assert book.resize(10**6, new)
    book.trim(0)
    book.validate()
    assert book.used_tokens == needed
    assert book.resize(needed)


@given(plan=plans, length=st.integers(1, 20_000))
def test_the_capacity_for_a_sequence_is_the_least_in_which_it_fits(
    plan: KVWindows, length: int
) -> None:
    capacity = plan.capacity(length)
    assert plan.longest(capacity) >= length > plan.longest(capacity - KV_BLOCK)
    book = KVLedger(capacity, plan)
    assert book.open(SequenceId(1), [1] * length, 1, None)


@given(windowed=st.integers(0, 256), state=st.integers(1, 5000), room=st.integers(640, 10_000))
def test_a_state_is_charged_alike_with_windows_and_without(
    windowed: int, state: int, room: int
) -> None:
    told = [StageKV(room, 256, 70, windowed, state)]
    none = [StageKV(room, 256, state_bytes=state)]
    each = KVWindows.of_stages(told, margin=64).state_tokens
    assert each == KVWindows.of_stages(none, margin=64).state_tokens
    assert state / 256 <= each < state / 256 + 2


def test_a_state_is_charged_as_on_the_stage_that_has_room_for_the_fewest() -> None:
    """300 states fill the room of the first stage, 500 that of one that keeps no positions."""
    told = [StageKV(9600, 10, state_bytes=320), StageKV(50_000, 0, state_bytes=100)]
    assert KVWindows.of_stages(told, margin=0) == KVWindows(total=10, state=5)
    few = [told[0], StageKV(50_000, 0, state_bytes=1000)]
    windows = KVWindows.of_stages(few, margin=0)
    assert windows == KVWindows(total=10, state=30)
    assert windows.longest(9600) == 9600 - 2 * 3 * KV_BLOCK
    windowed = [StageKV(9600, 10, window=128, windowed_bytes=5, state_bytes=640)]
    assert KVWindows.of_stages(windowed, 9) == KVWindows(128, 9, windowed=5, total=10, state=10)


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


def test_what_was_dropped_is_known_after_layers_have_moved() -> None:
    """To stages of which one has no layer with a window, so that nothing is dropped any more."""
    tokens = list(range(1000))
    ledger = KVLedger(100 * KV_BLOCK, HALF)
    assert ledger.open(SequenceId(1), tokens, 1000, None)
    ledger.computed(SequenceId(1), 1000)
    assert not ledger.open(SequenceId(2), [5] * 11500, 11500, None)  # what is not seen goes
    stages = [StageKV(100_000, 2, window=128, windowed_bytes=1), StageKV(100_000, 1)]
    assert ledger.resize(100_000, KVWindows.of_stages(stages, 64))
    assert ledger.match(tokens[:500] + [7] * 50, 549) is None
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


def test_without_positions_texts_are_counted() -> None:
    """A text keeps two states; on the second stage, 100 of them fill the room."""
    stages = [StageKV(2_000_000, 0, state_bytes=1000), StageKV(1_600_000, 0, state_bytes=8000)]
    windows = KVWindows.of_stages(stages, margin=0)
    assert windows.most_sequences(1_600_000) == 100
    assert KVWindows().most_sequences(1_600_000) == 0

    shown = status(worker("a", layers=LayerRange(0, 36)), most_texts=100)
    told = "1 under way, and room for 100 texts of any length at once"
    assert summary.headline(shown).endswith(told)
    cost = ModelCost((100,) * 2, 0, 0, 0, (0, 1), layer_state_bytes=(8, 0))
    for layers, room in (
        (LayerRange(0, 1), "100 texts of any length at once"),
        (LayerRange(0, 2), "1,600 tokens of context"),
    ):
        stage = PlannedStage(WorkerId("a"), layers, 100, 1600)
        assert summary.stage_row(stage, 10**6, cost)[-1] == room


def test_who_asks_for_a_plan_or_the_status_is_told() -> None:
    cost = ModelCost((100,) * 4, 0, 0, 0, (1,) * 4, windows=(128, 0, 128, 0))
    plan = plan_of(cost, {WorkerId("a"): 400 + 12800}, ((WorkerId("a"), LayerRange(0, 4)),))
    run = DryRun(cost, (plan,), {WorkerId("a"): 13200}, 1.0, 2.0, {}, (), longest_tokens=(6080,))
    assert (
        "context: up to 6,080 tokens in one request, for 2 of 4 layers keep the last 128 and those "
        "of steps under way only"
    ) in summary.plan_lines(run)
    assert not any(line.startswith("states") for line in summary.plan_lines(run))
    stateful = replace(run, cost=replace(cost, layer_state_bytes=(1024, 0, 1024, 0)))
    assert (
        "states: 4.0 KiB for each request, however long, in 2 of 4 layers; 2.0 KiB more for each "
        "point of a text from which others may go on"
    ) in summary.plan_lines(stateful)
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
