"""Field types, limits and values that messages of several directions share."""

from typing import Annotated

import msgspec
from msgspec import Meta

from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import Count

PROTOCOL_VERSION = 16
MAX_TENSORS = 8
MAX_STAGES = 256

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Label = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=16384)]
RequestId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+\Z")]
Tensors = Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
Address = Annotated[str, Meta(min_length=1, max_length=256)]
Addresses = Annotated[tuple[Address, ...], Meta(max_length=16)]
Microseconds = Annotated[int, Meta(ge=0, le=2**53)]
Bandwidth = Annotated[float, Meta(ge=1, le=1e16)]
Flops = Annotated[float, Meta(ge=1, le=1e20)]


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of values inside messages."""


class Message(Value, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages. On the wire, the field `type` holds the tag of the class."""


def tag_of(kind: type[Message]) -> str:
    """Return the tag that stands in the field `type` for a class of messages."""
    tag = kind.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


class Capabilities(Value, frozen=True, kw_only=True):
    """What a worker's machine can do, as measured when the worker started.

    Attributes:
        device: torch's name of the device ("cpu", "cuda:0").
        device_name: name of the device for people.
        memory_bytes: that the worker may use: for weights, KV cache and what steps take.
        cores: CPU cores of the machine.
        threads: CPU threads that the worker computes with.
        shares: stands for the cores of these threads: workers with the same text share them. Empty
            if the worker computes on another device, or if that cannot be known.
        memory_bandwidth_bytes_per_s: measured while reading weights.
        flops_per_s: measured while multiplying matrices.
        offload_bytes: room for layers without room in memory: on its disk, and of a GPU first in
            the machine's memory.
        disk_bytes_per_s: measured while reading from that disk; nothing if it has no room.
        ram_bytes: the part of `offload_bytes` that is in the memory of a GPU's machine.
        ram_bytes_per_s: measured while copying from there to the GPU; nothing if that has no room.
        bfloat16: whether the device computes in bfloat16; else it does in float16 or float32.
    """

    device: Label
    device_name: Label
    platform: Label
    memory_bytes: Count
    cores: Annotated[int, Meta(ge=1, le=65536)]
    threads: Annotated[int, Meta(ge=1, le=65536)]
    memory_bandwidth_bytes_per_s: Bandwidth
    flops_per_s: Flops
    shares: Label = ""
    offload_bytes: Count = 0
    disk_bytes_per_s: Bandwidth | None = None
    ram_bytes: Count = 0
    ram_bytes_per_s: Bandwidth | None = None
    bfloat16: bool = True


class FetchProgress(Value, frozen=True, kw_only=True):
    """How far the weights that a worker needs have arrived on its disk.

    Attributes:
        here_bytes: of them are there.
        total_bytes: in all.
        bytes_per_s: at which they arrive now.
        doing: where they come from, or what is waited for, for people.
    """

    here_bytes: Count
    total_bytes: Count
    bytes_per_s: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    doing: Label = ""


class StageTime(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """How long one task took on one stage, microseconds.

    Attributes:
        layers_us: the part of `compute_us` inside the layers; the rest is embedding, head, sampling
            and overhead per task.
        queued_us: from the task's arrival until it ran.
    """

    compute_us: Microseconds
    layers_us: Microseconds
    queued_us: Microseconds


StageTimes = Annotated[tuple[StageTime, ...], Meta(max_length=MAX_STAGES)]
