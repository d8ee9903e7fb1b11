"""Makes plans: how many pipelines, by which workers, under the chosen strategy. Pure.

A planner keeps nothing and reads values that do not change, so it may run in any thread. How one
pipeline is cut into layer ranges is decided in `strategies`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distributed_llm.common.errors import NotEnoughMemory, NotReady
from distributed_llm.common.settings import CoordinatorSettings, Goal, Strategy
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import LayerMap, Plan, layer_map_of, plan_of
from distributed_llm.coordinator.planning.forecast import forecast, merit
from distributed_llm.coordinator.planning.strategies import (
    make_plan,
    plan_by_speed,
    wanted_kv_tokens,
)
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines

_MOST_PIPELINES = 8
"""Pipelines that are tried at most where nobody said how many there should be."""

_BETTER = 1.02
"""More pipelines have to be this many times better than fewer of them."""


@dataclass
class Planner:
    """Plans for one model.

    Args:
        strategy: how layers are divided.
        goal: what is planned for while nothing is asked; see `forecast.best_plan`.
        layers: the layers of each worker, for strategy "custom".
        replicas: how many pipelines should serve the model; "auto" is one, and with strategy
            "speed" as many as are fastest.
        context_length: of the model.
        least_kv_tokens: positions of KV cache without which nothing is served.
    """

    cost: ModelCost
    strategy: Strategy
    goal: Goal
    layers: Mapping[str, LayerRange]
    replicas: int | Literal["auto"]
    context_length: int
    least_kv_tokens: int

    @classmethod
    def of(cls, model: ServedModel, settings: CoordinatorSettings) -> "Planner":
        """Return the planner of a coordinator; before anything is asked it plans for several."""
        context_length = model.defaults.context_length
        return cls(
            cost=model.cost,
            strategy=settings.strategy,
            goal="throughput" if settings.objective == "auto" else settings.objective,
            layers=settings.layers,
            replicas=settings.replicas,
            context_length=context_length,
            least_kv_tokens=min(settings.min_kv_tokens, context_length),
        )

    def plans(self, machines: Machines) -> list[Plan]:
        """Return as many plans as are wanted, or as the machines can hold, or as is fastest.

        Raises:
            NotReady: there are no machines.
            NotEnoughMemory: they cannot hold the model.
            ConfigError: the layer map does not fit them.
        """
        workers = list(machines.memory_bytes)
        if not isinstance(self.replicas, int):
            fastest = self.strategy == "speed" and workers
            return self._fastest(machines) if fastest else [self.plan(machines)]
        ranked = sorted(workers, key=lambda worker: (-machines.memory_bytes[worker], worker))
        for number in range(min(self.replicas, max(1, len(workers))), 1, -1):
            try:
                return [self.plan(machines.only(group)) for group in _dealt(ranked, number)]
            except NotEnoughMemory:
                continue
        return [self.plan(machines)]

    def plan(self, machines: Machines, *, used_tokens: int = 0) -> Plan:
        """Return the plan of one pipeline for all of these machines; it may leave some out.

        Args:
            used_tokens: positions of KV cache that it should have room for, if it can.

        Raises:
            NotReady, NotEnoughMemory, ConfigError: as `plans`.
        """
        memory = machines.memory_bytes
        if not memory:
            raise NotReady("No worker is there. Start one with `dllm worker`.")
        if self.strategy == "speed":
            try:
                return self._by_speed(machines, max(used_tokens, self.kv_tokens(memory)))
            except NotEnoughMemory:
                return self._by_speed(machines, self.least_kv_tokens)
        return make_plan(
            self.cost,
            memory,
            strategy=self.strategy,
            kv_tokens=self.least_kv_tokens,
            layers=self.layers,
        )

    def plan_of(self, memory: Mapping[WorkerId, int], layer_map: LayerMap) -> Plan:
        """Return the plan in which workers with so much memory serve these layers."""
        return plan_of(self.cost, memory, layer_map)

    def kv_tokens(self, memory: Mapping[WorkerId, int]) -> int:
        """Return the positions of KV cache that a plan by speed should have room for."""
        return wanted_kv_tokens(
            self.cost, memory, least=self.least_kv_tokens, context_length=self.context_length
        )

    def _by_speed(self, machines: Machines, kv_tokens: int) -> Plan:
        demand = Demand.expected(len(machines.memory_bytes))
        return plan_by_speed(self.cost, machines, demand, goal=self.goal, kv_tokens=kv_tokens)

    def _fastest(self, machines: Machines) -> list[Plan]:
        """Return the plans that together answer most, or of which one answers soonest."""
        ranked = ranked_by_speed(machines)
        best, most = [self.plan(machines)], 0.0
        for number in range(1, 1 + min(_MOST_PIPELINES, len(ranked))):
            try:
                plans = [self.plan(machines.only(group)) for group in _dealt(ranked, number)]
            except NotEnoughMemory:
                break
            merits = [self._merit(plan, machines) for plan in plans]
            found = max(merits) if self.goal == "latency" else sum(merits)
            if found > _BETTER * most:
                best, most = plans, found
        return best

    def _merit(self, plan: Plan, machines: Machines) -> float:
        demand = Demand.expected(len(plan))
        return merit(self.goal, forecast(self.cost, machines, layer_map_of(plan), demand))


def ranked_by_speed(machines: Machines) -> list[WorkerId]:
    """Return the workers, the one first that computes a layer soonest."""
    load = Demand.expected(1).load(1.0)
    speeds = {found.worker: found.times.layer_s for found in machines.candidates(load)}
    return sorted(speeds, key=lambda worker: (speeds[worker], worker))


def _dealt(ranked: Sequence[WorkerId], number: int) -> list[list[WorkerId]]:
    """Return the workers in groups that are about alike: best first, to and fro."""
    groups: list[list[WorkerId]] = [[] for _ in range(number)]
    for at, worker in enumerate(ranked):
        turn, place = divmod(at, number)
        groups[place if turn % 2 == 0 else number - 1 - place].append(worker)
    return groups
