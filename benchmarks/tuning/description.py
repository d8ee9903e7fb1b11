"""Described clusters: a YAML file of workers and links, for machines that one does not have."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.settings import Seconds, WorkerName
from distributed_llm.common.strict_yaml import KeyPath, YamlFile, read_yaml
from distributed_llm.common.units import parse_size
from distributed_llm.coordinator.model_cost import ModelCost

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)(bit|b)/s", re.IGNORECASE)
_FLOPS = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)flops", re.IGNORECASE)
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _bytes_per_s(value: object) -> float:
    match = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("should be a rate such as 50GB/s, 125MB/s or 1Gbit/s")
    bits = match[3].lower() == "bit"
    return float(match[1]) * _UNITS[match[2].lower()] / (8 if bits else 1)


def _flops(value: object) -> float:
    match = _FLOPS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("should be operations per second such as 500GFLOPS or 20TFLOPS")
    return float(match[1]) * _UNITS[match[2].lower()]


def _pair(value: str) -> str:
    if value != "default" and value.count("/") != 1:
        raise ValueError("should be default, or two workers as in gaming-pc/laptop")
    return value


Memory = Annotated[int, BeforeValidator(parse_size), Field(ge=1024, le=2**60)]
Rate = Annotated[float, BeforeValidator(_bytes_per_s), Field(gt=0, le=1e16)]
Flops = Annotated[float, BeforeValidator(_flops), Field(gt=0, le=1e20)]
Dtype = Literal["float32", "bfloat16", "float16"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Link(_Part):
    """A connection between two workers, the same in both directions.

    Attributes:
        latency: one way, seconds.
        bandwidth: bytes per second.
    """

    latency: Annotated[Seconds, Field(ge=0)] = 0.0005
    bandwidth: Rate = 117e6


class DescribedWorker(_Part):
    """A machine.

    Attributes:
        memory: for weights and KV cache, bytes.
        memory_bandwidth: of reading weights, bytes per second.
        flops: of multiplying matrices, operations per second.
        slowdown: this many times slower, since it does other things as well.
        task: what any step takes on it beside its layers, seconds.
    """

    memory: Memory
    memory_bandwidth: Rate
    flops: Flops
    slowdown: Annotated[float, Field(ge=1, le=1000)] = 1.0
    task: Annotated[Seconds, Field(ge=0)] = 0.0005


class Shape(_Part):
    """A decoder model without its files.

    Attributes:
        parameters: of the whole model, in billions; None: from the other figures.
        kv_heads: None: as many as `heads`.
        intermediate_size: None: four times the hidden size.
        head_dim: None: hidden size over heads.
        tied: the head is the embedding.
    """

    layers: Annotated[int, Field(ge=1, le=4096)]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 20)]
    heads: Annotated[int, Field(ge=1, le=4096)]
    kv_heads: Annotated[int, Field(ge=1, le=4096)] | None = None
    head_dim: Annotated[int, Field(ge=1, le=65536)] | None = None
    intermediate_size: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    vocab_size: Annotated[int, Field(ge=8, le=1 << 24)] = 32_000
    parameters: Annotated[float, Field(gt=0, le=1e5)] | None = None
    tied: bool = False
    context_length: Annotated[int, Field(ge=1, le=1 << 30)] = 32_768
    dtype: Dtype = "bfloat16"

    def cost(self, dtype: str) -> ModelCost:
        """Return what its layers cost in this dtype.

        Raises:
            ConfigError: it has fewer parameters than its embedding.
        """
        item = _ITEM_BYTES[dtype]
        head_dim = self.head_dim or max(1, self.hidden_size // self.heads)
        kv = (self.kv_heads or self.heads) * head_dim
        embedding = self.vocab_size * self.hidden_size
        attention = self.hidden_size * (2 * self.heads * head_dim + 2 * kv)
        between = self.intermediate_size or 4 * self.hidden_size
        layer: float = attention + 3 * self.hidden_size * between
        if self.parameters is not None:
            layer = (self.parameters * 1e9 - embedding * (1 if self.tied else 2)) / self.layers
        if layer <= 0:
            raise ConfigError(
                f"model.parameters: {self.parameters:g} billion are fewer than embedding and head "
                f"have, {embedding * (1 if self.tied else 2) / 1e9:.2f} billion"
            )
        return ModelCost(
            layer_bytes=(int(layer * item),) * self.layers,
            first_bytes=0 if self.tied else embedding * item,
            last_bytes=0 if self.tied else embedding * item,
            shared_bytes=embedding * item if self.tied else 0,
            layer_kv_bytes=(2 * kv * item,) * self.layers,
        )


class Description(_Part):
    """A cluster.

    Attributes:
        model: its shape; None: the model that the command line names.
        links: by "default" or by two workers, "gaming-pc/laptop".
    """

    workers: Annotated[Mapping[WorkerName, DescribedWorker], Field(min_length=1, max_length=4096)]
    links: Mapping[Annotated[str, AfterValidator(_pair)], Link] = {}
    model: Shape | None = None

    @model_validator(mode="after")
    def _check_links(self) -> Self:
        for pair in self.links:
            for name in pair.split("/"):
                if pair != "default" and name not in self.workers:
                    raise ValueError(f"links: {pair}: there is no worker {name!r}")
        return self

    def link(self, one: str, other: str) -> Link:
        """Return the connection between two workers."""
        usual = self.links.get("default", Link())
        return self.links.get(f"{one}/{other}") or self.links.get(f"{other}/{one}") or usual


@dataclass(frozen=True)
class _Problem:
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def read_description(path: Path) -> Description:
    """Return the cluster that a file describes.

    Raises:
        ConfigError: with a line for each problem, saying where it stands and what to write.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file; start from a copy of config/clusters/mixed.yaml")
    file = read_yaml(path)
    try:
        return Description(**file.values)
    except ValidationError as error:
        problems = [_problem(path, file, details) for details in error.errors(include_url=False)]
        raise ConfigError("\n".join(str(problem) for problem in problems)) from None


def _problem(path: Path, file: YamlFile, details: Any) -> _Problem:
    keys = tuple(str(part) for part in details["loc"] if part != "[key]")
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    match details["type"]:
        case "extra_forbidden":
            message = f"unknown key; known here: {', '.join(_known(keys))}"
        case "missing":
            message = "is missing"
        case "value_error" if not keys:
            keys = tuple(message.split(": ")[0:1])
        case _:
            message += f", not {details['input']!r:.60}"
    return _Problem(_where(path, file, keys), f"{'.'.join(keys)}: {message}" if keys else message)


def _where(path: Path, file: YamlFile, keys: KeyPath) -> str:
    while keys and keys not in file.lines:
        keys = keys[:-1]
    return f"{path}:{file.lines[keys] if keys else 1}"


def _known(keys: KeyPath) -> list[str]:
    kinds: dict[str, type[_Part]] = {"workers": DescribedWorker, "links": Link, "model": Shape}
    kind = kinds[keys[0]] if len(keys) > 1 else Description
    return list(kind.model_fields)
