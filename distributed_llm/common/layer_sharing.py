"""Layers that share what others have, as config.json tells, and cuts between layers that cannot be.

In some models the last layers read the keys and values of earlier ones (Gemma 3n and 4). They keep
none themselves, and have to be where those are.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from distributed_llm.common.types import LayerRange

_FULL_EVERY: Mapping[str, int] = {"gemma3n_text": 5, "gemma4_text": 6}
"""Model types with borrowers; every how many layers one sees everything, if nothing is told."""

_SHARED_BY_DEFAULT: Mapping[str, int] = {"gemma3n_text": 15}


def layer_kinds(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    """Return the types of the layers of a model with borrowers; empty for all other models."""
    every = _FULL_EVERY.get(str(config.get("model_type")))
    if every is None:
        return ()
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) < num_layers:
        kinds = [
            "sliding_attention" if (layer + 1) % every else "full_attention"
            for layer in range(num_layers)
        ]
    if config["model_type"] == "gemma4_text":
        kinds = [*kinds[: num_layers - 1], "full_attention"]
    return tuple(map(str, kinds[:num_layers]))


def kv_lenders(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return of each layer the earlier one whose keys and values it reads; None: it has its own.

    Args:
        config: the content of config.json.
        num_layers: of the model.
    """
    kinds = layer_kinds(config, num_layers)
    default = _SHARED_BY_DEFAULT.get(str(config.get("model_type")), 0)
    borrowers = config.get("num_kv_shared_layers", default)
    first = num_layers - borrowers if kinds and type(borrowers) is int else num_layers
    if not 0 < first < num_layers:
        return (None,) * num_layers
    last_of = {kind: layer for layer, kind in enumerate(kinds[:first])}
    return (*(None,) * first, *(last_of.get(kind) for kind in kinds[first:]))


def uncut(lenders: Iterable[int | None]) -> tuple[int, ...]:
    """Return the layers before which no stage may begin, for they are with the one before."""
    together = [
        range(lender + 1, layer + 1) for layer, lender in enumerate(lenders) if lender is not None
    ]
    return tuple(sorted(set().union(*together)))


def pieces(num_layers: int, uncut_before: Iterable[int]) -> list[LayerRange]:
    """Return the smallest ranges of layers that a stage may have."""
    inside = set(uncut_before)
    edges = [layer for layer in range(num_layers + 1) if layer not in inside]
    return [LayerRange(start, stop) for start, stop in pairwise(edges)]
