"""What has come of all requests, and how long those that wait will take."""

import pytest

from distributed_llm.coordinator.requests.totals import TimeCounts, Totals


def finished(*times: float) -> Totals:
    totals = Totals()
    for now in times:
        totals.count_finished(now=now)
    return totals


def test_counts() -> None:
    assert Totals() == Totals(finished=0, failed=0, tokens=0, prefix_hit_tokens=0, preemptions=0)
    assert finished(1.0, 2.0, 2.5).finished == 3


@pytest.mark.parametrize("times", [(), (100.0,)])
def test_without_a_pace_it_is_a_second(times: tuple[float, ...]) -> None:
    assert finished(*times).seconds_for(1) == 1.0
    assert finished(*times).seconds_for(1000) == 1.0


def test_as_long_as_so_many_took() -> None:
    steady = finished(*(10.0 + 2.0 * i for i in range(6)))
    assert steady.seconds_for(1) == pytest.approx(2.0)
    assert steady.seconds_for(7) == pytest.approx(14.0)


def test_the_last_ones_count_most() -> None:
    changed = finished(0.0, 10.0, 12.0)
    assert changed.seconds_for(1) == pytest.approx(0.8 * 10 + 0.2 * 2)
    times = [10.0 * i for i in range(5)]
    times += [times[-1] + i for i in range(1, 40)]
    assert finished(*times).seconds_for(100) == pytest.approx(100.0, rel=0.02)


def test_between_a_second_and_ten_minutes() -> None:
    assert finished(0.0, 0.001).seconds_for(3) == 1.0
    assert finished(0.0, 100.0).seconds_for(3) == 300.0
    assert finished(0.0, 100.0).seconds_for(7) == 600.0


def test_many_at_once() -> None:
    assert finished(5.0, 5.0, 5.0).seconds_for(50) == 1.0


def test_times_are_counted_in_the_buckets_whose_bounds_include_them() -> None:
    counts = TimeCounts((0.1, 1.0, 10.0))
    for seconds in (0.0, 0.1, 0.100001, 1.0, 5.0, 10.5, 99.0):
        counts.add(seconds)
    histogram = counts.histogram
    assert histogram.counts == (2, 2, 1, 2)
    assert histogram.sum_s == pytest.approx(115.700001)
