"""Which configuration is best, and why. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from benchmarks.tuning.agreement import kind_of
from benchmarks.tuning.figures import LoadFigures, Outcome

Goal = Literal["both", "latency", "throughput"]

LEAST_NOISE = 0.03
"""By less than this share nothing is called faster, ..."""


@dataclass(frozen=True)
class Pick:
    """The best configuration for a goal.

    Attributes:
        why: a sentence with numbers.
    """

    goal: Goal
    outcome: Outcome
    why: str


def score(loads: Mapping[int, LoadFigures], goal: Goal) -> float:
    """Return what is to be large: answers under the smallest load per second, tokens/s under the
    largest, or the geometric mean of both.
    """
    alone, full = 1.0 / loads[min(loads)].answer_s, loads[max(loads)].tokens_per_s
    if goal == "both":
        return math.sqrt(alone * full)
    return alone if goal == "latency" else full


def noise(outcomes: Sequence[Outcome], goal: Goal) -> float:
    """Return by what share runs of one configuration usually lie off their middle.

    Less than `LEAST_NOISE` is never returned.
    """
    shares = []
    for one in outcomes:
        found = [score(run.loads, goal) for run in one.runs]
        if len(found) > 1:
            shares.append((max(found) - min(found)) / 2 / median(found))
    return max(LEAST_NOISE, median(shares) if shares else 0.0)


def best(outcomes: Sequence[Outcome], goal: Goal) -> Outcome:
    """Return the best of outcomes that have not failed.

    Of those that are within the noise of the best, it is the one with the fewest changes, then the
    best of these.
    """
    top = max(score(one.loads, goal) for one in outcomes)
    least = top / (1 + noise(outcomes, goal))
    near = [one for one in outcomes if score(one.loads, goal) >= least]
    return min(near, key=lambda one: (len(one.configuration.changes), -score(one.loads, goal)))


def recommend(
    outcomes: Sequence[Outcome], goal: Goal, *, model_dtype: str, any_dtype: bool = False
) -> Pick:
    """Return the best configuration for a goal, compared with the first that did not fail.

    Args:
        outcomes: in the order in which they were tried; not all have failed.
        any_dtype: others than of the first may be chosen, though they change answers a little.
    """
    sound = [one for one in outcomes if not one.failure]
    first = sound[0]
    kind = kind_of(first.configuration, model_dtype)
    allowed = [one for one in sound if any_dtype or kind_of(one.configuration, model_dtype) == kind]
    chosen = best(allowed, goal)
    why = _why_first(chosen, allowed, goal) if chosen is first else _why(chosen, first, goal)
    faster = best(sound, goal)
    if kind_of(faster.configuration, model_dtype) != kind and not any_dtype:
        why += (
            f" ({faster.configuration.title} would be {_ratio(faster, chosen, goal)} as fast, with "
            "slightly different answers; --any-dtype allows it.)"
        )
    return Pick(goal, chosen, why[0].upper() + why[1:])


def _why_first(chosen: Outcome, others: Sequence[Outcome], goal: Goal) -> str:
    rest = [one for one in others if one is not chosen]
    if not rest:
        return f"{_achieved(chosen, goal)}; nothing else was tried that gives the same answers."
    rival = max(rest, key=lambda one: score(one.loads, goal))
    return (
        f"{_achieved(chosen, goal)}; nothing with more settings changed was better by more than "
        f"runs differ ({noise(others, goal):.0%}), the next ({rival.configuration.title}) came to "
        f"{score(rival.loads, goal) / score(chosen.loads, goal):.0%} of its speed."
    )


def _why(chosen: Outcome, first: Outcome, goal: Goal) -> str:
    text = (
        f"{_achieved(chosen, goal)}: {_ratio(chosen, first, goal)} as fast as "
        f"{first.configuration.title} ({_number(first, goal)})"
    )
    return "; ".join([text, *_reasons(chosen, first, goal)]) + "."


def _achieved(outcome: Outcome, goal: Goal) -> str:
    loads = outcome.loads
    alone, full = loads[min(loads)], loads[max(loads)]
    took, first, gap = map(seconds_text, (alone.answer_s, alone.first_token_s, alone.gap_p50_s))
    latency = (
        f"an answer takes {took} with {_requests(min(loads))} at once (first token after {first}, "
        f"then one every {gap})"
    )
    throughput = f"{_rate(full.tokens_per_s)} tokens/s with {_requests(max(loads))} at once"
    if goal == "both":
        return f"{throughput}, and {latency}"
    return latency if goal == "latency" else throughput


def _reasons(chosen: Outcome, first: Outcome, goal: Goal) -> list[str]:
    """Return what differs between the two that bears on a goal."""
    reasons = []
    ours, theirs = chosen.runs[0].stages, first.runs[0].stages
    if ours != theirs:
        reasons.append(f"the layers lie on {_stages(ours)} rather than on {_stages(theirs)}")
        reasons += _layers(first)
    load = min if goal == "latency" else max
    a, b = chosen.loads[load(chosen.loads)], first.loads[load(first.loads)]
    if goal == "latency":
        reasons += _outside(a, b)
    else:
        reasons += _busy(a, b)
    return reasons


def _layers(outcome: Outcome) -> list[str]:
    """Return what a layer takes on each worker, if several computed some."""
    found = {one.name: one.layer_s for one in outcome.runs[0].workers if one.layer_s}
    if len(found) < 2:
        return []
    texts = [f"{seconds_text(took)} on {name}" for name, took in found.items()]
    return [f"a layer takes {', '.join(texts)}"]


def _outside(ours: LoadFigures, theirs: LoadFigures) -> list[str]:
    a, b = ours.outside_share, theirs.outside_share
    if a is None or b is None or abs(a - b) < LEAST_NOISE:
        return []
    return [f"{a:.0%} of the time is spent outside the stages, {b:.0%} there"]


def _busy(ours: LoadFigures, theirs: LoadFigures) -> list[str]:
    if not ours.busiest or not theirs.busiest:
        return []
    (a, share_a), (b, share_b) = ours.busiest, theirs.busiest
    computing = sum(ours.busy.values()), sum(theirs.busy.values())
    return [
        f"its busiest worker ({a}) computes {share_a:.0%} of the time, {b} there {share_b:.0%}",
        f"{computing[0]:.1f} workers compute at a time on average, {computing[1]:.1f} there",
    ]


def _stages(stages: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{worker} {held}" for worker, held in stages)


def _ratio(one: Outcome, other: Outcome, goal: Goal) -> str:
    return f"{score(one.loads, goal) / score(other.loads, goal):.2f} times"


def _number(outcome: Outcome, goal: Goal) -> str:
    loads = outcome.loads
    rate = f"{_rate(loads[max(loads)].tokens_per_s)} tokens/s"
    took = f"{seconds_text(loads[min(loads)].answer_s)} for an answer"
    return {"both": f"{rate}, {took}", "latency": took, "throughput": rate}[goal]


def _requests(count: int) -> str:
    return f"{count} request{'s' if count > 1 else ''}"


def _rate(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def seconds_text(value: float) -> str:
    """Return a duration for people."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
