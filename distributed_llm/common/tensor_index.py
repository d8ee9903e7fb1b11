"""Finds the tensors of a model whose weights are in several files, by its index."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed_llm.common import model_sizes as sizes
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.model_files import TensorInfo, read_header, read_json
from distributed_llm.common.other_formats import INDEX_NAME
from distributed_llm.common.text_config import PART_OF
from distributed_llm.common.text_names import text_names

logger = logging.getLogger(__name__)

_DRAFT_NAME = re.compile(r"^(model\.)?mtp(_\w+)?\.")
_LAYER_NUMBER = re.compile(r"^.*?\.(?P<layer>\d+)\..")


def tensors_by_index(
    folder: Path, config: Mapping[str, Any], names: set[str]
) -> dict[str, TensorInfo]:
    """Return the tensors of the files in which, as the index says, those of the text model are.

    If some of those files are not there, the tensors are looked for in the other files.

    Raises:
        CheckpointError: tensors that the index names are nowhere.
    """
    path = folder / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map. Copy the index of the model there.")
    weight_map = of_text(weight_map, config)
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names the file {name!r}, which is not a safetensors file in the same "
                "folder. Do not use this checkpoint."
            )
    absent = [name for name in files if name not in names]
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        if name in names:
            tensors.update(read_header(folder, name))
    if not absent:
        return tensors
    for name in sorted(names.difference(files)):
        if name.endswith(".safetensors"):
            found = read_header(folder, name)
            tensors.update((n, t) for n, t in found.items() if n in weight_map.keys() - tensors)
    num_layers = sizes.num_layers(config)
    lost = sorted(n for n in weight_map.keys() - tensors if not _is_beyond(n, num_layers))
    if lost:
        raise CheckpointError(
            f"There is no {absent[0]} in {folder}, where {INDEX_NAME} says that tensors such as "
            f"{lost[0]} are. Copy that file of the model there."
        )
    logger.warning("%s names %s, which is not there and not needed", path, absent[0])
    return tensors


def is_draft(name: str) -> bool:
    """Return whether a tensor is of modules beside the layers that predict several tokens."""
    return _DRAFT_NAME.match(name) is not None


def of_text(weight_map: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an index that is about the text model: files by names of tensors.

    Args:
        weight_map: of the index.
        config: content of config.json, as `read_config` returns it.

    Raises:
        CheckpointError: the configuration does not tell how many layers there are.
    """
    names = text_names(weight_map, sizes.num_layers(config), is_part=PART_OF in config)
    return {name: file for name, file in weight_map.items() if names.holds(name)}


def _is_beyond(name: str, num_layers: int) -> bool:
    match = _LAYER_NUMBER.match(name)
    return is_draft(name) or (match is not None and int(match["layer"]) >= num_layers)
