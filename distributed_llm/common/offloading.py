"""Layers without room in the memory of a worker's device, which are brought there in every step.

A CPU reads them from its disk. A GPU has them copied from the machine's memory, as far as that has
room; the others are read from the disk. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_llm.common.types import LayerRange

LAYERS_AT_ONCE = 2
"""Such layers that are in the device's memory at a time: one computes, the next one is brought."""


@dataclass(frozen=True)
class Away:
    """Where the layers of a stage are that have no room on its device, by their numbers, in order.

    Attributes:
        in_ram: of those in the machine's memory, beside a GPU.
        on_disk: of those on its disk.
    """

    in_ram: tuple[int, ...] = ()
    on_disk: tuple[int, ...] = ()


def layers_away(layers: LayerRange, count: int) -> tuple[int, ...]:
    """Return the numbers of the layers of a stage that have no room on its device, in their order.

    They lie at equal distances, so that one is brought while those in between compute.

    Args:
        layers: of the stage.
        count: how many; no more than there are.
    """
    size = len(layers)
    if not 0 <= count <= size:
        raise ValueError(f"{count} of {size} layers cannot be away")
    return tuple(layers.start + place for place in _apart(size, count))


def away(layers: LayerRange, from_ram: int, from_disk: int) -> Away:
    """Return where the layers of a stage are that have no room on its device.

    Those on the disk lie at equal distances among the others.

    Args:
        layers: of the stage.
        from_ram: how many stay in the machine's memory.
        from_disk: how many stay on the disk; together no more than there are.
    """
    gone = layers_away(layers, from_ram + from_disk)
    on_disk = tuple(gone[place] for place in _apart(len(gone), from_disk))
    return Away(tuple(layer for layer in gone if layer not in on_disk), on_disk)


def most_in_ram(sizes: Sequence[int], ram_bytes: int) -> int:
    """Return how many of the layers that are away may stay in the machine's memory.

    Args:
        sizes: of these layers, bytes, in their order.
        ram_bytes: room for them.
    """
    for from_disk in range(len(sizes)):
        on_disk = _apart(len(sizes), from_disk)
        if sum(sizes) - sum(sizes[place] for place in on_disk) <= ram_bytes:
            return len(sizes) - from_disk
    return 0


def _apart(size: int, count: int) -> tuple[int, ...]:
    """Return `count` of `size` places at equal distances."""
    return tuple((2 * i + 1) * size // (2 * count) for i in range(count))
