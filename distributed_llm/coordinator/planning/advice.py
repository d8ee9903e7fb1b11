"""Whether a machine helps, and if not, why not. Pure.

A machine of the best plan is compared with the best plan without it. One that is left out is
compared with the best plan that it is forced into: if that would win were its links as good as the
best of the plan, or the machine as quick as the quickest, this is the reason.

Where it would take long to look for these plans, they keep the order of the best plan, and layers
are shifted: that may find a little less than there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import pairwise

import numpy as np

from distributed_llm.common.settings import Goal
from distributed_llm.common.types import LayerRange, WorkerId, size_text
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.exact import Costs, additions_of, solve, walk_forward
from distributed_llm.coordinator.partition.tables import (
    Cuts,
    Hop,
    Links,
    Objective,
    WorkerTimes,
    make_tables,
)
from distributed_llm.coordinator.plan import LayerMap
from distributed_llm.coordinator.planning.forecast import aims, best_plan, rate
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.work import Work

_EXACT_WORK = 4_000_000
"""Additions that all plans without one machine may take together, to be looked for in any order."""

_MOST = 32
"""Machines to advise about, ..."""

_WALKS = 35_000
"""... and these times layers times stages, through which some walks go for each."""

_IDLE = 4
"""Machines without layers that may take the place of one that is thought away, ..."""

_PLACES = 3
"""... and places in the order at which one that is left out is tried."""

_SAME = 0.001
"""Gains up to this are none."""


@dataclass(frozen=True)
class Advice:
    """What one machine is worth.

    Attributes:
        gain: by how much more is answered with it than without, as a share of the latter; not
            above 0 for one that is left out, None if nothing can be served without it.
        with_tokens_per_s: of the best plan that gives it layers; if none can, of the best plan.
        without_tokens_per_s: of the best plan without it, None if there is none.
        text: what that means and why, for people.
    """

    gain: float | None
    with_tokens_per_s: float
    without_tokens_per_s: float | None
    text: str


def advise(
    cost: ModelCost,
    machines: Machines,
    demand: Demand,
    *,
    goal: Goal,
    kv_tokens: int,
    least_kv_tokens: int | None = None,
    beside_tokens_per_s: float = 0.0,
) -> dict[WorkerId, Advice] | None:
    """Return what each machine is worth, None if all of them together cannot hold the model.

    Tokens per second are what `rate` says, of all pipelines together. Of very many machines, only
    those of the plan and then the quickest are in the answer, as far as time allows.

    Args:
        cost: of the model.
        machines: that may serve.
        demand: what is asked for.
        goal: as for `best_plan`.
        kv_tokens: positions of KV cache that every stage must have room for.
        least_kv_tokens: how many would do without one of the machines; None is `kv_tokens`.
        beside_tokens_per_s: what other pipelines give, which serve the model too; see `rate`.
    """
    machines = replace(machines, links=cache(machines.links))
    best = best_plan(cost, machines, demand, goal=goal, kv_tokens=kv_tokens)
    if best is None:
        return None
    least = kv_tokens if least_kv_tokens is None else least_kv_tokens
    case = _Case(
        cost, machines, demand, goal, kv_tokens, best.partition.layer_map, beside_tokens_per_s
    )
    shortlist = case.shortlist()
    return {
        worker: _of_used(case, worker, held, least) if held else _of_unused(case, worker)
        for worker, held in shortlist.items()
    }


_Rated = tuple[float, LayerMap]  # tokens per second; the more, the larger
_NOTHING: _Rated = (0.0, ())


@dataclass(frozen=True)
class _Case:
    """What is planned for, the best plan, and the tokens per second of other pipelines."""

    cost: ModelCost
    machines: Machines
    demand: Demand
    goal: Goal
    kv_tokens: int
    layer_map: LayerMap
    beside: float

    @property
    def stages(self) -> list[WorkerId]:
        """The machines of the plan, in its order."""
        return [worker for worker, _ in self.layer_map]

    @cached_property
    def rate(self) -> float:
        """Tokens per second with the plan."""
        return self.rated(self.layer_map)[0]

    @cached_property
    def aims(self) -> list[tuple[Objective, Work]]:
        return aims(self.demand, self.goal, len(self.machines.memory_bytes))

    @cached_property
    def speeds(self) -> dict[WorkerId, WorkerTimes]:
        return {each.worker: each.times for each in self.machines.candidates(self.aims[0][1])}

    @cached_property
    def links(self) -> Links:
        return self.machines.links(self.aims[0][1].all_tokens)

    @property
    def quickest(self) -> WorkerId:
        """The machine of the plan that takes least for a layer."""
        return min(self.stages, key=lambda worker: (self.speeds[worker].layer_s, worker))

    def shortlist(self) -> dict[WorkerId, LayerRange | None]:
        """Return whom to advise about, and the layers of each."""
        idle = set(self.machines.memory_bytes) - set(self.stages)
        quickest = sorted(idle, key=lambda worker: (self.speeds[worker].layer_s, worker))
        most = min(_MOST, _WALKS // (self.cost.num_layers * (len(self.layer_map) + _IDLE)))
        return dict([*self.layer_map, *((worker, None) for worker in quickest)][: max(1, most)])

    def rated(self, layer_map: LayerMap) -> _Rated:
        """Return ranges with the tokens per second of all pipelines."""
        found = rate(self.cost, self.machines, layer_map, self.demand, goal=self.goal)
        return found + self.beside, layer_map

    def best_without(self, worker: WorkerId, kv_tokens: int) -> _Rated:
        """Return the best ranges without a machine of the plan."""
        others = [other for other in self.machines.memory_bytes if other != worker]
        work = additions_of(len(others), self.cost.num_layers) * len(self.layer_map)
        if work > _EXACT_WORK:
            at = self.stages.index(worker)
            idle = [other for other, held in self.shortlist().items() if held is None][:_IDLE]
            order = [*self.stages[:at], *idle, *self.stages[at + 1 :]]
            found = self.best_in_order(order, kv_tokens=kv_tokens)
            if found != _NOTHING:
                return found
        some = self.machines.only(others)
        best = best_plan(self.cost, some, self.demand, goal=self.goal, kv_tokens=kv_tokens)
        return self.rated(best.partition.layer_map) if best else _NOTHING

    def best_with(self, worker: WorkerId) -> tuple[_Rated, int]:
        """Return the best ranges with a machine that is not in the plan, and its place in it."""
        return max(
            (self.best_in_order(self.order_with(worker, at), through=at), at)
            for at in self._places(worker)
        )

    def order_with(self, worker: WorkerId, at: int) -> list[WorkerId]:
        """Return the machines of the plan with another one at this place."""
        return [*self.stages[:at], worker, *self.stages[at:]]

    def best_in_order(
        self,
        order: Sequence[WorkerId],
        *,
        through: int | None = None,
        kv_tokens: int | None = None,
    ) -> _Rated:
        """Return the best ranges of some machines in this order.

        Args:
            order: of the machines.
            through: which of them must have layers; None if none must.
            kv_tokens: positions of KV cache that every stage must have room for; None: as planned.
        """
        solver = walk_forward if through is None else partial(_walk_through, through)
        some, found = self.machines.only(order), [_NOTHING]
        for objective, load in self.aims:
            links = self.machines.links(load.all_tokens)
            room = self.kv_tokens if kv_tokens is None else kv_tokens
            tables = make_tables(self.cost, some.candidates(load), links, room)
            cuts = solve(tables, range(len(order)), objective, solver)
            if cuts:
                found.append(self.rated(tables.layer_map(cuts)))
        return max(found)

    def _places(self, worker: WorkerId) -> list[int]:
        """Return before which stages a machine costs the least time on links; last is the end."""

        def added_s(at: int) -> float:
            before, after = self.stages[:at][-1:], self.stages[at:][:1]
            direct = [(a, b) for a in before for b in after]
            around = [*((a, worker) for a in before), *((worker, b) for b in after)]
            return sum(map(self.hop_s, around)) - sum(map(self.hop_s, direct))

        return sorted(range(len(self.layer_map) + 1), key=added_s)[:_PLACES]

    def hop_s(self, pair: tuple[WorkerId, WorkerId]) -> float:
        """Return how long a step is on its way between two machines."""
        hop = self.links.hop(*pair)
        return hop.latency_s + hop.busy_s


def _walk_through(at: int, costs: Costs) -> tuple[float, Cuts]:
    """Return the best way that keeps the order of the machines and gives layers to the one `at`."""
    stages, hops = costs.stages.copy(), costs.hops.copy()
    stages[:at, :, -1] = stages[at + 1 :, 0] = hops[:at, at + 1 :] = np.inf
    return walk_forward(replace(costs, stages=stages, hops=hops))


# ------------------------------------------------------------------ of the plan


def _of_used(case: _Case, worker: WorkerId, held: LayerRange, least: int) -> Advice:
    found, others = case.best_without(worker, case.kv_tokens)
    room = ""
    if not others and least < case.kv_tokens:
        found, others = case.best_without(worker, least)
        room = ", and less room for KV cache"
    serves = f"serves {len(held)} of {case.cost.num_layers} layers"
    if not others and case.beside:
        text = f"{serves}; {_with_and_without(case.rate, case.beside)}: its pipeline needs it"
        return Advice(case.rate / case.beside - 1, case.rate, case.beside, text)
    if not others:
        return Advice(None, case.rate, None, _what_is_missing(case, worker, least))
    text = f"{serves}; {_with_and_without(case.rate, found)}{room}"
    return Advice(case.rate / found - 1, case.rate, found, text)


def _what_is_missing(case: _Case, worker: WorkerId, kv_tokens: int) -> str:
    needed = case.cost.stage_bytes(LayerRange(0, case.cost.num_layers), kv_tokens)
    sizes = case.machines.memory_bytes
    missing = needed - sum(size for other, size in sizes.items() if other != worker)
    if missing > 0:
        why = f"{size_text(missing)} are missing"
    else:
        why = "the other machines' memory is in pieces into which whole layers do not fit"
    return f"needed: without it the model does not fit ({why})"


# ------------------------------------------------------------------ left out


def _of_unused(case: _Case, worker: WorkerId) -> Advice:
    (found, layer_map), at = case.best_with(worker)
    if not layer_map:
        return Advice(0.0, case.rate, case.rate, f"left out: {_why_not_any(case, worker)}")
    found = min(case.rate, found)
    why = _why_slower(case, worker, at, len(dict(layer_map)[worker]))
    text = f"left out: {_with_and_without(found, case.rate)}: {why}"
    return Advice(found / case.rate - 1, found, case.rate, text)


def _why_not_any(case: _Case, worker: WorkerId) -> str:
    offered, layers = case.machines.memory_bytes[worker], range(case.cost.num_layers)
    needed = min(case.cost.stage_bytes(LayerRange(i, i + 1), case.kv_tokens) for i in layers)
    if needed > offered:
        sizes = f"{size_text(needed)} needed, {size_text(offered)} offered"
        return f"too little memory for one layer ({sizes})"
    return f"its {size_text(offered)} do not hold the layers that it would get"


def _why_slower(case: _Case, worker: WorkerId, at: int, layers: int) -> str:
    """Return what keeps a machine out of the plan.

    Args:
        case: with the best plan.
        worker: that is not in it.
        at: its best place there.
        layers: that it would get.
    """
    order = case.order_with(worker, at)

    def wins(machines: Machines) -> bool:
        found, _ = replace(case, machines=machines).best_in_order(order, through=at)
        return found > case.rate * (1 + _SAME)

    linked = partial(_linked, worker=worker, used=list(pairwise(case.stages)))
    quick = _quick(case.machines, worker, case.quickest)
    slowest_s = max(case.hop_s(pair) for pair in pairwise(order) if worker in pair)
    link = f"its {slowest_s * 1000:.3g} ms link"
    times = _stage_s(case.speeds[worker], layers) / _stage_s(case.speeds[case.quickest], layers)
    slower = f"{times:.1f} times as long as {case.quickest}"
    if wins(linked(case.machines)):
        return f"{link} costs more than its layers save"
    if wins(quick):
        return f"it takes {slower} for its layers"
    if wins(linked(quick)):
        return f"{link} costs time, and it takes {slower} for its layers"
    if len(case.stages) > 3:
        return f"the model runs fastest on {len(case.stages)} others"
    *names, last = sorted(case.stages)
    return f"the model runs fastest on {', '.join(names)}{' and ' * bool(names)}{last} alone"


def _stage_s(speed: WorkerTimes, layers: int) -> float:
    return max(1e-9, speed.task_s + layers * speed.layer_s)


def _linked(
    machines: Machines, worker: WorkerId, used: Sequence[tuple[WorkerId, WorkerId]]
) -> Machines:
    """Return the machines as if the links of one were as good as the best of those that are used.

    If none are, as if they took no time.
    """

    def links(tokens: float) -> Links:
        found = machines.links(tokens)
        best = min(
            (found.hop(*pair) for pair in used),
            key=lambda hop: hop.latency_s + hop.busy_s,
            default=Hop(0.0, 0.0),
        )
        others = machines.memory_bytes
        better = {pair: best for other in others for pair in ((worker, other), (other, worker))}
        return Links(found.default, {**found.known, **better})

    return replace(machines, links=cache(links))


def _quick(machines: Machines, worker: WorkerId, quickest: WorkerId) -> Machines:
    """Return the machines as if one of them were as quick as another."""
    return replace(machines, costs={**machines.costs, worker: machines.costs[quickest]})


def _with_and_without(found: float, without: float) -> str:
    texts = [rate_text(each) for each in (found, without)]
    if texts[0] == texts[1]:
        return f"{texts[0]} tokens/s with it and without"
    return f"{texts[0]} tokens/s with it, {texts[1]} without"


def rate_text(tokens_per_s: float) -> str:
    """Return tokens per second as people write them."""
    if tokens_per_s < 0.1:
        return f"{tokens_per_s:.2g}"
    return f"{tokens_per_s:.1f}" if tokens_per_s < 100 else f"{tokens_per_s:.0f}"
