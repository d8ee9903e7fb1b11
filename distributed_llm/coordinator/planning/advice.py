"""Advice: whether a machine helps, and if not, why not. Pure.

What a machine of the best layer map is worth follows from the best layer map without it; for a
machine that is left out, from the best one that is forced to use it. If that one would win with the
machine's links as good as the best link used, or with the machine as quick as the quickest, this is
the reason why it is left out.

Where all these layer maps would take long to find, they keep the order of the best one and only
shift layers; that may be a little worse than what there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import pairwise

import numpy as np

from distributed_llm.common.settings import Objective
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.common.wording import (
    count_text,
    duration_text,
    list_text,
    rates_text,
    size_text,
)
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.exact import PathTimes, additions_of, solve, walk_forward
from distributed_llm.coordinator.partition.tables import (
    Cuts,
    Hop,
    Links,
    WorkerTimes,
    make_tables,
)
from distributed_llm.coordinator.plan import LayerMap
from distributed_llm.coordinator.planning.forecast import Target, best_forecast, score, targets
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines

_EXACT_ADDITIONS = 4_000_000
"""Additions up to which the layer map without a machine may have any order of machines."""

_MAX_ADVISED = 32
"""Most machines that are advised about."""

_MAX_WALKED = 35_000
"""Most machines * layers * stages that advice may take; bounds its time for large models."""

_IDLE = 4
"""Idle machines that are tried in the place of one that serves."""

_PLACES = 3
"""Places in the order of the stages at which a machine that is left out is tried."""

_SAME = 0.001
"""Share up to which a gain counts as none."""


@dataclass(frozen=True)
class Advice:
    """What one machine is worth.

    Attributes:
        gain: relative increase of the rate by this machine; at most 0 for one that is left out,
            None if the model does not fit without it.
        with_tokens_per_s: rate of the best layer map that uses it; if none can, of the best one.
        without_tokens_per_s: rate of the best layer map without it, None if there is none.
        text: the same in words, and why.
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
    objective: Objective,
    kv_tokens: int,
    least_kv_tokens: int | None = None,
    beside_tokens_per_s: float = 0.0,
) -> dict[WorkerId, Advice] | None:
    """Return what each machine is worth, None if all of them together cannot hold the model.

    Rates are scores (`forecast.score`) of all pipelines together. Of very many machines, only those
    that serve and the quickest others are advised about.

    Args:
        cost: of the model.
        machines: that may serve.
        demand: what is asked for.
        objective: as for `best_forecast`.
        kv_tokens: positions of KV cache that every stage must have room for.
        least_kv_tokens: room that is enough if a machine were missing; None is `kv_tokens`.
        beside_tokens_per_s: score of the other pipelines.
    """
    machines = replace(machines, links=cache(machines.links))
    best = best_forecast(cost, machines, demand, objective=objective, kv_tokens=kv_tokens)
    if best is None:
        return None
    least = kv_tokens if least_kv_tokens is None else least_kv_tokens
    base = _Baseline(
        cost, machines, demand, objective, kv_tokens, best.partition.layer_map, beside_tokens_per_s
    )
    shortlist = base.shortlist()
    return {
        worker: _advise_used(base, worker, held, least) if held else _advise_unused(base, worker)
        for worker, held in shortlist.items()
    }


_Scored = tuple[float, LayerMap]
"""A layer map after its score, tokens per second: the larger, the better."""

_NOTHING: _Scored = (0.0, ())
"""Stands for a layer map where none fits."""


