"""A pipeline of stages on a virtual clock, to see what a choice of the depth is worth."""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from distributed_llm.coordinator.serving.depth_estimator import DepthEstimator

Cost = Callable[[int], float]
"""Seconds that a stage computes for a number of sequences."""


class DepthChooser(Protocol):
    """Chooses how many steps are under way; `DepthEstimator` does."""

    def observe(self, stage: int, tokens: int, compute_s: float, *, depth: int, now: float) -> None:
        """Learn from one task."""

    def observe_overhead(self, seconds: float, now: float) -> None:
        """Learn the part of a round trip in which a step was neither computed nor queued."""

    def best_depth(self, sequences: int, *, limit: int, now: float) -> int:
        """Return how many steps should be under way."""


def linear(base_s: float, per_sequence_s: float) -> Cost:
    return lambda n: base_s + per_sequence_s * n


@dataclass
class Step:
    """One micro-batch on its way."""

    sequences: int
    depth: int
    began_at: float
    stage: int = 0
    spent_s: float = 0.0
    arrived_at: float = 0.0
    started_at: float = 0.0
    work_s: float = 0.0


@dataclass
class Pipeline:
    """Stages with queues, through which all sequences decode without end.

    Attributes:
        costs: of the stages.
        shared: all stages are on one machine, shared evenly by those that compute.
        noise: largest deviation of a task's time, as a share.
        fixed_depth: steps under way; 0 leaves the choice to `times`.
        times: chooses the depth.
        choices: of the depth, so far.
    """

    costs: Sequence[Cost]
    sequences: int
    shared: bool = False
    noise: float = 0.0
    fixed_depth: int = 0
    limit: int = 8
    hop_s: float = 0.001
    now: float = 0.0
    tokens: int = 0
    choices: list[int] = field(default_factory=list)
    times: DepthChooser = field(init=False)

    def __post_init__(self) -> None:
        self.times = DepthEstimator(len(self.costs), half_life_s=5.0)
        self.draw = random.Random(1)
        self.queues: list[deque[Step]] = [deque() for _ in self.costs]
        self.computing: dict[int, Step] = {}  # by stage
        self.hops: deque[tuple[float, Step]] = deque()
        self.idle = self.sequences
        self.under_way = 0

    def run(self, seconds: float) -> float:
        """Go on for so long; return tokens per second."""
        until, before, began = self.now + seconds, self.tokens, self.now
        self.start_steps()
        while self.now < until:
            self.advance()
        return (self.tokens - before) / (self.now - began)

    def advance(self) -> None:
        """Go to when the next step is computed or arrives."""
        share = len(self.computing) if self.shared else 1
        first = min(self.computing.values(), key=lambda step: step.work_s, default=None)
        done_at = self.now + first.work_s * share if first else math.inf
        arrives_at = self.hops[0][0] if self.hops else math.inf
        elapsed = max(0.0, min(done_at, arrives_at) - self.now)
        self.now += elapsed
        for step in self.computing.values():
            step.work_s -= elapsed / share
        if first and done_at <= arrives_at:
            self.done(first)
        else:
            self.arrive(self.hops.popleft()[1])

    def start_steps(self) -> None:
        depth = self.fixed_depth or self.times.best_depth(
            self.sequences, limit=self.limit, now=self.now
        )
        self.choices.append(depth)
        while self.under_way < depth and self.idle:
            self.under_way += 1
            step = Step(min(-(-self.sequences // depth), self.idle), self.under_way, self.now)
            self.idle -= step.sequences
            self.hops.append((self.now + self.hop_s, step))

    def arrive(self, step: Step) -> None:
        if step.stage == len(self.costs):
            return self.finish(step)
        step.arrived_at = self.now
        self.queues[step.stage].append(step)
        self.compute(step.stage)

    def compute(self, stage: int) -> None:
        if stage not in self.computing and self.queues[stage]:
            step = self.computing[stage] = self.queues[stage].popleft()
            step.started_at = self.now
            step.work_s = self.costs[stage](step.sequences)
            step.work_s *= 1 + self.draw.uniform(-1, 1) * self.noise

    def done(self, step: Step) -> None:
        stage, took = step.stage, self.now - step.started_at
        del self.computing[stage]
        self.times.observe(stage, step.sequences, took, depth=step.depth, now=self.now)
        step.spent_s += self.now - step.arrived_at
        step.stage += 1
        self.hops.append((self.now + self.hop_s, step))
        self.compute(stage)

    def finish(self, step: Step) -> None:
        self.times.observe_overhead(self.now - step.began_at - step.spent_s, self.now)
        self.tokens += step.sequences
        self.idle += step.sequences
        self.under_way -= 1
        self.start_steps()

    @property
    def changes(self) -> int:
        """How often the choice changed."""
        return sum(a != b for a, b in pairwise(self.choices))


EQUAL = (linear(0.010, 0.0005),) * 3
ONE_SLOW = (linear(0.005, 0.0005), linear(0.020, 0.001), linear(0.005, 0.0005))
PROPORTIONAL = (linear(0.0, 0.002),) * 4
LONG = (linear(0.010, 0.0001),) * 8
SINGLE = (linear(0.010, 0.0005),)
