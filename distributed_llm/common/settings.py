"""All settings: name, type, limits, default and description of each.

`config.load_settings` reads them; `default.yaml` in the package is made of this module. Everything
that has settings, the coordinator's core included, reads these types: they are frozen, and checked
when they are made.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.types import LayerRange
from distributed_llm.common.units import parse_duration, parse_layers, parse_size, split_address
from distributed_llm.common.wording import layers_text


def _bind_address(value: object) -> object:
    if isinstance(value, str):
        split_address(value)
    return value


def _remote_address(value: object) -> object:
    if isinstance(value, str) and split_address(value)[1] == 0:
        raise ValueError("port 0 is nobody's; write the port that the coordinator listens on")
    return value


def _size(value: object) -> int | None:
    nbytes = parse_size(value)
    if nbytes is not None and nbytes < _LEAST_SIZE:
        raise ValueError(
            f"should be at least {_LEAST_SIZE} bytes, as a number with a unit, such as 6GiB"
        )
    return nbytes


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _layer_range(value: object) -> LayerRange:
    if isinstance(value, LayerRange):
        return value
    return parse_layers(str(value) if type(value) in (str, int) else repr(value))


def _layer_map(value: object) -> object:
    """Return "pc=1-8,mac=9-16", from environment or command line, as a map."""
    if not isinstance(value, str):
        return value
    layers: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, _, held = (side.strip() for side in part.partition("="))
        if name in layers:
            raise ValueError(f"worker {name!r} is named twice")
        layers[name] = held
    return layers


def _items(value: object) -> object:
    """Return "a, b", from environment or command line, as a list; also where a list has it."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        return value
    return [part for text in texts for part in map(str.strip, text.split(",")) if part]


def _shape(pattern: str, rule: str) -> AfterValidator:
    """Return a validator for text that matches `pattern`; `rule` is the error message."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(rule)
        return value

    return AfterValidator(check)


_LEAST_SIZE = 1024
"""Bytes below which a unit was forgotten."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAME_RULE = "should be up to 64 letters, digits, '.', '_' or '-', the first a letter or digit"

