"""How fast a plan would be under a load, and which plan would be fastest. Pure.

R sequences decode, in d steps of R/d sequences under way at once. A sequence gets a token per round
trip T of its step, so the rate is R / T (Little's law), and the best d has the least

    T(d) = max(sum of stages and links + overhead, d * slowest stage or link)

Either a step finds every stage free, or it waits for the slowest. Steps take parts of prompts
along: each pays for as many as come per step on average. This tells d; what the plan really does is
less, since the steps differ (`flow`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.flow import Times, round_trip_s
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition import (
    Candidate,
    Links,
    Objective,
    Partition,
    Ranges,
    best_partition,
    predict,
    times_of,
)
from distributed_llm.coordinator.partition_solvers import costs_of, walk_forward
from distributed_llm.coordinator.partition_tables import make_tables
from distributed_llm.coordinator.task_fit import Work
from distributed_llm.coordinator.worker_costs import WorkerCosts

Goal = Literal["auto", "throughput", "latency"]

_DEPTHS = 3
"""Numbers of steps, the best if all were alike, of which it is found out what they really do."""

_BETWEEN = 6
"""Plans that "auto" looks at between that for throughput and that for latency."""


@dataclass(frozen=True)
class Demand:
    """What is asked of a pipeline, on average.

    Attributes:
        sequences: that decode at the same time.
        positions: of KV cache that each of them attends to.
        prompt_tokens: tokens of prompts that are computed per token that is answered.
        chunk_tokens: tokens of prompts in a step that has parts of them.
    """

    sequences: float
    positions: float
    prompt_tokens: float
    chunk_tokens: float

    @classmethod
    def expected(cls, num_workers: int) -> "Demand":
        """Return what to plan for before anything was asked: enough to keep all workers busy."""
        return cls(
            sequences=max(1, num_workers),
            positions=256,
            prompt_tokens=1,
            chunk_tokens=128,
        )

    def load(self, sequences: float) -> Work:
        """Return an average step in which so many sequences decode."""
        return self._step(sequences, self.prompt_share(sequences))

    def kinds(self, sequences: float) -> tuple[Work, Work]:
        """Return a step without a part of a prompt, and one that has."""
        return self._step(sequences, 0.0), self._step(sequences, 1.0)

    def prompt_share(self, sequences: float) -> float:
        """Return the share of steps that have parts of prompts."""
        return min(1.0, sequences * self.prompt_tokens / max(1.0, self.chunk_tokens))

    def _step(self, sequences: float, prompts: float) -> Work:
        """Prompts are before their answers, so they attend to fewer positions, say half of them."""
        share = self.prompt_share(sequences)
        tokens = prompts * sequences * self.prompt_tokens / share if share else 0.0
        return Work(
            tokens=sequences,
            positions=sequences * self.positions,
            prompts=prompts,
            prompt_tokens=tokens,
            prompt_positions=tokens * self.positions / 2,
        )


@dataclass(frozen=True)
class Forecast:
    """What a plan is expected to do.

    Attributes:
        tokens_per_s: of answers, all sequences together.
        depth: steps under way at which that is so.
        partition: with the times of its stages at that depth.
        overhead_s: that a step takes beside them.
        full_tokens_per_s: with as many steps as fill the pipeline, of the size planned for.
        alone_tokens_per_s: of one sequence alone.
    """

    tokens_per_s: float
    depth: int
    partition: Partition
    overhead_s: float
    full_tokens_per_s: float
    alone_tokens_per_s: float

    @property
    def ranges(self) -> Ranges:
        """Of the plan."""
        return self.partition.ranges


@dataclass(frozen=True)
class Machines:
    """Workers, as planning sees them.

    Attributes:
        memory_bytes: of each, for weights and KV cache.
        costs: measured or from the probe.
        links: from a number of tokens in a step to what the hops take.
        overhead_s: that a step takes beside stages and hops: on its way from and to the
            coordinator.
    """

    memory_bytes: Mapping[WorkerId, int]
    costs: Mapping[WorkerId, WorkerCosts]
    links: Callable[[float], Links]
    overhead_s: float = 0.0

    def candidates(self, load: Work) -> list[Candidate]:
        """Return the workers with what they take under a load.

        One that was not measured is expected to be as far from its prior as the others were at
        first.
        """
        found = (costs.first_scale(load) for costs in self.costs.values())
        scale = median([scale for scale in found if scale is not None] or [1.0])
        return [
            Candidate(worker, size, self.costs[worker].speed(load, scale=scale))
            for worker, size in self.memory_bytes.items()
        ]

    def only(self, workers: Sequence[WorkerId]) -> "Machines":
        """Return some of them."""
        sizes = {worker: self.memory_bytes[worker] for worker in workers}
        return replace(self, memory_bytes=sizes)


def forecast(cost: ModelCost, machines: Machines, ranges: Ranges, demand: Demand) -> Forecast:
    """Return what these ranges are expected to do."""
    used = machines.only([worker for worker, _ in ranges])
    bounds: list[tuple[float, int, Partition]] = []  # tokens per second, depth
    for depth in range(1, 1 + max(1, min(2 * len(ranges), int(demand.sequences)))):
        sequences = demand.sequences / depth
        load = demand.load(sequences)
        partition = predict(cost, used.candidates(load), used.links(link_tokens(load)), ranges)
        alone_s = partition.total_s + machines.overhead_s
        step_s = max(alone_s, depth * partition.slowest_s, 1e-9)
        bounds.append((demand.sequences / step_s, depth, partition))
        if depth * partition.slowest_s >= alone_s:
            break  # with more, steps wait for the slowest only, which has no fewer of them to do
    most = sorted(bounds, key=lambda one: -one[0])[:_DEPTHS]
    flows = [(_flow(cost, used, ranges, demand, *bound[:2]), *bound[1:]) for bound in most]
    tokens_per_s, depth, partition = max(flows, key=lambda one: one[0])
    return Forecast(
        tokens_per_s,
        depth,
        partition,
        overhead_s=machines.overhead_s,
        full_tokens_per_s=rate(cost, machines, ranges, demand, goal="throughput"),
        alone_tokens_per_s=rate(cost, machines, ranges, demand, goal="latency"),
    )


def _flow(
    cost: ModelCost,
    machines: Machines,
    ranges: Ranges,
    demand: Demand,
    tokens_per_s: float,
    depth: int,
) -> float:
    """Return the tokens per second with so many steps, of which some take longer than others.

    Args:
        tokens_per_s: if all were alike.
    """
    if depth == 1:
        return tokens_per_s
    sequences = demand.sequences / depth
    usual, longer = (_times(cost, machines, ranges, load) for load in demand.kinds(sequences))
    share = demand.prompt_share(sequences)
    overhead_s = machines.overhead_s
    step_s = round_trip_s(usual, longer, share=share, depth=depth, overhead_s=overhead_s)
    return min(tokens_per_s, demand.sequences / max(step_s, 1e-9))


def _times(cost: ModelCost, machines: Machines, ranges: Ranges, load: Work) -> Times:
    links = machines.links(link_tokens(load))
    stages, hops = times_of(cost, machines.candidates(load), links, ranges)
    busy_s, delay_s = [stages[0]], [0.0]
    for hop, stage_s in zip(hops, stages[1:], strict=True):
        busy_s += [hop.busy_s, stage_s]
        delay_s += [hop.latency_s, 0.0]
    return Times(busy_s, delay_s)


def best_plan(
    cost: ModelCost, machines: Machines, demand: Demand, *, goal: Goal, kv_tokens: int
) -> Forecast | None:
    """Return the best ranges, None if nothing fits.

    Args:
        cost: of the model.
        machines: that may serve.
        demand: what is asked for.
        goal: "throughput" is for as many sequences as fill the pipeline, "latency" for one by one;
            "auto" takes what gives most tokens per second under this demand: one of these, or a
            plan between.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    found = []
    for objective, load in aims(demand, goal, len(machines.memory_bytes)):
        links = machines.links(link_tokens(load))
        partition = best_partition(
            cost, machines.candidates(load), links, objective=objective, kv_tokens=kv_tokens
        )
        if partition:
            found.append(forecast(cost, machines, partition.ranges, demand))
    if goal == "auto" and len(found) == 2:
        load = aims(demand, "throughput", len(machines.memory_bytes))[0][1]
        most, least = (one.partition.ranges for one in found)
        between = _between(cost, machines, load, most, least, kv_tokens)
        found += [forecast(cost, machines, ranges, demand) for ranges in between]
    return max(found, key=lambda one: one.tokens_per_s, default=None)


