"""Layers that share what others have, as config.json tells, and cuts between layers that cannot be.

In some models the last layers read the keys and values of earlier ones (Gemma 3n and 4). They keep
none themselves, and have to be where those are. So have layers that attend to what an earlier one
has chosen (`indexers`).
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from distributed_llm.common.indexers import choosers
from distributed_llm.common.layer_types import layer_types
from distributed_llm.common.types import LayerRange
from distributed_llm.common.wording import layers_text

_BORROWERS_BY_DEFAULT: Mapping[str, int] = {"gemma3n_text": 15, "gemma4_text": 0}
"""Model types with borrowers; how many of the last layers are, if nothing is told."""


def kv_lenders(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return of each layer the earlier one whose keys and values it reads; None: it has its own.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    first = num_layers - borrowers(config)
    if not 0 < first < num_layers:
        return (None,) * num_layers
    kinds = layer_types(config, num_layers)
    last_of = {kind: layer for layer, kind in enumerate(kinds[:first])}
    return (*(None,) * first, *(last_of.get(kind) for kind in kinds[first:]))


def borrowers(config: Mapping[str, Any]) -> int:
    """Return how many of the last layers read keys and values of earlier ones."""
    default = _BORROWERS_BY_DEFAULT.get(str(config.get("model_type")))
    told = 0 if default is None else config.get("num_kv_shared_layers", default)
    return told if type(told) is int else 0


def lenders_within(
    config: Mapping[str, Any], num_layers: int, layers: LayerRange
) -> tuple[int | None, ...]:
    """Return the lenders of the layers of a stage, all numbered from its first one.

    Raises:
        ValueError: some of them are not in the stage.
    """
    own = slice(layers.start, layers.stop)
    of_stage = kv_lenders(config, num_layers)[own]
    if any(one is not None and one < layers.start for one in of_stage):
        raise ValueError(f"{layers_text(layers)} read keys and values of layers before them")
    if any(one is not None and one < layers.start for one in choosers(config, num_layers)[own]):
        raise ValueError(f"{layers_text(layers)} attend to what layers before them have chosen")
    return tuple(None if one is None else one - layers.start for one in of_stage)


def uncut(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the layers before which no stage may begin, for they are with the one before.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    of_kv, of_choice = kv_lenders(config, num_layers), choosers(config, num_layers)
    return tuple(sorted({*_with_their_lenders(of_kv), *_with_their_lenders(of_choice)}))


def _with_their_lenders(lenders: Iterable[int | None]) -> set[int]:
    """Return the layers that are together with the one before them."""
    together = [
        range(lender + 1, layer + 1) for layer, lender in enumerate(lenders) if lender is not None
    ]
    return set().union(*together)


def pieces(num_layers: int, uncut_before: Iterable[int]) -> list[LayerRange]:
    """Return the smallest ranges of layers that a stage may have."""
    inside = set(uncut_before)
    edges = [layer for layer in range(num_layers + 1) if layer not in inside]
    return [LayerRange(start, stop) for start, stop in pairwise(edges)]
