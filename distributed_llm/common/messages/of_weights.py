"""Messages about weights: worker to whoever has them, and back, over connections of their own.

A worker asks the coordinator what the model consists of and what its tensors hash to, and then
reads the bytes of tensors, by their hashes, from the coordinator and from other workers. Each
message stands for itself: there is no session.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from distributed_llm.common.messages.base import Message, Tensors, Text, Value
from distributed_llm.common.messages.to_worker import ModelSource
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import Count, LayerRange

MAX_CHUNK_BYTES = 1 << 20
"""Bytes of a tensor in one message at most."""

Sha256 = Annotated[str, Meta(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}\Z")]
"""SHA-256 of a tensor's bytes as they stand in its file, in hexadecimal."""

_TensorName = Annotated[str, Meta(max_length=1024)]


class GetModel(Message, frozen=True, kw_only=True, tag="get_model"):
    """Worker -> coordinator: what does this model consist of? Answered by `ModelReport`."""

    source: ModelSource


class GetDigests(Message, frozen=True, kw_only=True, tag="get_digests"):
    """Worker -> coordinator: what do the tensors of `layers` hash to?

    Answered by `DigestsReport`, at once, with what is known. The coordinator then fetches and
    hashes the others, and the worker asks again.
    """

    source: ModelSource
    layers: LayerRange


class ReadChunk(Message, frozen=True, kw_only=True, tag="read_chunk"):
    """Worker -> whoever has the weights: bytes `[offset, offset + length)` of a tensor.

    Answered by `Chunk` or `NoChunk`.
    """

    sha256: Sha256
    offset: Count
    length: Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]


class TensorDescription(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """A tensor of a model.

    Attributes:
        file: the safetensors file that holds it.
        dtype: safetensors' name ("BF16").
        nbytes: its size in the file, bytes.
    """

    name: _TensorName
    file: Annotated[str, Meta(max_length=255)]
    dtype: Annotated[str, Meta(max_length=32)]
    shape: Annotated[tuple[Count, ...], Meta(max_length=16)]
    nbytes: Count


class ModelDescription(Value, frozen=True, kw_only=True):
    """All of a model but the numbers; the payload of `ModelReport`.

    Attributes:
        config: content of config.json, as JSON.
    """

    config: bytes
    tensors: tuple[TensorDescription, ...]


class ModelReport(Message, frozen=True, kw_only=True, tag="model_report"):
    """Coordinator -> worker: `tensors` is [msgpack of `ModelDescription`].

    Attributes:
        message: why there is none, for people; empty if there is one.
    """

    tensors: Tensors = ()
    message: Text = ""


class TensorDigests(Value, frozen=True, kw_only=True):
    """What the tensors of some layers hash to; the payload of `DigestsReport`.

    Attributes:
        sha256: by name; those that are not known yet are missing.
    """

    sha256: dict[_TensorName, Sha256]


class DigestsReport(Message, frozen=True, kw_only=True, tag="digests_report"):
    """Coordinator -> worker: `tensors` is [msgpack of `TensorDigests`].

    Attributes:
        complete: whether all tensors of `layers` are in it.
        progress: a number that changes as long as the coordinator gets on with the others.
        doing: what it is at, for people: "downloads 3 files from the hub".
        failure: why it cannot get the others, for people; empty unless it has given up.
    """

    layers: LayerRange
    tensors: Tensors = ()
    complete: bool = False
    progress: Count = 0
    doing: Text = ""
    failure: Text = ""


class Chunk(Message, frozen=True, kw_only=True, tag="chunk"):
    """Whoever has the weights -> worker: `tensors` is [bytes (uint8)] of a tensor from `offset`."""

    sha256: Sha256
    offset: Count
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class NoChunk(Message, frozen=True, kw_only=True, tag="no_chunk"):
    """Whoever was asked for a chunk -> worker: it has none.

    Attributes:
        reason: "absent" if it does not have the tensor, "failed" if it cannot be read.
        message: more of that, for people.
    """

    sha256: Sha256
    offset: Count
    reason: Literal["absent", "failed"]
    message: Text = ""
