"""Forecasts: how fast a plan would be under a demand, and which plan would be fastest. Pure.

R sequences decode, in d steps of R/d sequences each that are in flight at once. A sequence gets one
token per round trip T of its step, so the rate is R / T (Little's law), and the best d has the
least

    T(d) = max(sum of stages and hops + overhead, d * slowest stage or link)

Either a step finds every stage free, or it waits for the slowest. Each step takes the average share
of prompt tokens. This formula chooses d, but is an upper bound of the rate: steps with and without
prompt tokens differ, and make stages wait for each other. `pipeline_sim` simulates how much.
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

_SIMULATED_DEPTHS = 3
"""Depths that are simulated: the best by the formula."""

_COMPROMISES = 6
"""Plans that "auto" tries between the one for throughput and the one for latency."""


@dataclass(frozen=True)
class Forecast:
    """What a plan is expected to deliver.

    Attributes:
        tokens_per_s: tokens of answers per second under the demand, of all sequences together.
        depth: steps in flight that give this rate.
        partition: the layer map, with its times at this depth.
        overhead_s: seconds of a step beside its stages and hops.
        full_tokens_per_s: rate of a full pipeline; the score for goal "throughput".
        alone_tokens_per_s: rate of one sequence alone; the score for goal "latency".
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

    def score(self, goal: Goal) -> float:
        """Return the rate that `goal` maximises, tokens per second; see the function `score`."""
        if goal == "throughput":
            return self.full_tokens_per_s
        if goal == "latency":
            return self.alone_tokens_per_s
        return self.tokens_per_s


def forecast(cost: ModelCost, machines: Machines, layer_map: LayerMap, demand: Demand) -> Forecast:
    """Return what a layer map is expected to deliver."""
    used = machines.subset([worker for worker, _ in layer_map])
    bounds: list[tuple[float, int, Partition]] = []  # tokens per second, depth
    for depth in range(1, 1 + max(1, min(2 * len(layer_map), int(demand.sequences)))):
        sequences = demand.sequences / depth
        load = demand.mean_step(sequences)
        partition = predict(cost, used.candidates(load), used.links(load.all_tokens), layer_map)
        alone_s = partition.total_s + machines.overhead_s
        step_s = max(alone_s, depth * partition.slowest_s, 1e-9)
        bounds.append((demand.sequences / step_s, depth, partition))
        if depth * partition.slowest_s >= alone_s:
            break  # deeper, steps are smaller but all wait for the slowest stage
    most = sorted(bounds, key=lambda one: -one[0])[:_SIMULATED_DEPTHS]
    rates = [(_simulated(cost, used, layer_map, demand, *bound[:2]), *bound[1:]) for bound in most]
    tokens_per_s, depth, partition = max(rates, key=lambda one: one[0])
    return Forecast(
        tokens_per_s,
        depth,
        partition,
        overhead_s=machines.overhead_s,
        full_tokens_per_s=score(cost, machines, layer_map, demand, goal="throughput"),
        alone_tokens_per_s=score(cost, machines, layer_map, demand, goal="latency"),
    )


def _simulated(
    cost: ModelCost,
    machines: Machines,
    layer_map: LayerMap,
    demand: Demand,
    tokens_per_s: float,
    depth: int,
) -> float:
    """Return the tokens per second at a depth if some steps take longer than others.

    Args:
        cost: of the model.
        machines: of the plan.
        layer_map: of the plan.
        demand: with prompts.
        tokens_per_s: upper bound; the rate if all steps were alike.
        depth: steps in flight.
    """
    if depth == 1:
        return tokens_per_s
    sequences = demand.sequences / depth
    usual, longer = (
        _times(cost, machines, layer_map, load) for load in demand.step_kinds(sequences)
    )
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
    """Return the forecast of the best plan, None if none fits.

    Args:
        cost: of the model.
        machines: that may serve.
        demand: what is asked for.
        goal: "throughput" maximises the rate of a full pipeline, "latency" that of one sequence
            alone, "auto" the rate under this demand: by one of these two plans, or a compromise.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    found = []
    for objective, load in targets(demand, goal, len(machines.memory_bytes)):
        links = machines.links(load.all_tokens)
        partition = best_partition(
            cost, machines.candidates(load), links, objective=objective, kv_tokens=kv_tokens
        )
        if partition:
            found.append(forecast(cost, machines, partition.layer_map, demand))
    if goal == "auto" and len(found) == 2:
        load = targets(demand, "throughput", len(machines.memory_bytes))[0][1]
        most, least = (one.partition.layer_map for one in found)
        between = _compromises(cost, machines, load, most, least, kv_tokens)
        found += [forecast(cost, machines, layer_map, demand) for layer_map in between]
    return max(found, key=lambda one: one.tokens_per_s, default=None)


def _compromises(
    cost: ModelCost, machines: Machines, load: Work, most: LayerMap, least: LayerMap, kv_tokens: int
) -> list[LayerMap]:
    """Return layer maps with a slowest stage between those of `most` and `least`.

    Args:
        cost: of the model.
        machines: that may serve.
        load: a step of the size that throughput is planned for.
        most: the plan for throughput; all results keep the order of its workers.
        least: the plan for latency.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    links, candidates = machines.links(load.all_tokens), machines.candidates(load)
    slowest = [predict(cost, candidates, links, one).slowest_s for one in (most, least)]
    low, high = (max(each, 1e-9) for each in slowest)
    used = machines.subset([worker for worker, _ in most]).candidates(load)
    tables = make_tables(cost, used, links, kv_tokens)
    caps = (low * (high / low) ** (i / (_COMPROMISES + 1)) for i in range(1, _COMPROMISES + 1))
    found = [walk_forward(costs_of(tables, range(len(used)), cap_s))[1] for cap_s in caps]
    some = dict.fromkeys(tables.layer_map(cuts) for cuts in found if cuts)
    return [layer_map for layer_map in some if layer_map not in (most, least)]


def targets(demand: Demand, goal: Goal, num_workers: int) -> list[tuple[Objective, Work]]:
    """Return what to optimise for a goal: objectives, each for steps of a size.

    The best plan for the goal is among the best for these, or between them.
    """
    if goal == "latency":
        return [("latency", demand.mean_step(1.0))]
    full: tuple[Objective, Work] = (
        "throughput",
        demand.mean_step(max(1.0, demand.sequences / max(1, num_workers))),
    )
    return (
        [full] if goal == "throughput" else [full, ("latency", demand.mean_step(demand.sequences))]
    )


def score(
    cost: ModelCost, machines: Machines, layer_map: LayerMap, demand: Demand, *, goal: Goal
) -> float:
    """Return the rate that `goal` maximises, in tokens per second; comparable between plans.

    For "auto" it is the rate under the demand; for "throughput" that of a full pipeline, in steps
    of the size that is planned for; for "latency" that of one sequence alone.

    Args:
        cost: of the model.
        machines: all that may serve; their number sets the size of the steps.
        layer_map: of the plan.
        demand: what is asked for.
        goal: as for `best_plan`.
    """
    if goal == "auto":
        return forecast(cost, machines, layer_map, demand).tokens_per_s
    load = targets(demand, goal, len(machines.memory_bytes))[0][1]
    candidates = machines.subset([worker for worker, _ in layer_map]).candidates(load)
    found = predict(cost, candidates, machines.links(load.all_tokens), layer_map)
    alone_s = found.total_s + machines.overhead_s
    step_s = found.slowest_s if goal == "throughput" else alone_s
    return load.tokens / max(step_s, 1e-9)
