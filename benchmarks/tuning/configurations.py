"""Configurations of a coordinator that are tried, and how they are named. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from distributed_llm.common.settings import CoordinatorSettings

_DEFAULTS = CoordinatorSettings()


@dataclass(frozen=True)
class Configuration:
    """Settings of a coordinator that are tried together, named as in the package's `default.yaml`.

    Attributes:
        layers: by worker, "1-8"; for strategy custom only.
    """

    strategy: str = _DEFAULTS.strategy
    objective: str = _DEFAULTS.objective
    layers: tuple[tuple[str, str], ...] = ()
    replicas: int | Literal["auto"] = _DEFAULTS.replicas
    max_batch_tokens: int = _DEFAULTS.max_batch_tokens
    max_batch_sequences: int = _DEFAULTS.max_batch_sequences
    dtype: str = _DEFAULTS.dtype
    wire_dtype: str = _DEFAULTS.wire_dtype

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the defaults, as a file of settings says it."""
        plain = Configuration()
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        changed = {name: value for name, value in found.items() if value != getattr(plain, name)}
        if self.layers:
            changed["layers"] = dict(self.layers)
        return changed

    @property
    def title(self) -> str:
        """What people call it."""
        texts = [_text(name, value) for name, value in self.changes.items()]
        return ", ".join(text for text in texts if text) or "defaults"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that give it to a coordinator."""
        values = {
            name: ",".join(f"{worker}={held}" for worker, held in value.items())
            if isinstance(value, Mapping)
            else str(value)
            for name, value in self.changes.items()
        }
        return {f"DLLM_COORDINATOR__{name.upper()}": value for name, value in values.items()}


def _text(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        return "layers " + " ".join(f"{worker} {held}" for worker, held in value.items())
    if (name, value) == ("strategy", "custom"):
        return ""  # the layers say it
    return f"{name} {value}"


@dataclass(frozen=True)
class Axis:
    """A setting, and the values that are tried for it.

    Attributes:
        name: a field of `Configuration`.
    """

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Space:
    """Everything that is tried.

    Attributes:
        axes: in the order in which they are; the first value of each is what is begun with.
        subsets: how many of the fastest workers are tried on their own.
    """

    axes: tuple[Axis, ...]
    subsets: tuple[int, ...] = ()

    @property
    def baseline(self) -> Configuration:
        """What everything else is compared with."""
        return Configuration(**{axis.name: axis.values[0] for axis in self.axes})


_QUICK: Mapping[str, Sequence[Any]] = {
    "strategy": ("speed", "memory", "even"),
    "max_batch_tokens": (512, 128),
}
_FULL: Mapping[str, Sequence[Any]] = {
    "strategy": ("speed", "memory", "even"),
    "objective": ("auto", "throughput", "latency"),
    "replicas": ("auto", 2),
    "max_batch_tokens": (512, 128, 2048),
    "max_batch_sequences": (256, 8),
    "dtype": ("auto", "float32", "bfloat16"),
    "wire_dtype": ("auto", "bfloat16"),
}


def make_space(
    *,
    quick: bool,
    given: Mapping[str, Sequence[Any] | None],
    num_workers: int,
    most_requests: int,
    model_dtype: str,
) -> Space:
    """Return what to try: the values given for a setting, else those of a quick or full search.

    Values that could change nothing are left out where they were not given: more answers at once
    than are asked for, the model's own dtype, two pipelines with one worker.

    Args:
        given: by setting; also "subsets". None: not given.
        most_requests: of the largest load.
        model_dtype: of the checkpoint.
    """
    usual = dict(_QUICK if quick else _FULL)
    if num_workers < 2:
        usual.pop("replicas", None)
    if model_dtype != "float32":
        usual.pop("wire_dtype", None)
    idle = {"dtype": {model_dtype}}
    idle["max_batch_sequences"] = {
        str(value) for value in usual.get("max_batch_sequences", ())[1:] if value >= most_requests
    }
    axes = []
    for name in [one.name for one in fields(Configuration) if one.name != "layers"]:
        values = given.get(name)
        if values is None:
            values = [v for v in usual.get(name, ()) if str(v) not in idle.get(name, ())]
        if values:
            axes.append(Axis(name, tuple(dict.fromkeys(values))))
    subsets = given.get("subsets")
    if subsets is None:
        sizes = {1, num_workers} if quick else {1, 2, num_workers // 2, num_workers - 1}
        subsets = sorted(n for n in sizes | {num_workers} if 0 < n <= num_workers)
    return Space(tuple(axes), tuple(subsets))
