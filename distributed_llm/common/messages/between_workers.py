"""What workers tell each other, besides tasks: to open and measure a link, to send KV cache."""

from typing import Annotated

import msgspec
from msgspec import Meta

from distributed_llm.common.messages.base import Label, Message
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import Count, LayerRange

MAX_PIECES = 2048
"""Pieces of KV cache in one message."""


class PeerHello(Message, frozen=True, kw_only=True, tag="peer_hello"):
    """Worker -> worker of the next stage: first message of a link; repeated until answered."""

    epoch: Count
    key: Label


class PeerProbe(Message, frozen=True, kw_only=True, tag="peer_probe"):
    """Worker -> next worker: zeros of some size, to see how fast the link is."""

    epoch: Count
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class KVPart(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Positions `[offset, offset + count)` of a segment of the sender's KV cache, in one layer.

    Attributes:
        segment: its name at the sender.
        layer: its number in the model.
        capacity: positions that the segment has room for.
    """

    segment: Count
    layer: Annotated[int, Meta(ge=0, le=65535)]
    offset: Count
    count: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    capacity: Count


class KVPieces(Message, frozen=True, kw_only=True, tag="kv_pieces"):
    """Worker -> worker: a part of a KV cache; answered by `KVTaken`.

    `tensors` is [bytes (uint8)]: of each part its keys [heads, count, key_dim] and its values
    [heads, count, value_dim], in the model's dtype.

    Attributes:
        layers: of the transfer, which names it.
        number: of the message in the transfer, from 1.
    """

    epoch: Count
    layers: LayerRange
    number: Count
    parts: Annotated[tuple[KVPart, ...], Meta(min_length=1, max_length=MAX_PIECES)]
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class KVEnd(Message, frozen=True, kw_only=True, tag="kv_end"):
    """Worker -> worker: nothing more comes; `tensors` is [msgpack of `KVManifest` (uint8)]."""

    epoch: Count
    layers: LayerRange
    number: Count
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class PeerWelcome(Message, frozen=True, kw_only=True, tag="peer_welcome"):
    """Worker -> worker of the stage before: the key is right; tasks of `epoch` may come.

    A hello that is not answered has a wrong key, or comes before the epoch is known here.
    """

    epoch: Count


class PeerProbed(Message, frozen=True, kw_only=True, tag="peer_probed"):
    """Worker -> worker of the stage before: a `PeerProbe` has arrived."""

    epoch: Count


class KVTaken(Message, frozen=True, kw_only=True, tag="kv_taken"):
    """Worker -> worker that sends KV cache: the transfer has arrived up to this message."""

    epoch: Count
    layers: LayerRange
    number: Count
