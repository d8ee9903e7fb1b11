"""How fast a plan would be under a load, and which plan would be fastest. Pure.

R sequences decode, in d steps of R/d sequences under way at once. A sequence gets a token per round
trip T of its step, so the rate is R / T (Little's law), and the best d has the least

    T(d) = max(sum of stages and links + overhead, d * slowest stage or link)

Either a step finds every stage free, or it waits for the slowest. Steps take parts of prompts
along: each pays for as many as come per step on average. This tells d; what the plan really does is
less, since the steps differ (`flow`).
"""

from dataclasses import dataclass

from distributed_llm.common.settings import Goal
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.exact import costs_of, walk_forward
from distributed_llm.coordinator.partition.search import best_partition, predict, times_of
from distributed_llm.coordinator.partition.tables import Objective, Partition, make_tables
from distributed_llm.coordinator.plan import LayerMap
from distributed_llm.coordinator.planning.pipeline_sim import Times, round_trip_s
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.work import Work

_DEPTHS = 3
"""Numbers of steps, the best if all were alike, of which it is found out what they really do."""

_BETWEEN = 6
"""Plans that "auto" looks at between that for throughput and that for latency."""


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
    def layer_map(self) -> LayerMap:
        """The layer map of the plan."""
        return self.partition.layer_map


def forecast(cost: ModelCost, machines: Machines, layer_map: LayerMap, demand: Demand) -> Forecast:
    """Return what these ranges are expected to do."""
    used = machines.only([worker for worker, _ in layer_map])
    bounds: list[tuple[float, int, Partition]] = []  # tokens per second, depth
    for depth in range(1, 1 + max(1, min(2 * len(layer_map), int(demand.sequences)))):
        sequences = demand.sequences / depth
        load = demand.load(sequences)
        partition = predict(cost, used.candidates(load), used.links(load.all_tokens), layer_map)
        alone_s = partition.total_s + machines.overhead_s
        step_s = max(alone_s, depth * partition.slowest_s, 1e-9)
        bounds.append((demand.sequences / step_s, depth, partition))
        if depth * partition.slowest_s >= alone_s:
            break  # with more, steps wait for the slowest only, which has no fewer of them to do
    most = sorted(bounds, key=lambda one: -one[0])[:_DEPTHS]
    flows = [(_flow(cost, used, layer_map, demand, *bound[:2]), *bound[1:]) for bound in most]
    tokens_per_s, depth, partition = max(flows, key=lambda one: one[0])
    return Forecast(
        tokens_per_s,
        depth,
        partition,
        overhead_s=machines.overhead_s,
        full_tokens_per_s=rate(cost, machines, layer_map, demand, goal="throughput"),
        alone_tokens_per_s=rate(cost, machines, layer_map, demand, goal="latency"),
    )


def _flow(
    cost: ModelCost,
    machines: Machines,
    layer_map: LayerMap,
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
    usual, longer = (_times(cost, machines, layer_map, load) for load in demand.kinds(sequences))
    share = demand.prompt_share(sequences)
    overhead_s = machines.overhead_s
    step_s = round_trip_s(usual, longer, share=share, depth=depth, overhead_s=overhead_s)
    return min(tokens_per_s, demand.sequences / max(step_s, 1e-9))


def _times(cost: ModelCost, machines: Machines, layer_map: LayerMap, load: Work) -> Times:
    links = machines.links(load.all_tokens)
    stages, hops = times_of(cost, machines.candidates(load), links, layer_map)
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
        links = machines.links(load.all_tokens)
        partition = best_partition(
            cost, machines.candidates(load), links, objective=objective, kv_tokens=kv_tokens
        )
        if partition:
            found.append(forecast(cost, machines, partition.layer_map, demand))
    if goal == "auto" and len(found) == 2:
        load = aims(demand, "throughput", len(machines.memory_bytes))[0][1]
        most, least = (one.partition.layer_map for one in found)
        between = _between(cost, machines, load, most, least, kv_tokens)
        found += [forecast(cost, machines, layer_map, demand) for layer_map in between]
    return max(found, key=lambda one: one.tokens_per_s, default=None)


def _between(
    cost: ModelCost, machines: Machines, load: Work, most: LayerMap, least: LayerMap, kv_tokens: int
) -> list[LayerMap]:
    """Return ranges whose slowest stage takes longer than in `most`, and less than in `least`.

    Args:
        cost: of the model.
        machines: that may serve.
        load: of each step.
        most: the plan with the quickest slowest stage; all keep the order of its workers.
        least: the plan with the quickest sum of stages and links.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    links, candidates = machines.links(load.all_tokens), machines.candidates(load)
    slowest = [predict(cost, candidates, links, one).slowest_s for one in (most, least)]
    low, high = (max(each, 1e-9) for each in slowest)
    used = machines.only([worker for worker, _ in most]).candidates(load)
    tables = make_tables(cost, used, links, kv_tokens)
    caps = (low * (high / low) ** (i / (_BETWEEN + 1)) for i in range(1, _BETWEEN + 1))
    found = [walk_forward(costs_of(tables, range(len(used)), cap_s))[1] for cap_s in caps]
    some = dict.fromkeys(tables.layer_map(cuts) for cuts in found if cuts)
    return [layer_map for layer_map in some if layer_map not in (most, least)]


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
    cost: ModelCost, machines: Machines, layer_map: LayerMap, demand: Demand, *, goal: Goal
) -> float:
    """Return the tokens per second that a goal makes many, which can be compared between plans.

    For "auto" that is under the demand; for "throughput" with as many steps under way as fill the
    pipeline, of the size that is planned for; for "latency" of one sequence alone.

    Args:
        machines: all that may serve; how many there are makes the size of the steps.
    """
    if goal == "auto":
        return forecast(cost, machines, layer_map, demand).tokens_per_s
    load = aims(demand, goal, len(machines.memory_bytes))[0][1]
    candidates = machines.only([worker for worker, _ in layer_map]).candidates(load)
    found = predict(cost, candidates, machines.links(load.all_tokens), layer_map)
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
