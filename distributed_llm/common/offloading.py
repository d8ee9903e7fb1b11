"""Layers that do not fit into a worker's memory and are read from its disk in every step. Pure."""

from distributed_llm.common.types import LayerRange

LAYERS_AT_ONCE = 2
"""Layers from the disk that are in memory at a time: one computes, the next one is read."""


def layers_on_disk(layers: LayerRange, count: int) -> tuple[int, ...]:
    """Return the numbers of the layers of a stage that stay on the disk, in their order.

    They lie at equal distances, so that the next one is read while those in between compute.

    Args:
        layers: of the stage.
        count: how many stay on the disk; no more than there are.
    """
    size = len(layers)
    if not 0 <= count <= size:
        raise ValueError(f"{count} of {size} layers cannot stay on the disk")
    return tuple(layers.start + (2 * i + 1) * size // (2 * count) for i in range(count))
