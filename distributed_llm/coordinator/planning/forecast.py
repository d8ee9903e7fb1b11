"""Forecasts: how fast a layer map would be under a demand, and which would be fastest. Pure.

R sequences decode, in d steps of R/d sequences each that are in flight at once. A sequence gets one
token per round trip T of its step, so the rate is R / T (Little's law), and the best d has the
least

    T(d) = max(sum of stages and hops + overhead, d * slowest stage or link)

Either a step finds every stage free, or it waits for the slowest. Each step takes the average share
of prompt tokens. This formula chooses d, but is an upper bound of the rate: steps with and without
prompt tokens differ, and make stages wait for each other. `pipeline_sim` simulates how much.
"""

from dataclasses import dataclass
from typing import NamedTuple

from distributed_llm.common.settings import Objective
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.exact import path_times, walk_forward
from distributed_llm.coordinator.partition.search import best_partition, predict, times_of
from distributed_llm.coordinator.partition.tables import Partition, PartitionObjective, make_tables
from distributed_llm.coordinator.plan import LayerMap
from distributed_llm.coordinator.planning.pipeline_sim import StepTimes, round_trip_s
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.work import Work

_SIMULATED_DEPTHS = 3
"""Number of depths that are simulated; they are the best ones by the formula."""

_COMPROMISES = 6
"""Layer maps that "auto" tries between the ones for throughput and for latency."""


@dataclass(frozen=True)
class Forecast:
    """What a layer map is expected to deliver.

    Attributes:
        tokens_per_s: tokens of answers per second under the demand, of all sequences together.
        depth: steps in flight that give this rate.
        partition: the layer map, with its times at this depth.
        overhead_s: seconds of a step beside its stages and hops.
        full_tokens_per_s: rate of a full pipeline; the score for objective "throughput".
        alone_tokens_per_s: rate of one sequence alone; the score for objective "latency".
    """

    tokens_per_s: float
    depth: int
    partition: Partition
    overhead_s: float
    full_tokens_per_s: float
    alone_tokens_per_s: float

    @property
    def layer_map(self) -> LayerMap:
        """The layer map that this is the forecast of."""
        return self.partition.layer_map

    def score(self, objective: Objective) -> float:
        """Return the rate that `objective` maximises, tokens per second; see `score` below."""
        if objective == "throughput":
            return self.full_tokens_per_s
        if objective == "latency":
            return self.alone_tokens_per_s
        return self.tokens_per_s


class _Rate(NamedTuple):
    """What a layer map delivers under a demand; see `Forecast`."""

    tokens_per_s: float
    depth: int
    partition: Partition


def forecast(cost: ModelCost, machines: Machines, layer_map: LayerMap, demand: Demand) -> Forecast:
    """Return what a layer map is expected to deliver."""
    return _forecast(cost, machines, demand, _rate(cost, machines, layer_map, demand))


def _forecast(cost: ModelCost, machines: Machines, demand: Demand, rate: _Rate) -> Forecast:
    """Return the forecast of the layer map with this rate."""
    layer_map = rate.partition.layer_map
    return Forecast(
        *rate,
        overhead_s=machines.overhead_s,
        full_tokens_per_s=score(cost, machines, layer_map, demand, objective="throughput"),
        alone_tokens_per_s=score(cost, machines, layer_map, demand, objective="latency"),
    )


