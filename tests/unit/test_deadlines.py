"""When requests time out: the nearest first, and no memory of those that ended before."""

import random

from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.events import RequestKey
from distributed_llm.coordinator.requests.deadlines import Deadlines


def key(number: int) -> RequestKey:
    return PeerId(b"client"), f"r{number}", number


def test_without_requests_nothing_is_due() -> None:
    deadlines = Deadlines()
    assert deadlines.next() is None
    assert deadlines.take_due(now=1e9) == []
    deadlines.remove(key(1))  # a request without a deadline ends


def test_what_is_due_comes_nearest_first_and_once() -> None:
    deadlines = Deadlines()
    for number, at in enumerate((5.0, 1.0, 3.0, 9.0)):
        deadlines.add(key(number), at)
    deadlines.remove(key(2))
    assert deadlines.next() == 1.0
    assert deadlines.take_due(now=0.9) == []
    assert deadlines.take_due(now=5.0) == [key(1), key(0)]
    assert deadlines.take_due(now=5.0) == []
    assert (deadlines.next(), len(deadlines)) == (9.0, 1)
    deadlines.validate([key(3)])


def test_deadlines_of_requests_that_ended_are_forgotten() -> None:
    """Although they are far in the future, and others are nearer."""
    deadlines = Deadlines()
    deadlines.add(key(0), 10.0)
    for number in range(1, 1000):
        deadlines.add(key(number), 86400.0)
        deadlines.remove(key(number))
        deadlines.validate([key(0)])
    assert len(deadlines._heap) < 100
    assert deadlines.next() == 10.0


def test_many_that_come_and_go_are_due_as_in_a_sorted_list() -> None:
    rng, deadlines = random.Random(1), Deadlines()
    expected: dict[RequestKey, float] = {}
    for number in range(2000):
        expected[key(number)] = rng.random() * 100
        deadlines.add(key(number), expected[key(number)])
        if rng.random() < 0.4:
            ended = rng.choice(sorted(expected))
            del expected[ended]
            deadlines.remove(ended)
    deadlines.validate(expected)
    for now in (20.0, 20.0, 70.0, 100.0):
        due = sorted((k for k, at in expected.items() if at <= now), key=expected.__getitem__)
        assert deadlines.take_due(now=now) == due
        for gone in due:
            del expected[gone]
    assert len(deadlines) == 0
