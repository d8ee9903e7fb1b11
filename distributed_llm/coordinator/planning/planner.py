"""Which plans to make for some workers, by the strategy that was chosen. Pure."""

from collections.abc import Sequence

from distributed_llm.common.errors import NotEnoughMemory, NotReady
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.cluster.registry import Worker
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.plan import LayerMap, Plan, plan_of
from distributed_llm.coordinator.planning.forecast import forecast, merit
from distributed_llm.coordinator.planning.strategies import (
    Offer,
    make_plan,
    plan_by_speed,
    wanted_kv_tokens,
)
from distributed_llm.coordinator.settings import CoreSettings, Goal
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.measurements import Measurements

_MANY = 8
"""Pipelines that are tried at most where nobody said how many there should be."""

_BETTER = 1.02
"""By so much they have to be better than fewer of them."""


class Planner:
    """The planner of one cluster.

    Args:
        model: what is served.
        settings: how.
        measurements: of the workers, for strategy "speed".
    """

    def __init__(
        self, model: ServedModel, settings: CoreSettings, measurements: Measurements
    ) -> None:
        self._model = model
        self._settings = settings
        self._measurements = measurements
        self._least = min(settings.min_kv_tokens, model.defaults.context_length)

    @property
    def least_kv_tokens(self) -> int:
        """Positions of KV cache without which nothing is served."""
        return self._least

    @property
    def goal(self) -> Goal:
        """What is planned for while nothing was asked: several requests, unless one counts."""
        return "throughput" if self._settings.objective == "auto" else self._settings.objective

    def wants_trials(self, worker: WorkerId) -> bool:
        """Return whether a worker should try steps of several sizes on its first layers."""
        return self._settings.strategy == "speed" and self._measurements.untried(worker)

    def plans(self, workers: Sequence[Worker]) -> list[Plan]:
        """Return as many plans as are wanted, or as the workers can hold, or as is fastest.

        Raises:
            NotReady: there are no workers.
            NotEnoughMemory: they cannot hold the model.
            ConfigError: the layer map does not fit them.
        """
        wanted = self._settings.replicas
        if wanted == "auto":
            by_speed = self._settings.strategy == "speed"
            return self._fastest(workers) if by_speed else [self.plan(workers)]
        ranked = sorted(workers, key=lambda w: (-w.capabilities.memory_bytes, w.id))
        for number in range(min(wanted, max(1, len(workers))), 1, -1):
            try:
                return [self.plan(group) for group in _dealt(ranked, number)]
            except NotEnoughMemory:
                continue
        return [self.plan(workers)]

    def plan(self, workers: Sequence[Worker], *, used_tokens: int = 0) -> Plan:
        """Return the plan for all of these workers, of which it may leave some out.

        Args:
            used_tokens: positions of KV cache that it should have room for, if it can.

        Raises:
            NotReady, NotEnoughMemory, ConfigError: as `plans`.
        """
        if not workers:
            raise NotReady("No worker is there. Start one with `dllm worker`.")
        settings = self._settings
        if settings.strategy == "speed":
            try:
                return self._by_speed(workers, max(used_tokens, self.kv_tokens(workers)))
            except NotEnoughMemory:
                return self._by_speed(workers, self._least)
        return make_plan(
            self._model.cost,
            [Offer(worker.id, worker.capabilities.memory_bytes) for worker in workers],
            strategy=settings.strategy,
            kv_tokens=self._least,
            layers=settings.layers,
        )

    def plan_of(self, workers: Sequence[Worker], ranges: LayerMap) -> Plan:
        """Return the plan in which these workers serve these ranges."""
        return plan_of(self._model.cost, _memory(workers), ranges)

    def kv_tokens(self, workers: Sequence[Worker]) -> int:
        """Return the positions of KV cache that a plan by speed should have room for."""
        return wanted_kv_tokens(
            self._model.cost,
            _memory(workers),
            least=self._least,
            context_length=self._model.defaults.context_length,
        )

    def _by_speed(self, workers: Sequence[Worker], kv_tokens: int) -> Plan:
        return plan_by_speed(
            self._model.cost,
            self._measurements.machines(workers),
            Demand.expected(len(workers)),
            goal=self.goal,
            kv_tokens=kv_tokens,
        )

    def _fastest(self, workers: Sequence[Worker]) -> list[Plan]:
        """Return the plans that together answer most, or of which one answers soonest."""
        if not workers:
            return [self.plan(workers)]
        machines = self._measurements.machines(workers)
        ranked = ranked_by_speed(machines, workers)
        best, most = [self.plan(workers)], 0.0
        for number in range(1, 1 + min(_MANY, len(workers))):
            try:
                plans = [self.plan(group) for group in _dealt(ranked, number)]
            except NotEnoughMemory:
                break
            merits = [self._merit(plan, machines) for plan in plans]
            found = max(merits) if self.goal == "latency" else sum(merits)
            if found > _BETTER * most:
                best, most = plans, found
        return best

    def _merit(self, plan: Plan, machines: Machines) -> float:
        ranges = tuple((stage.worker, stage.layers) for stage in plan)
        demand = Demand.expected(len(ranges))
        return merit(self.goal, forecast(self._model.cost, machines, ranges, demand))


def ranked_by_speed(machines: Machines, workers: Sequence[Worker]) -> list[Worker]:
    """Return the workers, the one first that computes a layer soonest."""
    load = Demand.expected(1).load(1.0)
    speeds = {found.worker: found.speed.layer_s for found in machines.candidates(load)}
    return sorted(workers, key=lambda worker: (speeds[worker.id], worker.id))


def _memory(workers: Sequence[Worker]) -> dict[WorkerId, int]:
    return {worker.id: worker.capabilities.memory_bytes for worker in workers}


def _dealt(ranked: Sequence[Worker], number: int) -> list[list[Worker]]:
    """Return the workers in groups that are about alike: best first, to and fro."""
    groups: list[list[Worker]] = [[] for _ in range(number)]
    for at, worker in enumerate(ranked):
        turn, place = divmod(at, number)
        groups[place if turn % 2 == 0 else number - 1 - place].append(worker)
    return groups
