"""Messages to frames and back: the wire format.

A message is the frames `[preamble][header][tensor]...`: four bytes of magic and one of protocol
version; one struct of `messages` in msgpack; and one raw frame per entry of its field `tensors`.
The version comes before everything that may change with it, so that every version recognises all
others.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from distributed_llm.common.errors import (
    LocalProtocolError,
    ProtocolMismatch,
    RemoteProtocolError,
)
from distributed_llm.common.messages import (
    MAX_TENSORS,
    PROTOCOL_VERSION,
    AnyMessage,
    Chat,
    ClusterMembers,
    ClusterStatus,
    ModelDescription,
    ModelInfo,
    ReadChunk,
    TensorDigests,
    ToClient,
    ToCoordinator,
    ToNextWorker,
    ToPreviousWorker,
    ToReader,
    ToWorker,
    WeightRequest,
)
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.types import Outline

MAGIC = b"DLLM"
PREAMBLE = MAGIC + bytes([PROTOCOL_VERSION])
MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024

V = TypeVar("V")
M_co = TypeVar("M_co", covariant=True)

_encoder = msgspec.msgpack.Encoder()


class Decoder(Generic[M_co]):
    """Decodes the messages of one direction.

    Args:
        union: the messages of this direction: M_co, as a value.
    """

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[M_co] = msgspec.msgpack.Decoder(union)

    def decode(self, frames: Sequence[Frame]) -> tuple[M_co, tuple[Frame, ...]]:
        """Return the message and its tensor frames.

        Raises:
            ProtocolMismatch: the peer speaks another protocol version.
            RemoteProtocolError: `frames` are no valid message of this direction; with an outline,
                so that whoever waits for its effect can be told.
        """
        if not 2 <= len(frames) <= 2 + MAX_TENSORS:
            raise RemoteProtocolError("bad_frames", f"{len(frames)} frames")
        preamble, header, *tensors = frames
        _check_preamble(bytes(preamble[: len(PREAMBLE) + 1]))
        if len(header) > MAX_HEADER_BYTES:
            raise RemoteProtocolError("header_too_big", f"{len(header)} bytes")
        try:
            return self._message(header, tensors)
        except RemoteProtocolError as exc:
            raise RemoteProtocolError(exc.reason, exc.detail, _outline_of(header)) from exc

    def _message(self, header: Frame, tensors: Sequence[Frame]) -> tuple[M_co, tuple[Frame, ...]]:
        message = _decode(self._decoder, header)
        specs: tuple[TensorSpec, ...] = getattr(message, "tensors", ())
        if len(specs) != len(tensors):
            raise RemoteProtocolError(
                "bad_frames", f"{len(tensors)} tensor frames for {len(specs)} specs"
            )
        for spec, tensor in zip(specs, tensors, strict=True):
            if len(tensor) != spec.nbytes:
                raise RemoteProtocolError("tensor_size_mismatch", f"{len(tensor)} bytes for {spec}")
        return message, tuple(tensors)


to_coordinator: Decoder[ToCoordinator | WeightRequest] = Decoder(ToCoordinator | WeightRequest)
to_worker: Decoder[ToWorker] = Decoder(ToWorker)
to_client: Decoder[ToClient] = Decoder(ToClient)
to_next_worker: Decoder[ToNextWorker | ReadChunk] = Decoder(ToNextWorker | ReadChunk)
to_previous_worker: Decoder[ToPreviousWorker] = Decoder(ToPreviousWorker)
to_reader: Decoder[ToReader] = Decoder(ToReader)

_chat: msgspec.msgpack.Decoder[Chat] = msgspec.msgpack.Decoder(Chat)
_outline: msgspec.msgpack.Decoder[Outline] = msgspec.msgpack.Decoder(Outline)
_members: msgspec.msgpack.Decoder[ClusterMembers] = msgspec.msgpack.Decoder(ClusterMembers)
_digests: msgspec.msgpack.Decoder[TensorDigests] = msgspec.msgpack.Decoder(TensorDigests)
_model: msgspec.msgpack.Decoder[ModelDescription] = msgspec.msgpack.Decoder(ModelDescription)
_model_info: msgspec.msgpack.Decoder[ModelInfo] = msgspec.msgpack.Decoder(ModelInfo)
_status: msgspec.msgpack.Decoder[ClusterStatus] = msgspec.msgpack.Decoder(ClusterStatus)


def encode(message: AnyMessage, tensors: Sequence[Frame] = ()) -> list[Frame]:
    """Return the frames of `message`.

    Raises:
        LocalProtocolError: the header is too long, or `tensors` do not match the message's specs.
    """
    header = _encoder.encode(message)
    if len(header) > MAX_HEADER_BYTES:
        raise LocalProtocolError(f"header of {len(header)} bytes in {type(message).__name__}")
    sizes = [spec.nbytes for spec in getattr(message, "tensors", ())]
    if sizes != [len(tensor) for tensor in tensors]:
        raise LocalProtocolError(f"tensors of {type(message).__name__} do not match their specs")
    return [PREAMBLE, header, *tensors]


def encode_payload(
    value: Chat | ClusterStatus | ClusterMembers | ModelInfo | ModelDescription | TensorDigests,
) -> bytes:
    """Return a value in msgpack that may be too long for a header, for a tensor frame."""
    return _encoder.encode(value)


def decode_chat(payload: Frame) -> Chat:
    """Return the conversation in `payload`.

    Raises:
        RemoteProtocolError: it is none.
    """
    return _decode_payload(_chat, payload)


def decode_status(payload: Frame) -> ClusterStatus:
    """Return the status in `payload`.

    Raises:
        RemoteProtocolError: it is none.
    """
    return _decode_payload(_status, payload)


def decode_model_info(payload: Frame) -> ModelInfo:
    """Return what `payload` says of a served model.

    Raises:
        RemoteProtocolError: it says nothing of one.
    """
    return _decode_payload(_model_info, payload)


def decode_members(payload: Frame) -> ClusterMembers:
    """Return the members of a cluster in `payload`.

    Raises:
        RemoteProtocolError: it holds none.
    """
    return _decode_payload(_members, payload)


def decode_model(payload: Frame) -> ModelDescription:
    """Return the description of a model in `payload`.

    Raises:
        RemoteProtocolError: it holds none.
    """
    return _decode_payload(_model, payload)


def decode_digests(payload: Frame) -> TensorDigests:
    """Return the digests of tensors in `payload`.

    Raises:
        RemoteProtocolError: it holds none.
    """
    return _decode_payload(_digests, payload)


def _decode_payload(decoder: msgspec.msgpack.Decoder[V], payload: Frame) -> V:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise RemoteProtocolError("payload_too_big", f"{len(payload)} bytes")
    return _decode(decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[V], data: Frame) -> V:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as exc:
        raise RemoteProtocolError("bad_field", str(exc)[:512]) from exc
    except (ValueError, RecursionError) as exc:  # all that it raises on bad bytes
        raise RemoteProtocolError("malformed", str(exc)[:512]) from exc


def _outline_of(header: Frame) -> Outline:
    try:
        return _outline.decode(header)
    except (ValueError, RecursionError):  # validation errors are among them
        return Outline()


def _check_preamble(preamble: bytes) -> None:
    if preamble == PREAMBLE:
        return
    if len(preamble) != len(PREAMBLE) or not preamble.startswith(MAGIC):
        raise RemoteProtocolError("bad_magic", repr(preamble))
    raise ProtocolMismatch(
        f"The peer speaks protocol version {preamble[-1]}, this program version "
        f"{PROTOCOL_VERSION}. Install the same release of distributedllm on both machines."
    )
