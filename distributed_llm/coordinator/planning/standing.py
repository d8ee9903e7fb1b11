"""Which layers stay where they are when a pipeline is planned again without a lost worker. Pure.

A worker that is given the very layers that it has still loaded serves them at once; any others it
loads whole. So besides the best plan, those are looked at in which the others keep what they have,
and the layers that are missing go to a worker without layers or to a neighbour. The one that is
loaded soonest is taken, if it has room for as many tokens and is not much slower.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.coordinator.plan import LayerMap, Plan, has_room, kv_tokens_of, layer_map_of
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.speeds.machines import Machines

_LOAD_BYTES_PER_S = 400e6
"""Expected load speed of a worker that has not loaded layers yet."""

_IN_TURN = 0.25
"""Share of the other loads that the longest one waits for: of a disk, drive or link in common."""

_GAIN_S = 0.5
"""Seconds by which a pipeline must serve sooner for the sake of which a plan is not the best."""

_SHARE_OF_ROOM = 0.9
"""Least room for KV cache, as a share of that of the best plan; a whole context in any case."""

_SHARE_OF_SPEED = 0.8
"""Least rate, likewise, with strategy "speed"; the rebalancer may find better while it serves."""

_MOST_GAPS, _MOST_SPARES = 2, 4
"""Bounds of what is tried: places where layers are missing, and workers without layers."""


@dataclass(frozen=True)
class Standing:
    """What the workers of a dissolved pipeline have still loaded.

    Attributes:
        layer_map: their layers, in the order of the layers; some are missing.
        quantize: what their weights became.
        load_bytes_per_s: of workers that have loaded weights before.
    """

    layer_map: LayerMap = ()
    quantize: Quantize = "none"
    load_bytes_per_s: Mapping[WorkerId, float] = field(default_factory=dict)

    def load_s(self, plan: Plan) -> float:
        """Return after how many seconds a plan is loaded: all at once, but not quite."""
        held = dict(self.layer_map) if plan[0].quantize == self.quantize else {}
        speeds = self.load_bytes_per_s
        each_s = [
            stage.weight_bytes / speeds.get(stage.worker, _LOAD_BYTES_PER_S)
            for stage in plan
            if held.get(stage.worker) != stage.layers
        ]
        longest_s = max(each_s, default=0.0)
        return longest_s + _IN_TURN * (sum(each_s) - longest_s)

    def prefer(self, best: Plan, planner: Planner, machines: Machines) -> Plan:
        """Return the plan that is loaded soonest: the best one, or one that keeps what stands.

        Args:
            best: of all plans of these machines.
            planner: that made it.
            machines: that may have layers.
        """
        if not self.layer_map or best[0].quantize != self.quantize:
            return best
        if planner.strategy not in ("memory", "speed"):
            return best  # the others say who has which layers
        same = planner.only(self.quantize)
        room = kv_tokens_of(best)
        least = min(room, max(same.context_length, int(_SHARE_OF_ROOM * room)))
        soonest, load_s = best, self.load_s(best) - _GAIN_S
        for layer_map in self._filled(same.cost.num_layers, machines):
            if not same.cost.may_be_cut(layers.start for _, layers in layer_map):
                continue
            plan = same.plan_of(machines.memory_bytes, layer_map)
            fits = all(stage.weight_bytes <= machines.memory_bytes[stage.worker] for stage in plan)
            if not fits or not has_room(plan, same.cost, least) or self.load_s(plan) >= load_s:
                continue
            if planner.strategy == "speed" and not _is_quick(plan, best, same, machines):
                continue
            soonest, load_s = plan, self.load_s(plan)
        return soonest

    def _filled(self, num_layers: int, machines: Machines) -> Iterator[LayerMap]:
        """Yield the layer maps in which missing layers are with spare workers or neighbours."""
        held = [one for one in self.layer_map if one[0] in machines.memory_bytes]
        stops = [0, *(layers.stop for _, layers in held)]
        starts = [*(layers.start for _, layers in held), num_layers]
        edges = zip(stops, starts, strict=True)
        gaps = [LayerRange(start, stop) for start, stop in edges if start < stop]
        if not held or len(gaps) > _MOST_GAPS:
            return
        own = {worker for worker, _ in held}
        spares = sorted(
            (worker for worker in machines.memory_bytes if worker not in own),
            key=lambda worker: (-machines.memory_bytes[worker], worker),
        )[:_MOST_SPARES]
        options = [[*spares, *(worker for worker, one in held if _touch(one, gap))] for gap in gaps]
        for takers in product(*options):
            yield from _merged([*held, *zip(takers, gaps, strict=True)])


def _touch(one: LayerRange, other: LayerRange) -> bool:
    return one.stop == other.start or other.stop == one.start


def _merged(pieces: list[tuple[WorkerId, LayerRange]]) -> Iterator[LayerMap]:
    """Yield the layer map of these pieces, unless a worker has two that do not touch."""
    merged: list[tuple[WorkerId, LayerRange]] = []
    for worker, layers in sorted(pieces, key=lambda piece: piece[1].start):
        if merged and merged[-1][0] == worker:
            layers = LayerRange(merged.pop()[1].start, layers.stop)
        merged.append((worker, layers))
    if len({worker for worker, _ in merged}) == len(merged):
        yield tuple(merged)


def _is_quick(plan: Plan, best: Plan, planner: Planner, machines: Machines) -> bool:
    rates = [planner.score(layer_map_of(one), machines) for one in (plan, best)]
    return rates[0] >= _SHARE_OF_SPEED * rates[1]
