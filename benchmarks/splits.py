"""How fast splits of the layers over workers of known speeds are that stay as they are."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, permutations
from statistics import mean

import numpy as np

from benchmarks.common import until
from benchmarks.pace import Pace
from benchmarks.paced_cluster import PacedCluster
from benchmarks.steady_load import Example, SteadyLoad
from distributed_llm.common.messages import ClusterStatus
from distributed_llm.coordinator.planning.pipeline_sim import StepTimes, round_trip_s

NUM_LAYERS = 12
_SETTLE_S = 2.0
POLL_S = 0.1

Split = tuple[tuple[str, int], ...]
"""Workers and how many layers each has, in their order."""


@dataclass(frozen=True)
class Asked:
    """What clients ask for, one request after the other."""

    clients: int
    prompt_tokens: int
    new_tokens: int


def calculated(split: Split, slowdowns: Mapping[str, float], asked: Asked) -> float:
    """Return the tokens per second of a split by what its workers take, and nothing beside."""
    return max(
        _calculated(split, slowdowns, asked, depth) for depth in range(1, 2 * len(split) + 1)
    )


def _calculated(split: Split, slowdowns: Mapping[str, float], asked: Asked, depth: int) -> float:
    """Return it for so many steps under way."""
    answering = asked.clients / depth
    usual, longer = (
        _times(split, slowdowns, answering, prompt_tokens)
        for prompt_tokens in (0, asked.prompt_tokens)
    )
    share = min(1.0, answering / asked.new_tokens)
    return asked.clients / round_trip_s(usual, longer, share=share, depth=depth, overhead_s=0.0)


def _times(
    split: Split, slowdowns: Mapping[str, float], answering: float, prompt_tokens: int
) -> StepTimes:
    stages = [
        slowdowns[name]
        * Pace(
            layers=held,
            last=place == len(split) - 1,
            answering=answering,
            prompt_tokens=prompt_tokens,
        ).task_s
        for place, (name, held) in enumerate(split)
    ]
    return StepTimes(stages, [0.0] * len(stages))


class Splits:
    """Measures splits that stay as they are, each once; one cluster for all."""

    def __init__(
        self, cluster: PacedCluster, examples: list[Example], asked: Asked, window_s: float
    ) -> None:
        self._cluster = cluster
        self._examples = examples
        self._asked = asked
        self._window_s = window_s

    async def best(
        self, slowdowns: Mapping[str, float], chosen: Iterable[Split], most: int
    ) -> dict[Split, float]:
        """Return the rates of the splits that were tried.

        Args:
            slowdowns: of the workers.
            chosen: are tried in any case.
            most: splits, the best of all by calculation, that are tried beside it.
        """
        for name, slowdown in slowdowns.items():
            self._cluster.set_slowdown(name, slowdown)
        expected = {split: calculated(split, slowdowns, self._asked) for split in splits(slowdowns)}
        ranked = sorted(expected, key=lambda split: -expected[split])
        tried = dict.fromkeys([*chosen, *ranked[:most]])
        rates = {split: await self.measure(split) for split in tried}
        first, second = sorted(rates, key=rates.__getitem__)[:-3:-1]
        for split in {*chosen, first, second}:  # these decide: once more
            rates[split] = mean([rates[split], await self.measure(split)])
        return rates

    async def measure(self, split: Split) -> float:
        """Return the tokens per second of a split."""
        ends = np.cumsum([0, *(held for _, held in split)]).tolist()
        ranges = zip(split, pairwise(ends), strict=True)
        layers = ",".join(f"{name}={start + 1}-{stop}" for (name, _), (start, stop) in ranges)
        address = await self._custom(layers)
        async with SteadyLoad(address, self._examples, self._asked.clients) as load:
            await until(lambda: load.everybody_answered)
            await _look_on(load, _SETTLE_S)
            began = time.perf_counter()
            await _look_on(load, self._window_s)
            return load.tokens_per_s(began, time.perf_counter())

    async def _custom(self, layers: str) -> str:
        await self._cluster.coordinate(strategy="custom", layers=layers)
        return self._cluster.address


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