def _rate(cost: ModelCost, machines: Machines, layer_map: LayerMap, demand: Demand) -> _Rate:
    """Return the rate of a layer map at the best depth."""
    used = machines.subset([worker for worker, _ in layer_map])
    bounds: list[_Rate] = []
    for depth in range(1, 1 + max(1, min(2 * len(layer_map), int(demand.sequences)))):
        sequences = demand.sequences / depth
        work = demand.mean_step(sequences)
        partition = predict(cost, used.candidates(work), used.links_for(work), layer_map)
        alone_s = partition.total_s + machines.overhead_s
        step_s = max(alone_s, depth * partition.slowest_s, 1e-9)
        bounds.append(_Rate(demand.sequences / step_s, depth, partition))
        if depth * partition.slowest_s >= alone_s:
            break  # deeper, steps are smaller but all wait for the slowest stage
    bounds.sort(key=lambda bound: -bound.tokens_per_s)
    best: _Rate | None = None
    for bound in bounds[:_SIMULATED_DEPTHS]:
        if best and bound.tokens_per_s <= best.tokens_per_s:
            break  # neither it nor one after it can be better
        tokens_per_s = _simulated(cost, used, layer_map, demand, *bound[:2])
        if best is None or tokens_per_s > best.tokens_per_s:
            best = bound._replace(tokens_per_s=tokens_per_s)
    assert best is not None
    return best


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
        machines: of the layer map.
        layer_map: workers and their layers.
        demand: what is asked for.
        tokens_per_s: upper bound; the rate if all steps were alike.
        depth: steps in flight.
    """
    if depth == 1:
        return tokens_per_s
    sequences = demand.sequences / depth
    usual, longer = (
        _step_times(cost, machines, layer_map, work) for work in demand.step_kinds(sequences)
    )
    share = demand.prompt_share(sequences)
    overhead_s = machines.overhead_s
    step_s = round_trip_s(usual, longer, share=share, depth=depth, overhead_s=overhead_s)
    return min(tokens_per_s, demand.sequences / max(step_s, 1e-9))


def _step_times(cost: ModelCost, machines: Machines, layer_map: LayerMap, work: Work) -> StepTimes:
    links = machines.links_for(work)
    stages, hops = times_of(cost, machines.candidates(work), links, layer_map)
    busy_s, delay_s = [stages[0]], [0.0]
    for hop, stage_s in zip(hops, stages[1:], strict=True):
        busy_s += [hop.busy_s, stage_s]
        delay_s += [hop.latency_s, 0.0]
    return StepTimes(busy_s, delay_s)


def best_forecast(
    cost: ModelCost, machines: Machines, demand: Demand, *, objective: Objective, kv_tokens: int
) -> Forecast | None:
    """Return the forecast of the best layer map, None if none fits.

    Args:
        cost: of the model.
        machines: that may serve.
        demand: what is asked for.
        objective: "throughput" maximises the rate of a full pipeline, "latency" that of one
            sequence alone, "auto" the rate under this demand: by one of these two layer maps, or a
            compromise.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    num_workers, rates = len(machines.memory_bytes), []
    for target in targets(demand, objective, num_workers):
        partition = best_partition(
            cost,
            machines.candidates(target.work),
            machines.links_for(target.work),
            objective=target.objective,
            kv_tokens=kv_tokens,
        )
        if partition:
            rates.append(_rate(cost, machines, partition.layer_map, demand))
    if objective == "auto" and len(rates) == 2:
        work = targets(demand, "throughput", num_workers)[0].work
        full, alone = (rate.partition.layer_map for rate in rates)
        between = _compromises(cost, machines, work, full, alone, kv_tokens)
        rates += [_rate(cost, machines, layer_map, demand) for layer_map in between]
    best = max(rates, key=lambda rate: rate.tokens_per_s, default=None)
    return _forecast(cost, machines, demand, best) if best else None


def _compromises(
    cost: ModelCost, machines: Machines, work: Work, full: LayerMap, alone: LayerMap, kv_tokens: int
) -> list[LayerMap]:
    """Return layer maps whose slowest stage is between those of `full` and `alone`.

    Args:
        cost: of the model.
        machines: that may serve.
        work: of a step of the size that throughput is planned for.
        full: the best layer map for throughput; all results keep the order of its workers.
        alone: the best layer map for latency.
        kv_tokens: positions of KV cache that every stage must have room for.
    """
    links, candidates = machines.links_for(work), machines.candidates(work)
    slowest = [predict(cost, candidates, links, one).slowest_s for one in (full, alone)]
    low, high = (max(each, 1e-9) for each in slowest)
    used = machines.subset([worker for worker, _ in full]).candidates(work)
    tables = make_tables(cost, used, links, kv_tokens)
    caps = (low * (high / low) ** (i / (_COMPROMISES + 1)) for i in range(1, _COMPROMISES + 1))
    walks = [walk_forward(path_times(tables, range(len(used)), cap_s))[1] for cap_s in caps]
    between = dict.fromkeys(tables.layer_map(cuts) for cuts in walks if cuts)
    return [layer_map for layer_map in between if layer_map not in (full, alone)]


class Target(NamedTuple):
    """What a partition is made for: an objective, for steps with this work."""

    objective: PartitionObjective
    work: Work


def targets(demand: Demand, objective: Objective, num_workers: int) -> list[Target]:
    """Return the targets of partitions of which one, or a compromise, is best for `objective`."""
    if objective == "latency":
        return [Target("latency", demand.mean_step(1.0))]
    full_step = demand.mean_step(max(1.0, demand.sequences / max(1, num_workers)))
    full = Target("throughput", full_step)
    if objective == "throughput":
        return [full]
    return [full, Target("latency", demand.mean_step(demand.sequences))]


def score(
    cost: ModelCost,
    machines: Machines,
    layer_map: LayerMap,
    demand: Demand,
    *,
    objective: Objective,
) -> float:
    """Return the rate that `objective` maximises, in tokens per second.

    For "auto" it is the rate under the demand; for "throughput" that of a full pipeline, in steps
    of the size that is planned for; for "latency" that of one sequence alone.

    Args:
        cost: of the model.
        machines: all that may serve; their number sets the size of the steps.
        layer_map: workers and their layers.
        demand: what is asked for.
        objective: as for `best_forecast`.
    """
    if objective == "auto":
        return _rate(cost, machines, layer_map, demand).tokens_per_s
    work = targets(demand, objective, len(machines.memory_bytes))[0].work
    candidates = machines.subset([worker for worker, _ in layer_map]).candidates(work)
    partition = predict(cost, candidates, machines.links_for(work), layer_map)
    alone_s = partition.total_s + machines.overhead_s
    step_s = partition.slowest_s if objective == "throughput" else alone_s
    return work.tokens / max(step_s, 1e-9)
