"""Damages to models, and what is said of a model that has one: the same by plan and stage."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator import serve
from distributed_llm.worker.model.stage import Stage

Json = dict[str, Any]
_OF_PYTHON = re.compile(
    r"\b[A-Z]\w*(Error|Exception)\b|Traceback|object has no|NoneType|argument|<class|out of range"
)
_WHAT_TO_DO = re.compile(
    r"\b(use|copy|download|delete|compare|give|rename|upgrade|must be|correct)\b", re.IGNORECASE
)
HUGE = 2**60


def read(model: Path) -> Checkpoint:
    """Return a checkpoint that a plan would be made of."""
    _, checkpoint = serve.open_model(str(model), CoordinatorSettings())
    return checkpoint


def verdict(do: Callable[[], Any], named: Path) -> str:
    """Return what is said against a model; empty if nothing is."""
    try:
        do()
    except (CheckpointError, UnsupportedModel) as exc:
        said = str(exc)
        assert not _OF_PYTHON.search(said), said
        assert _WHAT_TO_DO.search(said), said
        assert named.name in said or "config.json" in said or "model.safetensors" in said, said
        assert len(said) < 1000, said
        return said
    return ""


def judged(model: Path) -> str:
    """Return what plan and loading say against a model: the same."""
    opened: list[Checkpoint] = []
    if said := verdict(lambda: opened.append(read(model)), model):
        return said
    (checkpoint,) = opened
    planned = verdict(lambda: Stage.check_loading(checkpoint), model)
    layers = LayerRange(0, checkpoint.num_layers)
    cpu = torch.device("cpu")
    loaded = verdict(lambda: Stage.load(checkpoint, layers, device=cpu, dtype=torch.float32), model)
    assert planned == loaded
    return planned


def damaged_values(value: object, numbers: random.Random) -> Iterator[object]:
    """Yield what could stand instead of a value in JSON."""
    yield from (None, "damaged", -1, HUGE, [], {})
    if isinstance(value, int):
        yield from (0, value + 1, value * 2, float(value) + 0.5)
    if isinstance(value, list):
        yield from (value[:-1], value + value, [numbers.choice([HUGE, -1, "x", None])] * len(value))


def put(content: Json, path: tuple[str, ...], value: object) -> Json:
    copy: Json = json.loads(json.dumps(content))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return copy


def paths_in(content: Json, *above: str) -> Iterator[tuple[str, ...]]:
    for name, value in content.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths_in(value, *above, name)


def value_at(content: Json, path: tuple[str, ...]) -> object:
    found: Any = content
    for name in path:
        found = found[name]
    return found


def copied(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "m"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy
