"""Messages from worker to worker, besides `Task`: opening and measuring links, KV cache."""

from typing import Annotated

import msgspec
from msgspec import Meta

from distributed_llm.common.messages.base import Label, Message
from distributed_llm.common.tensors import DtypeName, TensorSpec
from distributed_llm.common.types import Count, Epoch, LayerRange

MAX_PIECES = 2048
"""Parts of KV cache in one message at most, and of states."""


class PeerHello(Message, frozen=True, kw_only=True, tag="peer_hello"):
    """Worker -> worker that it dialled: first message of a link, repeated until answered.

    Attributes:
        key: HMAC-SHA256, in hexadecimal, which proves that the sender knows the `link_key` of
            `epoch`, and so is part of the plan.
    """

    epoch: Epoch
    key: Label


class PeerProbe(Message, frozen=True, kw_only=True, tag="peer_probe"):
    """Worker -> worker of the next stage: zeros, to measure the bandwidth of the link."""

    epoch: Epoch
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class KVPart(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Positions `[offset, offset + count)` of a segment of the sender's KV cache, in one layer.

    Attributes:
        segment: id of the segment at the sender.
        layer: index of the layer in the model.
        capacity: positions that the segment has room for.
    """

    segment: Count
    layer: Annotated[int, Meta(ge=0, le=65535)]
    offset: Count
    count: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    capacity: Count


class StatePart(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Numbers `[offset, offset + count)` of one tensor of a state of the sender, in one layer.

    Attributes:
        state: id of the state at the sender.
        layer: index of the layer in the model.
        tensor: which one of the layer's state, in the order of their names.
        dtype: of the numbers.
    """

    state: Count
    layer: Annotated[int, Meta(ge=0, le=65535)]
    tensor: Annotated[int, Meta(ge=0, le=255)]
    offset: Count
    count: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    dtype: DtypeName


class KVPieces(Message, frozen=True, kw_only=True, tag="kv_pieces"):
    """Worker -> worker: parts of a KV cache and of states; answered by `KVTaken`.

    `tensors` is [bytes (uint8)]: for each part of the KV cache, keys [heads, count, key_dim]
    followed by values [heads, count, value_dim], as the sender keeps them; then for each part of a
    state its numbers.

    Attributes:
        layers: layers of the transfer, which identify it.
        number: number of this message in the transfer, from 1.
        dtype: of keys and values; uint8 if they are kept in 8 bits, or there are none.
        parts: of the KV cache.
        states: parts of states.
    """

    epoch: Epoch
    layers: LayerRange
    number: Count
    dtype: DtypeName
    parts: Annotated[tuple[KVPart, ...], Meta(max_length=MAX_PIECES)]
    states: Annotated[tuple[StatePart, ...], Meta(max_length=MAX_PIECES)] = ()
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class KVEnd(Message, frozen=True, kw_only=True, tag="kv_end"):
    """Worker -> worker: last message of a transfer; `tensors` is [msgpack of `KVManifest`]."""

    epoch: Epoch
    layers: LayerRange
    number: Count
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]


class PeerWelcome(Message, frozen=True, kw_only=True, tag="peer_welcome"):
    """Worker -> worker that dialled it: accepts a `PeerHello`; messages of `epoch` may come.

    A hello with a wrong key, or of an epoch that is not known yet, is not answered.
    """

    epoch: Epoch


class PeerProbed(Message, frozen=True, kw_only=True, tag="peer_probed"):
    """Worker -> worker of the previous stage: answers `PeerProbe`."""

    epoch: Epoch


class KVTaken(Message, frozen=True, kw_only=True, tag="kv_taken"):
    """Worker -> worker that sends KV cache: the transfer has arrived up to message `number`."""

    epoch: Epoch
    layers: LayerRange
    number: Count
