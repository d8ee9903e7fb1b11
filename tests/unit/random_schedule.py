"""Schedules drawn from a seed: which rules of a cluster are applied, in which order, to what.

Every rule is as likely as every other one whose precondition holds, and its arguments are drawn
uniformly: unlike hypothesis, which prefers few rules and small values, this tries many things at
once. A seed is enough to repeat a schedule.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Draw = Callable[[random.Random], T]
"""Draws an argument."""

_STEPS = 30
"""Rules that one schedule applies."""


class Schedule(Protocol):
    """What is tried: its rules are methods with the decorator `rule`."""

    def start(self, draw: random.Random) -> None:
        """Begin."""

    def finish(self) -> None:
        """Mend everything, and check the end."""


@dataclass(frozen=True)
class _Rule:
    name: str
    arguments: Mapping[str, Draw[Any]]
    when: Callable[[Any], bool]


def rule(
    *, when: Callable[[Any], bool] = lambda _: True, **arguments: Draw[Any]
) -> Callable[[T], T]:
    """Have a method applied at random.

    Args:
        when: whether it may be applied now.
        arguments: how each of them is drawn.
    """

    def mark(method: T) -> T:
        name: str = method.__name__  # type: ignore[attr-defined]
        method.rule = _Rule(name, arguments, when)  # type: ignore[attr-defined]
        return method

    return mark


def run_schedule(make: Callable[[], Schedule], seed: int) -> None:
    """Run the schedule of a seed; an exception tells which one it was."""
    draw = random.Random(seed)
    schedule = make()
    rules = [
        method.rule
        for name in dir(type(schedule))
        if hasattr(method := getattr(type(schedule), name), "rule")
    ]
    try:
        schedule.start(draw)
        for _ in range(_STEPS):
            one: _Rule = draw.choice([each for each in rules if each.when(schedule)])
            getattr(schedule, one.name)(**{k: v(draw) for k, v in one.arguments.items()})
        schedule.finish()
    except BaseException as exc:
        exc.add_note(f"in the schedule of {type(schedule).__name__} with seed {seed}")
        raise


def coin(draw: random.Random) -> bool:
    """Draw yes or no."""
    return draw.random() < 0.5


def between(least: int, most: int) -> Draw[int]:
    """Draw one of these numbers, both ends included."""
    return lambda draw: draw.randint(least, most)


def any_of(values: Sequence[T]) -> Draw[T]:
    """Draw one of these values."""
    return lambda draw: draw.choice(values)


def maybe(other: Draw[T]) -> Draw[T | None]:
    """Draw nothing half of the time."""
    return lambda draw: other(draw) if coin(draw) else None


def several(of: Draw[T], least: int, most: int) -> Draw[list[T]]:
    """Draw so many values, both ends included."""
    return lambda draw: [of(draw) for _ in range(draw.randint(least, most))]