def _between(
    cost: ModelCost, machines: Machines, load: Work, most: Ranges, least: Ranges, kv_tokens: int
) -> list[Ranges]:
    """Return ranges whose slowest stage takes longer than in `most`, and less than in `least`.

    Args:
        cost: of the model.
        machines: that may serve.
        load: of each step.
        most: the plan with the quickest slowest stage; all keep the order of its workers.
        least: the plan with the quickest sum of stages and links.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    links, candidates = machines.links(link_tokens(load)), machines.candidates(load)
    slowest = [predict(cost, candidates, links, one).slowest_s for one in (most, least)]
    low, high = (max(each, 1e-9) for each in slowest)
    used = machines.only([worker for worker, _ in most]).candidates(load)
    tables = make_tables(cost, used, links, kv_tokens)
    caps = (low * (high / low) ** (i / (_BETWEEN + 1)) for i in range(1, _BETWEEN + 1))
    found = [walk_forward(costs_of(tables, range(len(used)), cap_s))[1] for cap_s in caps]
    some = dict.fromkeys(tables.ranges(cuts) for cuts in found if cuts)
    return [ranges for ranges in some if ranges not in (most, least)]


def aims(demand: Demand, goal: Goal, num_workers: int) -> list[tuple[Objective, Work]]:
    """Return what to make best for a goal, at the load of which steps; of the plans, one is it."""
    if goal == "latency":
        return [("latency", demand.load(1.0))]
    full: tuple[Objective, Work] = (
        "throughput",
        demand.load(max(1.0, demand.sequences / max(1, num_workers))),
    )
    return [full] if goal == "throughput" else [full, ("latency", demand.load(demand.sequences))]


def rate(
    cost: ModelCost, machines: Machines, ranges: Ranges, demand: Demand, *, goal: Goal
) -> float:
    """Return the tokens per second that a goal makes many, which can be compared between plans.

    For "auto" that is under the demand; for "throughput" with as many steps under way as fill the
    pipeline, of the size that is planned for; for "latency" of one sequence alone.

    Args:
        machines: all that may serve; how many there are makes the size of the steps.
    """
    if goal == "auto":
        return forecast(cost, machines, ranges, demand).tokens_per_s
    load = aims(demand, goal, len(machines.memory_bytes))[0][1]
    candidates = machines.only([worker for worker, _ in ranges]).candidates(load)
    found = predict(cost, candidates, machines.links(link_tokens(load)), ranges)
    alone_s = found.total_s + machines.overhead_s
    step_s = found.slowest_s if goal == "throughput" else alone_s
    return load.tokens / max(step_s, 1e-9)


def merit(goal: Goal, found: Forecast) -> float:
    """Return the tokens per second that a goal makes many; see `rate`."""
    if goal == "throughput":
        return found.full_tokens_per_s
    if goal == "latency":
        return found.alone_tokens_per_s
    return found.tokens_per_s


def link_tokens(load: Work) -> float:
    """Return the tokens whose activations cross a link per step."""
    return load.tokens + load.prompt_tokens