@dataclass(frozen=True)
class _Baseline:
    """The best layer map, with which others are compared.

    Attributes:
        kv_tokens: positions of KV cache that every stage has room for.
        layer_map: the best one for `machines`, `demand` and `objective`.
        beside: score of the other pipelines, tokens per second.
    """

    cost: ModelCost
    machines: Machines
    demand: Demand
    objective: Objective
    kv_tokens: int
    layer_map: LayerMap
    beside: float

    @property
    def stages(self) -> list[WorkerId]:
        """The machines that serve, in order."""
        return [worker for worker, _ in self.layer_map]

    @cached_property
    def rate(self) -> float:
        """Score of the layer map, with other pipelines."""
        return self.scored(self.layer_map)[0]

    @cached_property
    def targets(self) -> list[Target]:
        """What partitions are made for."""
        return targets(self.demand, self.objective, len(self.machines.memory_bytes))

    @cached_property
    def times(self) -> dict[WorkerId, WorkerTimes]:
        """Times of a step on each machine."""
        return {each.worker: each.times for each in self.machines.candidates(self.targets[0].work)}

    @cached_property
    def links(self) -> Links:
        """Hops of a step."""
        return self.machines.links_for(self.targets[0].work)

    @property
    def quickest(self) -> WorkerId:
        """The machine that serves with the least time per layer."""
        return min(self.stages, key=lambda worker: (self.times[worker].layer_s, worker))

    def shortlist(self) -> dict[WorkerId, LayerRange | None]:
        """Return the machines to advise about, and the layers of each (None: left out)."""
        idle = set(self.machines.memory_bytes) - set(self.stages)
        quickest = sorted(idle, key=lambda worker: (self.times[worker].layer_s, worker))
        most = min(
            _MAX_ADVISED, _MAX_WALKED // (self.cost.num_layers * (len(self.layer_map) + _IDLE))
        )
        return dict([*self.layer_map, *((worker, None) for worker in quickest)][: max(1, most)])

    def scored(self, layer_map: LayerMap) -> _Scored:
        """Return a layer map with its score, including other pipelines."""
        rate = score(self.cost, self.machines, layer_map, self.demand, objective=self.objective)
        return rate + self.beside, layer_map

    def best_without(self, worker: WorkerId, kv_tokens: int) -> _Scored:
        """Return the best layer map without a machine that serves."""
        others = [other for other in self.machines.memory_bytes if other != worker]
        additions = additions_of(len(others), self.cost.num_layers) * len(self.layer_map)
        if additions > _EXACT_ADDITIONS:
            at = self.stages.index(worker)
            idle = [other for other, held in self.shortlist().items() if held is None][:_IDLE]
            order = [*self.stages[:at], *idle, *self.stages[at + 1 :]]
            best_in_order = self.best_in_order(order, kv_tokens=kv_tokens)
            if best_in_order != _NOTHING:
                return best_in_order
        some = self.machines.subset(others)
        best = best_forecast(
            self.cost, some, self.demand, objective=self.objective, kv_tokens=kv_tokens
        )
        return self.scored(best.partition.layer_map) if best else _NOTHING

    def best_with(self, worker: WorkerId) -> tuple[_Scored, int]:
        """Return the best layer map with a machine that is left out, and its place in the order."""
        return max(
            (self.best_in_order(self.order_with(worker, at), through=at), at)
            for at in self._places(worker)
        )

    def order_with(self, worker: WorkerId, at: int) -> list[WorkerId]:
        """Return the machines that serve with another one at this place."""
        return [*self.stages[:at], worker, *self.stages[at:]]

    def best_in_order(
        self,
        order: Sequence[WorkerId],
        *,
        through: int | None = None,
        kv_tokens: int | None = None,
    ) -> _Scored:
        """Return the best layer map of some machines in this order.

        Args:
            order: of the machines.
            through: index of the machine that must have layers; None if none must.
            kv_tokens: positions of KV cache that every stage must have room for; None for those of
                the best layer map.
        """
        solver = walk_forward if through is None else partial(_walk_through, through)
        some, scored = self.machines.subset(order), [_NOTHING]
        for target in self.targets:
            links = self.machines.links_for(target.work)
            room = self.kv_tokens if kv_tokens is None else kv_tokens
            tables = make_tables(self.cost, some.candidates(target.work), links, room)
            cuts = solve(tables, range(len(order)), target.objective, solver)
            if cuts:
                scored.append(self.scored(tables.layer_map(cuts)))
        return max(scored)

    def _places(self, worker: WorkerId) -> list[int]:
        """Return the places in the order at which a machine adds the least time on links."""

        def added_s(at: int) -> float:
            before, after = self.stages[:at][-1:], self.stages[at:][:1]
            direct = [(a, b) for a in before for b in after]
            around = [*((a, worker) for a in before), *((worker, b) for b in after)]
            return sum(map(self.hop_s, around)) - sum(map(self.hop_s, direct))

        return sorted(range(len(self.layer_map) + 1), key=added_s)[:_PLACES]

    def hop_s(self, pair: tuple[WorkerId, WorkerId]) -> float:
        """Return the seconds of a hop between two machines."""
        hop = self.links.hop(*pair)
        return hop.latency_s + hop.busy_s


def _walk_through(at: int, times: PathTimes) -> tuple[float, Cuts]:
    """Return the best path that keeps the order of the workers and uses the one at index `at`."""
    stages, hops = times.stages.copy(), times.hops.copy()
    stages[:at, :, -1] = stages[at + 1 :, 0] = hops[:at, at + 1 :] = np.inf
    return walk_forward(replace(times, stages=stages, hops=hops))


# ------------------------------------------------------------------ machines that serve


def _advise_used(base: _Baseline, worker: WorkerId, held: LayerRange, least: int) -> Advice:
    rate, others = base.best_without(worker, base.kv_tokens)
    room = ""
    if not others and least < base.kv_tokens:
        rate, others = base.best_without(worker, least)
        room = ", and less room for KV cache"
    serves = f"serves {_share_text(len(held), base.cost.num_layers)}"
    if not others and base.beside:
        text = f"{serves}; {rates_text(base.rate, base.beside)} (others go on without it)"
        return Advice(base.rate / base.beside - 1, base.rate, base.beside, text)
    if not others:
        return Advice(None, base.rate, None, _what_is_missing(base, worker, least))
    text = f"{serves}; {rates_text(base.rate, rate)}{room}"
    return Advice(base.rate / rate - 1, base.rate, rate, text)


