"""How fast splits of the layers over workers of known speeds are that stay as they are."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from statistics import mean

import numpy as np

from benchmarks.common import until
from benchmarks.paced_cluster import PacedCluster
from benchmarks.steady_load import Example, SteadyLoad
from distributed_llm.common.messages import ClusterStatus

NUM_LAYERS = 12
_SETTLE_S = 2.0
POLL_S = 0.1

Split = tuple[tuple[str, int], ...]
"""Workers and how many layers each has, in their order."""


@dataclass(frozen=True)
class StageCosts:
    """Seconds on a worker of slowdown 1, averaged over all steps."""

    layer_s: float
    head_s: float
    task_s: float

    def slowest_s(self, split: Split, slowdowns: Mapping[str, float]) -> float:
        """Return what the slowest stage takes."""
        times = (slowdowns[name] * (self.task_s + self.layer_s * held) for name, held in split)
        last, _ = split[-1]
        return max(*times, self._last_s(split, slowdowns[last]))

    def _last_s(self, split: Split, slowdown: float) -> float:
        return slowdown * (self.task_s + self.layer_s * split[-1][1] + self.head_s)

    @classmethod
    def fitted(cls, found: Sequence[tuple[int, bool, float]]) -> "StageCosts":
        """Return what explains stages best.

        Args:
            found: layers of a stage, whether it is the last, and seconds per task at slowdown 1.
        """
        columns = np.array([(layers, last, 1.0) for layers, last, _ in found])
        times = np.array([seconds for *_, seconds in found])
        weights = 1 / times
        layer_s, head_s, task_s = np.linalg.lstsq(
            columns * weights[:, None], times * weights, rcond=None
        )[0]
        return cls(float(layer_s), max(0.0, float(head_s)), max(0.0, float(task_s)))


@dataclass(frozen=True)
class Steady:
    """A split under load: its tokens/s, and per stage the seconds per task at slowdown 1."""

    rate: float
    stages: list[tuple[int, bool, float]]


class Splits:
    """Measures splits that stay as they are, each once; one cluster for all."""

    def __init__(
        self, cluster: PacedCluster, examples: list[Example], clients: int, window_s: float
    ) -> None:
        self._cluster = cluster
        self._examples = examples
        self._clients = clients
        self._window_s = window_s
        self._slowdowns: Mapping[str, float] = {}
        self.costs: StageCosts | None = None

    async def best(
        self, slowdowns: Mapping[str, float], chosen: Iterable[Split], most: int
    ) -> dict[Split, float]:
        """Return the rates of the splits that were tried.

        Args:
            slowdowns: of the workers.
            chosen: are tried in any case.
            most: splits over three workers that are tried beside it.
        """
        self._slowdowns = slowdowns
        for name, slowdown in slowdowns.items():
            self._cluster.set_slowdown(name, slowdown)
        if self.costs is None:
            await self._calibrate()
        assert self.costs is not None
        expected = {split: self.costs.slowest_s(split, slowdowns) for split in splits(slowdowns)}
        ranked = sorted(expected, key=expected.__getitem__)
        wanted = {3: most, 2: most // 2, 1: 1}
        near = [s for n, some in wanted.items() for s in [r for r in ranked if len(r) == n][:some]]
        tried = dict.fromkeys([*chosen, *near])
        rates = {split: (await self.measure(split)).rate for split in tried}
        first, second = sorted(rates, key=rates.__getitem__)[:-3:-1]
        for split in {*chosen, first, second}:  # these decide: once more
            rates[split] = mean([rates[split], (await self.measure(split)).rate])
        return rates

    async def _calibrate(self) -> None:
        names = list(self._slowdowns)
        sizes = ((4, 4, 4), (2, 3, 7))
        found = [await self.measure(tuple(zip(names, size, strict=True))) for size in sizes]
        self.costs = StageCosts.fitted([stage for one in found for stage in one.stages])

    async def measure(self, split: Split) -> Steady:
        """Return what a split does under load."""
        ends = np.cumsum([0, *(held for _, held in split)]).tolist()
        ranges = zip(split, pairwise(ends), strict=True)
        layers = ",".join(f"{name}={start}-{stop}" for (name, _), (start, stop) in ranges)
        address = await self._custom(layers)
        async with SteadyLoad(address, self._examples, self._clients) as load:
            await until(lambda: load.everybody_answered)
            await _look_on(load, _SETTLE_S)
            before, began = await load.status(), time.perf_counter()
            await _look_on(load, self._window_s)
            after, ended = await load.status(), time.perf_counter()
            rate = load.tokens_per_s(began, ended)
        return Steady(rate, list(self._stages(split, before, after)))

    async def _custom(self, layers: str) -> str:
        await self._cluster.coordinate(strategy="custom", layers=layers)
        return self._cluster.address

    def _stages(
        self, split: Split, before: ClusterStatus, after: ClusterStatus
    ) -> Iterator[tuple[int, bool, float]]:
        earlier = {worker.name: worker for worker in before.workers}
        later = {worker.name: worker for worker in after.workers}
        for at, (name, held) in enumerate(split):
            tasks = later[name].tasks_done - earlier[name].tasks_done
            seconds = (later[name].compute_s - earlier[name].compute_s) / tasks
            yield held, at == len(split) - 1, seconds / self._slowdowns[name]


async def _look_on(load: SteadyLoad, seconds: float) -> None:
    """Ask for the status meanwhile, as often as of a cluster that moves its layers."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        await load.status()
        await asyncio.sleep(POLL_S)


def splits(workers: Mapping[str, float]) -> Iterator[Split]:
    """Yield all contiguous splits over some or all workers, in any order."""
    for number in range(1, len(workers) + 1):
        for order in permutations(workers, number):
            for sizes in _sizes(NUM_LAYERS, number):
                yield tuple(zip(order, sizes, strict=True))


def _sizes(layers: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (layers,)
        return
    for first in range(1, layers - parts + 2):
        for rest in _sizes(layers - first, parts - 1):
            yield (first, *rest)


def split_of(status: ClusterStatus) -> Split:
    """Return the split that is served."""
    held = sorted((w.layers, w.name) for w in status.workers if w.layers)
    return tuple((name, len(layers)) for layers, name in held)


def text_of(split: Split) -> str:
    """Return a split for people."""
    return ", ".join(f"{name} {held}" for name, held in split)