Size = Annotated[Annotated[int, Field(le=2**60)] | None, BeforeValidator(_size)]
Seconds = Annotated[float, BeforeValidator(parse_duration), Field(allow_inf_nan=False, le=86400)]
BindAddress = Annotated[str, BeforeValidator(_bind_address)]
RemoteAddress = Annotated[str, BeforeValidator(_remote_address)]
Whole = Annotated[int, BeforeValidator(_number)]
Factor = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Location = Annotated[str, _shape(r"[^\x00-\x1f]{0,4096}", "should be one line of text")]
WorkerName = Annotated[str, _shape(_NAME, _NAME_RULE)]
WorkerNameOrEmpty = Annotated[str, _shape(f"({_NAME})?", _NAME_RULE)]
QuantizeSetting = Literal["none", "int8", "int4", "auto"]
WeightDtype = Literal["auto", "float32", "bfloat16", "float16"]
Strategy = Literal["speed", "memory", "even", "custom"]
Objective = Literal["auto", "throughput", "latency"]
Device = Annotated[
    str,
    _shape(
        r"auto|fastest|cpu|mps|(cuda|xpu)(:[0-9]{1,3})?",
        "should be auto, fastest, cpu, cuda, cuda:1, mps or xpu",
    ),
]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)]
BindAddresses = Annotated[
    tuple[BindAddress, ...], BeforeValidator(_items), NoDecode, Field(min_length=1, max_length=8)
]
HostName = Annotated[
    str,
    BeforeValidator(_lower),
    _shape(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63}){0,8}", "should be a name, without a port"),
]
HostNames = Annotated[tuple[HostName, ...], BeforeValidator(_items), NoDecode, Field(max_length=64)]
LayerText = PlainSerializer(str, return_type=str)
Layers = Annotated[
    Mapping[WorkerName, Annotated[LayerRange, PlainValidator(_layer_range), LayerText]],
    BeforeValidator(_layer_map),
    NoDecode,
]


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """Return an error about several settings, shown at the first of `keys` that was given."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": keys})


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CoordinatorSettings(_Section):
    """The process that cuts the model and hands out the work."""

    model: Location = Field(
        default="",
        description="Folder, GGUF file, ollama:NAME or hub id; empty: the small built-in one.",
    )
    bind: BindAddress = Field(
        default="127.0.0.1:5555",
        description="HOST:PORT to listen on; 0.0.0.0 is every network of this machine, port 0 any "
        "free port.",
    )
    insecure: bool = Field(
        default=False,
        description="Use no keys: whoever reaches the port may do everything, and read everything "
        "that is sent. Only for 127.0.0.1, unless it stands in a file of settings.",
    )
    dtype: WeightDtype = Field(
        default="auto",
        description="Number type of weights and activations; auto: as in the model's files.",
    )
    wire_dtype: WeightDtype = Field(
        default="auto",
        description="Number type of activations between workers; auto: as `dtype`. A narrower one "
        "saves traffic and changes answers a little.",
    )
    quantize: QuantizeSetting = Field(
        default="none",
        description="What floating-point matrices of layers become while they are loaded: none, "
        "int8 (half the memory of 16 bits), int4 (less than a third), auto (the most bits that the "
        "workers can hold). Fewer bits change answers a little.",
    )
    kv_dtype: KVDtype = Field(
        default="auto",
        description="How keys and values of the context are kept: auto (as they are computed), "
        "int8 (half the memory of 16 bits, so about twice the context fits; answers change a "
        "little), fp8 (as int8; coarser, and slower on CPUs).",
    )
    strategy: Strategy = Field(
        default="speed",
        description="How layers are shared out: speed (by measured speed, and again while requests "
        "run when that changes), memory (in proportion to it), even (equal numbers), custom (as "
        "`layers` says).",
    )
    objective: Objective = Field(
        default="auto",
        description="What strategy speed makes best: throughput (many requests at once), latency "
        "(one at a time: fewest, fastest workers), auto (as many as there are).",
    )
    layers: Layers = Field(
        default={},
        description="For strategy custom: which worker serves which layers, counted from 1: "
        "{pc: 1-8, mac: 9-16}.",
    )
    replicas: Literal["auto"] | Annotated[Whole, Field(ge=1, le=4096)] = Field(
        default="auto",
        description="How many times to serve the whole model, each time on workers of its own; as "
        "many as the workers can hold. auto: once, and with strategy speed as often as is fastest.",
    )
    min_workers: Whole = Field(
        default=1,
        ge=1,
        le=4096,
        description="Workers to wait for before the layers are first shared out.",
    )
    settle_s: Seconds = Field(
        default=0.5,
        ge=0,
        description="Quiet time after a worker joins before layers are shared out, s.",
    )
    max_batch_sequences: Whole = Field(
        default=256,
        ge=1,
        le=65536,
        description="Answers that are generated at the same time at most, per pipeline; memory may "
        "allow fewer.",
    )
    max_batch_tokens: Whole = Field(
        default=512,
        ge=1,
        le=1 << 20,
        description="Tokens per step at most; longer prompts are read in several steps.",
    )
    max_waiting_requests: Whole = Field(
        default=256,
        ge=0,
        le=1 << 20,
        description="Answers that may wait to be begun; further requests are refused.",
    )
    share_prefixes: Literal["key", "all"] = Field(
        default="key",
        description="Who shares the KV cache of equal beginnings of prompts: key (requests with "
        "the same key: how fast an answer comes tells nobody what others asked), all.",
    )
    min_kv_tokens: Whole = Field(
        default=1024,
        ge=1,
        le=1 << 30,
        description="Room that must be left beside the layers for KV cache, tokens of context.",
    )
    max_context: Literal["auto"] | Annotated[Whole, Field(ge=1, le=1 << 30)] = Field(
        default="auto",
        description="Tokens of prompt and answer together at most; auto: as many as the model can. "
        "Models with rotary positions for short and for long texts (Phi's with 128k) use those for "
        "short ones if this is at most the length that they were first trained for.",
    )
    heartbeat_interval_s: Seconds = Field(
        default=1.0, gt=0, description="Time between two signs of life of a worker, s."
    )
    silence_timeout_s: Seconds = Field(
        default=4.0,
        gt=0,
        description="A worker silent for this long is taken for dead, s; more than twice "
        "heartbeat_interval_s.",
    )
    load_timeout_s: Seconds = Field(
        default=120.0,
        gt=0,
        description="Time without any progress after which a worker that loads layers is passed "
        "over, s; raise it where a disk or network drive may stand still for longer.",
    )
    task_timeout_s: Seconds = Field(
        default=30.0,
        gt=0,
        description="A worker without progress on a task for this long is taken for hung, s.",
    )
    max_transfer_rate: Size = Field(
        default=None,
        description="Weights that are sent to workers which lack them at most, bytes per second: "
        "50MB, 12MiB; empty: as fast as it goes.",
    )
    log_level: LogLevel = Field(default="info", description="debug, info, warning or error.")

    @model_validator(mode="after")
    def _check_timeout(self) -> Self:
        if self.silence_timeout_s <= 2 * self.heartbeat_interval_s:
            raise conflict(
                f"{self.silence_timeout_s:g} s must be more than twice heartbeat_interval_s "
                f"({self.heartbeat_interval_s:g} s), or one late sign of life drops a worker",
                "silence_timeout_s",
                "heartbeat_interval_s",
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.strategy != "custom":
            if self.layers:
                raise conflict(
                    f"only strategy custom reads it, but strategy is {self.strategy}",
                    "layers",
                )
            return self
        if self.replicas not in ("auto", 1):
            raise conflict(
                "strategy custom names one worker for each layer; several pipelines need another "
                "strategy",
                "replicas",
                "strategy",
            )
        if not self.layers:
            raise conflict("strategy custom needs `layers`", "strategy")
        served = sorted(self.layers.items(), key=lambda item: item[1])
        if served[0][1].start != 0:
            missing = LayerRange(0, served[0][1].start)
            raise conflict(f"nobody serves {layers_text(missing)}", "layers")
        for (name, held), (next_name, next_held) in pairwise(served):
            if next_held.start < held.stop:
                raise conflict(
                    f"workers {name!r} and {next_name!r} both serve layer {next_held.start + 1}",
                    "layers",
                )
            if next_held.start > held.stop:
                missing = LayerRange(held.stop, next_held.start)
                raise conflict(
                    f"nobody serves {layers_text(missing)}, between workers {name!r} and "
                    f"{next_name!r}",
                    "layers",
                )
        return self


class WorkerSettings(_Section):
    """A process that runs some of the layers."""

    coordinator: RemoteAddress = Field(
        default="127.0.0.1:5555", description="HOST:PORT of the coordinator to join."
    )
    insecure: bool = Field(
        default=False, description="Use no keys; for a coordinator that uses none."
    )
    peer_bind: BindAddress = Field(
        default="0.0.0.0:0",
        description="HOST:PORT to listen on for the other workers, which hand their results on; "
        "0.0.0.0 is every network of this machine, but only this machine if the coordinator is "
        "found at 127.0.0.1 and by nobody else; port 0 any free port.",
    )
    name: WorkerNameOrEmpty = Field(
        default="", description="What this worker is called; empty: after this machine."
    )
    device: Device = Field(
        default="auto",
        description="auto (the fastest there is; of several GPUs all, each by a worker of its "
        "own), fastest (just one), cpu, cuda, cuda:1, mps, xpu.",
    )
    threads: Whole = Field(
        default=0,
        ge=0,
        le=4096,
        description="CPU threads to compute with; 0: as the cores are.",
    )
    max_memory: Size = Field(
        default=None,
        description="Memory to use at most: 6GiB and 512MiB count in 1024s, 6GB and 6G in 1000s, a "
        "plain number is bytes; empty: what is free. Of each GPU, where there are several.",
    )
    offload: Size = Field(
        default=None,
        description="Room for layers that fit into no worker's memory, such as 20GiB: on the disk, "
        "and beside an NVIDIA or AMD GPU first in this machine's memory; they are brought for "
        "every token, which is slow; for each GPU, where there are several; empty: none.",
    )
    slowdown: Factor = Field(
        default=1.0, ge=1, le=1000, description="For tests: look this many times slower; 1: off."
    )
    model: Location = Field(
        default="",
        description="Folder of the model on this machine, if it is not the coordinator's; empty: "
        "the same.",
    )
    max_transfer_rate: Size = Field(
        default=None,
        description="Weights that are fetched from other machines at most, and as much that is "
        "sent to them, bytes per second: 50MB, 12MiB; empty: as fast as it goes.",
    )
    cache_limit: Size = Field(
        default=None,
        description="Room on the disk for weights that other machines send, such as 100GiB; empty: "
        "as much as it has, but for the last GiB or 5 %.",
    )
    connect_timeout_s: Seconds = Field(
        default=10.0,
        ge=0,
        description="Time to wait for the coordinator to answer, s; 0: as long as it takes, as "
        "with `dllm worker --wait`.",
    )
    leave_timeout_s: Seconds = Field(
        default=60.0,
        ge=0,
        description="When told to end, wait at most this long for others to have the layers, s; "
        "0: end at once. A second signal ends at once as well.",
    )
    log_level: LogLevel = Field(default="info", description="debug, info, warning or error.")


class ClientSettings(_Section):
    """Commands that ask the coordinator: generate, status."""

    coordinator: RemoteAddress = Field(
        default="127.0.0.1:5555", description="HOST:PORT of the coordinator to ask."
    )
    insecure: bool = Field(
        default=False, description="Use no keys; for a coordinator that uses none."
    )
    connect_timeout_s: Seconds = Field(
        default=5.0, gt=0, description="Time to wait for the coordinator to answer, s."
    )


class ApiSettings(_Section):
    """The API over HTTP; which coordinator it asks stands under `client`."""

    bind: BindAddresses = Field(
        default=("127.0.0.1:8000",),
        description="HOST:PORTs to listen on; 127.0.0.1 is this machine only, 0.0.0.0 every "
        "network of it. Clients of Ollama look for 127.0.0.1:11434.",
    )
    open: bool = Field(
        default=False,
        description="Serve requests without a key, as those of a client.",
    )
    allowed_hosts: HostNames = Field(
        default=(),
        description="Names by which the API is asked besides its addresses and the name of its "
        "machine, such as that of a proxy.",
    )
    max_body: Annotated[int, BeforeValidator(parse_size)] = Field(
        default=4 << 20,
        ge=1024,
        le=1 << 30,
        description="Size of a request's body at most, such as 4MiB.",
    )
    max_requests: Whole = Field(
        default=512, ge=1, le=100_000, description="Requests that are under way at a time at most."
    )
    max_requests_per_key: Whole = Field(
        default=256, ge=1, le=100_000, description="Of these, requests that come with the same key."
    )
    log_level: LogLevel = Field(default="info", description="debug, info, warning or error.")


SECTIONS: dict[str, type[_Section]] = {
    "coordinator": CoordinatorSettings,
    "worker": WorkerSettings,
    "client": ClientSettings,
    "api": ApiSettings,
}


class Settings(BaseSettings):
    """All sections. `load_settings` reads them; built directly, it reads no file or environment."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="DLLM_", env_nested_delimiter="__"
    )

    coordinator: CoordinatorSettings = CoordinatorSettings()
    worker: WorkerSettings = WorkerSettings()
    client: ClientSettings = ClientSettings()
    api: ApiSettings = ApiSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keep pydantic from reading the environment: `load_settings` does."""
        return (init_settings,)
