"""Which workers give weights to which others. Pure."""

from collections.abc import Iterable, Sequence

from distributed_llm.common.messages import (
    MAX_RANGES,
    MAX_SOURCES,
    MAX_STAGES,
    GiveWeights,
    WeightSource,
)
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Send


def sources_of(
    layers: LayerRange, reader: Worker, workers: Iterable[Worker]
) -> tuple[WeightSource, ...]:
    """Return the workers that give weights of some of `layers` to `reader`."""
    needed = set(range(layers.start, layers.stop))
    able = [
        worker
        for worker in workers
        if worker is not reader and worker.peer_addresses and needed & worker.stock.layers
    ]
    return tuple(
        WeightSource(
            worker=worker.id,
            addresses=worker.peer_addresses,
            layers=worker.stock.ranges[:MAX_RANGES],
            key=worker.key,
        )
        for worker in able[:MAX_SOURCES]
    )


def let_read(names: Iterable[str], workers: Sequence[Worker]) -> list[Send]:
    """Return the messages by which the workers of these names let all others read weights."""
    wanted = set(names)
    sends = []
    for worker in workers:
        if worker.id in wanted:
            others = dict.fromkeys(one.key for one in workers if one is not worker)
            readers = tuple(others)[:MAX_STAGES]
            sends.append(Send(worker.peer, GiveWeights(readers=readers)))
    return sends
