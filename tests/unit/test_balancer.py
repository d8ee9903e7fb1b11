"""When layer maps change: for gains that last and pay, and never to and fro."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.cluster.balancer import Alternative, Balancer
from distributed_llm.coordinator.plan import LayerMap


def cut_at(cut: int) -> LayerMap:
    """Return the layer map of two workers of which the first serves `cut` of twelve layers."""
    return (
        (WorkerId("a"), LayerRange(0, cut)),
        (WorkerId("b"), LayerRange(cut, 12)),
    )


def with_gain(
    gain: float, *, cut: int = 6, uncertainty: float = 0.0, standstill_s: float = 0.0
) -> Alternative:
    return Alternative(cut_at(cut), gain, uncertainty, standstill_s, measured=True)


def time_of_move(
    balancer: Balancer, alternative: Alternative, *, since: float, for_s: float
) -> float | None:
    """Have it considered every half second; return when the balancer said to move there."""
    now = since
    while now <= since + for_s:
        if balancer.consider(alternative, now=now).what == "move":
            return now
        now += 0.5
    return None


def test_a_gain_is_confirmed_before_it_counts() -> None:
    balancer = Balancer()
    assert balancer.consider(with_gain(0.5), now=10.0).what == "wait"
    assert balancer.consider(with_gain(0.5), now=11.9).what == "wait"
    verdict = balancer.consider(with_gain(0.5), now=12.0)
    assert (verdict.what, verdict.why) == ("move", "this is 50 % faster")


def test_a_gain_that_was_gone_meanwhile_begins_anew() -> None:
    balancer = Balancer()
    balancer.consider(with_gain(0.5), now=10.0)
    balancer.consider(with_gain(0.0), now=11.0)
    assert balancer.consider(with_gain(0.5), now=12.5).what == "wait"


@pytest.mark.parametrize(
    ("gain", "uncertainty", "moves"),
    [(0.039, 0.0, False), (0.041, 0.0, True), (0.13, 0.05, False), (0.15, 0.05, True)],
)
def test_small_gains_and_uncertain_ones_do_not_count(
    gain: float, uncertainty: float, moves: bool
) -> None:
    at = time_of_move(Balancer(), with_gain(gain, uncertainty=uncertainty), since=0.0, for_s=600.0)
    assert (at is not None) == moves


def test_a_move_must_make_good_its_standstill() -> None:
    assert time_of_move(Balancer(), with_gain(0.1, standstill_s=5.9), since=0.0, for_s=10.0) == 2.0
    verdict = Balancer().consider(with_gain(0.1, standstill_s=6.1), now=0.0)
    assert verdict.what == "stay"
    assert "stops requests for 6.1 s" in verdict.why


def test_right_after_a_move_the_next_must_gain_more() -> None:
    balancer = Balancer()
    balancer.moved(cut_at(1), now=0.0)
    large = time_of_move(balancer, with_gain(0.5), since=0.0, for_s=60.0)
    assert large == 2.0
    small = time_of_move(balancer, with_gain(0.05), since=large, for_s=120.0)
    assert small is not None
    assert 12.0 < small < 30.0


def test_a_layer_map_that_was_left_must_show_twice_the_gain_each_time() -> None:
    """Left four times in a minute; the moves are forgotten, but not yet that it was left."""
    balancer = Balancer()
    for times in range(4):
        at = 20.0 * times
        balancer.moved(cut_at(6), now=at)
        balancer.moved(cut_at(5), now=at)
    now = 160.0
    needed = [
        gain
        for gain in (0.05, 0.1, 0.2, 0.4, 0.8)
        if balancer.consider(with_gain(gain, cut=6), now=now).what != "stay"
    ]
    assert needed == [0.4, 0.8]
    assert balancer.consider(with_gain(0.05, cut=7), now=now).what != "stay", "another layer map"
    assert balancer.consider(with_gain(0.05, cut=6), now=now + 500.0).what != "stay", "forgiven"


def test_follows_a_machine_that_is_slow_now_and_then() -> None:
    """Four times slower for a minute, every other minute: each change is followed within 10 s."""
    balancer, here = Balancer(), 6
    for turn in range(6):
        there = 3 if turn % 2 == 0 else 6
        began = 60.0 * (turn + 1)
        moved = time_of_move(balancer, with_gain(1.0, cut=there), since=began, for_s=30.0)
        assert moved is not None, f"turn {turn}"
        assert moved - began <= 10.0
        balancer.moved(cut_at(here), now=moved)
        here = there


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    gains=st.lists(st.floats(-0.3, 0.4), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=7),
    every_s=st.floats(0.2, 3.0),
)
def test_whatever_is_measured_layer_maps_do_not_swing(
    gains: list[float], cuts: list[int], every_s: float
) -> None:
    """For ten minutes somebody makes the numbers up; an honest gain is at most 40 %."""
    balancer, here, now = Balancer(), 5, 0.0
    moves: list[float] = []
    swings: Counter[tuple[int, int]] = Counter()
    look = 0
    while now < 600.0:
        there = cuts[len(moves) % len(cuts)]
        gain = gains[look % len(gains)]
        if there != here and balancer.consider(with_gain(gain, cut=there), now=now).what == "move":
            balancer.moved(cut_at(here), now=now)
            swings[here, there] += 1
            moves.append(now)
            here = there
        look += 1
        now += every_s
    assert max(swings.values(), default=0) <= 9
    assert len(moves) <= 40, "one in 15 s"
    assert all(b - a >= 2.0 for a, b in pairwise(moves))
