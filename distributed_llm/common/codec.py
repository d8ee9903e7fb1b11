"""Messages to frames and back. The only place that knows how bytes are laid out.

A message is `[preamble][header][tensor]...`: five bytes of magic and protocol version, msgpack of
one struct of `messages`, and one raw frame per entry of its field `tensors`. The version stands
before anything that a version may change, so that every version can tell every other from noise.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

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
    ChatMessage,
    ClusterStatus,
    ToClient,
    ToCoordinator,
    ToNextWorker,
    ToPreviousWorker,
    ToWorker,
)
from distributed_llm.common.tensors import Frame, TensorSpec

MAGIC = b"DLLM"
PREAMBLE = MAGIC + bytes([PROTOCOL_VERSION])
MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


class Decoder:
    """Reads the messages of one direction.

    Args:
        union: the messages that may arrive.
    """

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)

    def decode(self, frames: Sequence[Frame]) -> tuple[Any, tuple[Frame, ...]]:
        """Return the message and its tensor frames.

        Raises:
            ProtocolMismatch: the peer speaks another version.
            RemoteProtocolError: for anything else that is not a message of this direction.
        """
        if not 2 <= len(frames) <= 2 + MAX_TENSORS:
            raise RemoteProtocolError("bad_frames", f"{len(frames)} frames")
        preamble, header, *tensors = frames
        _check_preamble(bytes(preamble[: len(PREAMBLE) + 1]))
        if len(header) > MAX_HEADER_BYTES:
            raise RemoteProtocolError("header_too_big", f"{len(header)} bytes")
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


to_coordinator = Decoder(ToCoordinator)
to_worker = Decoder(ToWorker)
to_client = Decoder(ToClient)
to_next_worker = Decoder(ToNextWorker)
to_previous_worker = Decoder(ToPreviousWorker)

_chat: msgspec.msgpack.Decoder[list[ChatMessage]] = msgspec.msgpack.Decoder(Chat)
_status: msgspec.msgpack.Decoder[ClusterStatus] = msgspec.msgpack.Decoder(ClusterStatus)


def encode(message: AnyMessage, tensors: Sequence[Frame] = ()) -> list[Frame]:
    """Return the frames of `message`.

    Raises:
        LocalProtocolError: the header is too long, or `tensors` are not what the message says.
    """
    header = _encoder.encode(message)
    if len(header) > MAX_HEADER_BYTES:
        raise LocalProtocolError(f"header of {len(header)} bytes in {type(message).__name__}")
    sizes = [spec.nbytes for spec in getattr(message, "tensors", ())]
    if sizes != [len(tensor) for tensor in tensors]:
        raise LocalProtocolError(f"tensors of {type(message).__name__} do not match their specs")
    return [PREAMBLE, header, *tensors]


def encode_payload(value: list[ChatMessage] | ClusterStatus) -> bytes:
    """Return msgpack of a value that is too long for a header."""
    return _encoder.encode(value)


def decode_chat(payload: Frame) -> list[ChatMessage]:
    """Return the conversation in `payload`, or raise RemoteProtocolError."""
    return _decode_payload(_chat, payload)


def decode_status(payload: Frame) -> ClusterStatus:
    """Return the status in `payload`, or raise RemoteProtocolError."""
    return _decode_payload(_status, payload)


def _decode_payload(decoder: msgspec.msgpack.Decoder[M], payload: Frame) -> M:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise RemoteProtocolError("payload_too_big", f"{len(payload)} bytes")
    return _decode(decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[M], data: Frame) -> M:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as exc:
        raise RemoteProtocolError("bad_field", str(exc)[:512]) from exc
    except (ValueError, RecursionError) as exc:  # all that a msgpack decoder raises on bad bytes
        raise RemoteProtocolError("malformed", str(exc)[:512]) from exc


def _check_preamble(preamble: bytes) -> None:
    if preamble == PREAMBLE:
        return
    if len(preamble) != len(PREAMBLE) or not preamble.startswith(MAGIC):
        raise RemoteProtocolError("bad_magic", repr(preamble))
    raise ProtocolMismatch(
        f"The peer speaks protocol version {preamble[-1]}, this program version "
        f"{PROTOCOL_VERSION}. Install the same release of distributedllm on both machines."
    )
