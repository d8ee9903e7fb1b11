"""Planner: how many pipelines, of which workers, under the chosen strategy. Pure.

A planner has no state and reads values that do not change, so it may run in any thread. How the
layers of one pipeline are divided is decided in `strategies`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distributed_llm.common.errors import NotEnoughMemory, NotReady
from distributed_llm.common.settings import CoordinatorSettings, Objective, Strategy
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.common.wording import size_text
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import LayerMap, Plan, layer_map_of, offloaded, plan_of
from distributed_llm.coordinator.planning.forecast import forecast
from distributed_llm.coordinator.planning.strategies import (
    make_plan,
    plan_by_speed,
    wanted_kv_tokens,
)
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines

_MOST_PIPELINES = 8
"""Most pipelines that are tried if `replicas` is "auto"."""

_BETTER = 1.02
"""Factor by which more pipelines must be faster than fewer."""


@dataclass(frozen=True)
class Planner:
    """Makes the plans of one model.

    Attributes:
        cost: of the model.
        smaller: costs of the same model with fewer bits per weight, most bits first.
        may_shrink: machines that cannot hold `cost` get a plan with the first of `smaller` that
            they can; otherwise the error says that they could.
        may_offload: layers may stay where workers offer room beside their devices, if the machines
            can hold the model in no other way.
        strategy: how layers are divided.
        objective: what plans by strategy "speed" are best for before there is demand; see
            `forecast.best_forecast`.
        layers: the layers of each worker, for strategy "custom".
        replicas: pipelines that should serve the model; "auto" is one, or with strategy "speed" as
            many as are fastest.
        context_length: of the model, positions.
        least_kv_tokens: positions of KV cache that every plan has room for.
    """

    cost: ModelCost
    strategy: Strategy
    objective: Objective
    layers: Mapping[str, LayerRange]
    replicas: int | Literal["auto"]
    context_length: int
    least_kv_tokens: int
    smaller: tuple[ModelCost, ...] = ()
    may_shrink: bool = False
    may_offload: bool = True

    @classmethod
    def from_settings(cls, model: ServedModel, settings: CoordinatorSettings) -> "Planner":
        """Return the planner of a coordinator.

        Until there is demand, objective "auto" is throughput. A pipeline needs no more room for KV
        cache than one context, whatever `min_kv_tokens` says.
        """
        context_length = model.defaults.context_length
        return cls(
            cost=model.cost,
            strategy=settings.strategy,
            objective="throughput" if settings.objective == "auto" else settings.objective,
            layers=settings.layers,
            replicas=settings.replicas,
            context_length=context_length,
            least_kv_tokens=min(settings.min_kv_tokens, context_length),
            smaller=model.smaller,
            may_shrink=model.may_shrink,
        )

    def only(self, quantize: Quantize) -> "Planner":
        """Return the planner of a model whose weights are quantized so, and all in memory."""
        costs = (self.cost, *self.smaller)
        cost = next((cost for cost in costs if cost.quantize == quantize), self.cost)
        return replace(self, cost=cost, smaller=(), may_shrink=False, may_offload=False)

    def at_most(self, quantize: Quantize) -> "Planner":
        """Return the planner of weights that have so many bits, or fewer where they may shrink."""
        costs = (self.cost, *self.smaller)
        at = next((at for at, cost in enumerate(costs) if cost.quantize == quantize), 0)
        smaller = costs[at + 1 :] if self.may_shrink else ()
        return replace(self, cost=costs[at], smaller=smaller)

    def more_than(self, quantize: Quantize) -> "Planner | None":
        """Return the planner of weights in memory with more bits than so; None if none have."""
        costs = (self.cost, *self.smaller) if self.may_shrink else ()
        at = next((at for at, cost in enumerate(costs) if cost.quantize == quantize), 0)
        return replace(self, smaller=costs[1:at], may_offload=False) if at else None

    def plans(self, machines: Machines) -> list[Plan]:
        """Return one plan per pipeline: `replicas` of them, or as many as the machines can hold.

        Raises:
            NotReady: there are no machines.
            NotEnoughMemory: they cannot hold the model.
            ConfigError: the layers of strategy "custom" do not suit them.
        """
        return self._first_that_fits(machines, lambda planner, some: planner._plans(some))

    def plan(self, machines: Machines, *, used_tokens: int = 0) -> Plan:
        """Return the plan of one pipeline of these machines; some may be left out.

        Args:
            machines: that may serve.
            used_tokens: positions of KV cache that are in use; the plan has room for them if one
                can. Strategy "speed" only.

        Raises:
            NotReady, NotEnoughMemory, ConfigError: as `plans`.
        """
        (plan,) = self._first_that_fits(
            machines, lambda planner, some: [planner._plan(some, used_tokens)]
        )
        return plan

    def _plan(self, machines: Machines, used_tokens: int = 0) -> Plan:
        memory = machines.memory_bytes
        if not memory:
            raise NotReady("No worker is there. Start one with `dllm worker`.")
        if self.strategy == "speed":
            if machines.offloads:  # a larger KV cache would leave more layers away
                return self._by_speed(machines, self.least_kv_tokens)
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

    def _first_that_fits(
        self, machines: Machines, make: Callable[["Planner", Machines], list[Plan]]
    ) -> list[Plan]:
        """Return plans on the devices alone if there are any, else some with layers away.

        Raises:
            NotEnoughMemory: nothing fits.
        """
        try:
            return self._in_memory(lambda planner: make(planner, machines))
        except NotEnoughMemory as exc:
            error = exc
        if not self.may_offload:
            raise error
        planner = self.only(self.smaller[-1].quantize) if self._may_offload_smaller else self
        with_more = machines.offloading(planner.cost, planner.least_kv_tokens)
        if with_more is None:
            raise error
        ram = {worker: own.ram_bytes for worker, own in with_more.overflows.items()}
        try:
            plans = make(planner, with_more)
            memory, tokens = machines.memory_bytes, planner.least_kv_tokens
            return [offloaded(plan, planner.cost, memory, ram, tokens) for plan in plans]
        except NotEnoughMemory:
            raise error from None

    @property
    def _may_offload_smaller(self) -> bool:
        """Whether weights become as small as they may before any are away."""
        return self.may_shrink and bool(self.smaller)

    def _in_memory(self, make: Callable[["Planner"], list[Plan]]) -> list[Plan]:
        """Return the plans with the most bits per weight that fit.

        Raises:
            NotEnoughMemory: nothing fits; if fewer bits would, the message says so.
        """
        try:
            return make(self)
        except NotEnoughMemory as exc:
            error = exc
        for cost in self.smaller:
            try:
                made = make(self.only(cost.quantize))
            except NotEnoughMemory as exc:
                error = exc if self.may_shrink else error
                continue
            if self.may_shrink:
                return made
            raise NotEnoughMemory(
                f"{error} Or set `quantize` to {cost.quantize} (`--quantize {cost.quantize}`; auto "
                "does so only where it is needed): then it fits, with weights of "
                f"{size_text(cost.all_weight_bytes)} instead of "
                f"{size_text(self.cost.all_weight_bytes)}."
            ) from error
        if self.may_shrink and self.smaller:
            raise self._cannot_shrink(error) from error
        raise error

    def _cannot_shrink(self, error: NotEnoughMemory) -> NotEnoughMemory:
        """Return the error for a model that does not fit though its weights may get fewer bits."""
        full, least = (cost.all_weight_bytes for cost in (self.cost, self.smaller[-1]))
        if least < full:
            how = f"That is with {self.smaller[-1].quantize}, the fewest bits that there are"
        else:
            how = "Fewer bits would not help: the files hold the weights in as few already"
        return NotEnoughMemory(f"{error} {how} (`quantize: auto`).")

    def _plans(self, machines: Machines) -> list[Plan]:
        workers = list(machines.memory_bytes)
        if not isinstance(self.replicas, int):
            fastest = self.strategy == "speed" and workers
            return self._fastest(machines) if fastest else [self._plan(machines)]
        ranked = sorted(workers, key=lambda worker: (-machines.memory_bytes[worker], worker))
        for number in range(min(self.replicas, max(1, len(workers))), 1, -1):
            try:
                return [self._plan(machines.subset(group)) for group in _dealt(ranked, number)]
            except NotEnoughMemory:
                continue
        return [self._plan(machines)]

    def machines_of(self, plans: Sequence[Plan], machines: Machines) -> Machines:
        """Return the machines as `plans` use them: with their overflows if layers are in some."""
        if not any(stage.is_away for plan in plans for stage in plan):
            return machines
        return machines.offloading(self.cost, self.least_kv_tokens) or machines

    def plan_of(self, memory: Mapping[WorkerId, int], layer_map: LayerMap) -> Plan:
        """Return the plan of a layer map; see `plan.plan_of`."""
        return plan_of(self.cost, memory, layer_map)

    def kv_tokens(self, memory: Mapping[WorkerId, int]) -> int:
        """Return the positions of KV cache that a plan by strategy "speed" has room for."""
        return wanted_kv_tokens(
            self.cost, memory, least=self.least_kv_tokens, context_length=self.context_length
        )

    def _by_speed(self, machines: Machines, kv_tokens: int) -> Plan:
        demand = Demand.expected(len(machines.memory_bytes))
        return plan_by_speed(
            self.cost, machines, demand, objective=self.objective, kv_tokens=kv_tokens
        )

    def _fastest(self, machines: Machines) -> list[Plan]:
        """Return the plans with the best score: for latency the best plan's, else the sum."""
        ranked = ranked_by_speed(machines)
        best, most = [self._plan(machines)], 0.0
        for number in range(1, 1 + min(_MOST_PIPELINES, len(ranked))):
            try:
                plans = [self._plan(machines.subset(group)) for group in _dealt(ranked, number)]
            except NotEnoughMemory:
                break
            scores = [self.score(layer_map_of(plan), machines) for plan in plans]
            total = max(scores) if self.objective == "latency" else sum(scores)
            if total > _BETTER * most:
                best, most = plans, total
        return best

    def score(self, layer_map: LayerMap, machines: Machines) -> float:
        """Return the rate of a layer map before there is demand, by the objective, tokens/s."""
        demand = Demand.expected(len(layer_map))
        return forecast(self.cost, machines, layer_map, demand).score(self.objective)


def ranked_by_speed(machines: Machines) -> list[WorkerId]:
    """Return the workers by time per layer, quickest first."""
    work = Demand.expected(1).mean_step(1.0)
    layer_s = {each.worker: each.times.layer_s for each in machines.candidates(work)}
    return sorted(layer_s, key=lambda worker: (layer_s[worker], worker))


def _dealt(ranked: Sequence[WorkerId], number: int) -> list[list[WorkerId]]:
    """Return groups of about equal strength: workers are dealt best first, to and fro."""
    groups: list[list[WorkerId]] = [[] for _ in range(number)]
    for at, worker in enumerate(ranked):
        turn, place = divmod(at, number)
        groups[place if turn % 2 == 0 else number - 1 - place].append(worker)
    return groups
