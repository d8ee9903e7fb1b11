"""Tells the weights of a model from the tensors of its files."""

from collections.abc import Mapping
from typing import Any

from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.stored_weights import StoredWeight


def stored_weights(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, StoredWeight]:
    """Return the weights that these tensors make, by their names.

    Args:
        config: content of config.json, which says how they are quantized.
        tensors: by their names in the files.
    """
    return {name: StoredWeight(name, t.shape, {"": t}) for name, t in tensors.items()}