def _share_text(held: int, total: int) -> str:
    if held == total:
        return f"all {count_text(total, 'layer')}" if total > 1 else "the only layer"
    return f"{held} of {count_text(total, 'layer')}"


def _what_is_missing(base: _Baseline, worker: WorkerId, kv_tokens: int) -> str:
    needed = base.cost.stage_bytes(LayerRange(0, base.cost.num_layers), kv_tokens)
    sizes = base.machines.memory_bytes
    if len(sizes) == 1:
        return "needed: it serves the model alone"
    missing = needed - sum(size for other, size in sizes.items() if other != worker)
    if missing > 0:
        why = f"{size_text(missing)} are missing"
    else:
        why = "the other machines' memory is in pieces into which whole layers do not fit"
    return f"needed: without it the model does not fit ({why})"


# ------------------------------------------------------------------ machines that are left out


def _advise_unused(base: _Baseline, worker: WorkerId) -> Advice:
    (rate, layer_map), at = base.best_with(worker)
    if not layer_map:
        return Advice(0.0, base.rate, base.rate, f"left out: {_why_not_any(base, worker)}")
    rate = min(base.rate, rate)
    why = _why_slower(base, worker, at, len(dict(layer_map)[worker]))
    text = f"left out: {rates_text(rate, base.rate)}: {why}"
    return Advice(rate / base.rate - 1, rate, base.rate, text)


def _why_not_any(base: _Baseline, worker: WorkerId) -> str:
    offered = base.machines.memory_bytes[worker]
    piece = min(base.cost.pieces, key=lambda one: base.cost.stage_bytes(one, base.kv_tokens))
    needed = base.cost.stage_bytes(piece, base.kv_tokens)
    if needed > offered:
        sizes = f"{size_text(needed)} needed, {size_text(offered)} offered"
        if base.cost.workspace_bytes:
            sizes += f", beside {size_text(base.cost.workspace_bytes)} that it computes with"
        if len(piece) > 1:
            return f"too little memory ({sizes}): {base.cost.together_text}"
        return f"too little memory for one layer ({sizes})"
    why = f": {base.cost.together_text}" if base.cost.together_text else ""
    return f"its {size_text(offered)} do not hold the layers that it would get{why}"


def _why_slower(base: _Baseline, worker: WorkerId, at: int, layers: int) -> str:
    """Return why a layer map with a machine is no faster than the best one.

    Args:
        base: the best layer map.
        worker: the machine, which is left out.
        at: its best place in the order.
        layers: number of layers that it would get.
    """
    if len(base.stages) == len(base.cost.pieces) and base.cost.together_text:
        return f"no layers are left for it: {base.cost.together_text}"
    order = base.order_with(worker, at)

    def wins(machines: Machines) -> bool:
        rate, _ = replace(base, machines=machines).best_in_order(order, through=at)
        return rate > base.rate * (1 + _SAME)

    linked = partial(_linked, worker=worker, used=list(pairwise(base.stages)))
    quick = _quick(base.machines, worker, base.quickest)
    slowest_s = max(base.hop_s(pair) for pair in pairwise(order) if worker in pair)
    link = f"its link of {duration_text(slowest_s)}"
    times = _stage_s(base.times[worker], layers) / _stage_s(base.times[base.quickest], layers)
    slower = f"{times:.1f} times as long as {base.quickest}"
    if wins(linked(base.machines)):
        return f"{link} costs more than its layers save"
    if wins(quick):
        return f"it takes {slower} for its layers"
    if wins(linked(quick)):
        return f"{link} costs time, and it takes {slower} for its layers"
    if len(base.stages) > 3:
        return f"the model runs fastest on {len(base.stages)} others"
    return f"the model runs fastest on {list_text(sorted(base.stages))} alone"


def _stage_s(times: WorkerTimes, layers: int) -> float:
    task_s, layer_s = times.task_s + times.answer_s, times.layer_s + times.source_s
    return max(1e-9, task_s + layers * layer_s)


def _linked(
    machines: Machines, worker: WorkerId, used: Sequence[tuple[WorkerId, WorkerId]]
) -> Machines:
    """Return the machines as if the links of one were as good as the best link that is used.

    Where no link is used, they take no time.
    """

    def links(tokens: float) -> Links:
        real = machines.links(tokens)
        best = min(
            (real.hop(*pair) for pair in used),
            key=lambda hop: hop.latency_s + hop.busy_s,
            default=Hop(0.0, 0.0),
        )
        others = machines.memory_bytes
        better = {pair: best for other in others for pair in ((worker, other), (other, worker))}
        return Links(real.default, {**real.known, **better})

    return replace(machines, links=cache(links))


def _quick(machines: Machines, worker: WorkerId, quickest: WorkerId) -> Machines:
    """Return the machines as if `worker` were as quick as `quickest`."""
    return replace(machines, speeds={**machines.speeds, worker: machines.speeds[quickest]})
