"""The messages of a KV cache transfer: pieces, and the manifest that ends it."""

from collections.abc import Iterator, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from distributed_llm.common.messages import MAX_PIECES, KVEnd, KVPieces, StatePart
from distributed_llm.common.tensors import Frame, TensorSpec, frame_of_bytes
from distributed_llm.common.types import Epoch, LayerRange
from distributed_llm.common.wording import size_text
from distributed_llm.worker.kv.held_transfer import Piece
from distributed_llm.worker.kv.manifest import KVManifest, KVTransferError
from distributed_llm.worker.kv.segments import KVLayout
from distributed_llm.worker.kv.state_transfer import StatePiece
from distributed_llm.worker.kv.states import StateLayout
from distributed_llm.worker.kv.transfer import KVPiece
from distributed_llm.worker.tensor_frames import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    frame_of,
    tensor_of,
)

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest message with pieces, bytes: small, for a message or two between tasks delay them."""

_HEADER_BYTES = 64 * 1024
"""Room for the header of such a message, bytes."""

MAX_PIECES_BYTES = MAX_MESSAGE_BYTES - _HEADER_BYTES
"""Keys, values and states in one message at most, bytes."""

MAX_PIECES_SENT = MAX_PIECES // 2
"""Pieces in one message at most: a piece takes up to 44 bytes of the header's 64 KiB."""

MAX_MANIFEST_BYTES = 64 * 1024 * 1024
"""Largest manifest on the wire, bytes: four per position. Decoded it may take much more."""

_manifest: msgspec.msgpack.Decoder[KVManifest] = msgspec.msgpack.Decoder(KVManifest)


def encode_pieces(
    epoch: Epoch, layers: LayerRange, number: int, pieces: Sequence[Piece]
) -> tuple[KVPieces, tuple[Frame, ...]]:
    """Return the message with these pieces, of which there is at least one, and its frames.

    The tensors are copied, so that steps may go on.
    """
    kept = [piece for piece in pieces if isinstance(piece, KVPiece)]
    states = [piece for piece in pieces if isinstance(piece, StatePiece)]
    tensors = [tensor for piece in kept for tensor in (piece.keys, piece.values)]
    tensors += [piece.numbers for piece in states]
    size = sum(piece.nbytes for piece in pieces)
    packed = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    start = 0
    for tensor in tensors:
        stop = start + tensor.nbytes
        if start % tensor.itemsize:
            packed[start:stop] = tensor.contiguous().view(-1).view(torch.uint8)
        else:
            packed[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start = stop
    spec, frame = frame_of(packed)
    message = KVPieces(
        epoch=epoch,
        layers=layers,
        number=number,
        dtype=DTYPE_NAMES[kept[0].keys.dtype if kept else torch.uint8],
        parts=tuple(piece.part for piece in kept),
        states=tuple(piece.part for piece in states),
        tensors=(spec,),
    )
    return message, (frame,)


def decode_pieces(
    message: KVPieces,
    frames: Sequence[Frame],
    layouts: Mapping[int, KVLayout],
    of_states: Mapping[int, StateLayout],
) -> Iterator[Piece]:
    """Yield the pieces of a message, on the CPU; all sizes are checked before the first.

    A sender may compute in another dtype: floating-point numbers become those of the layout. What
    float16 cannot hold becomes infinite there, and fails the sequences that see it.

    Args:
        message: as received.
        frames: as received.
        layouts: of the layers that may come, by their numbers in the model.
        of_states: of the states that may come, likewise.

    Raises:
        KVTransferError: a piece is of another layer, the sizes do not fit the frame, or the numbers
            are of a type that does not become that of the layout.
    """
    frame = _only_frame(message, frames)
    sent = TORCH_DTYPES[message.dtype]
    for part in message.parts:
        if part.layer not in layouts:
            raise KVTransferError(f"layer {part.layer} is not among {sorted(layouts)}")
        _check_dtypes(sent, layouts[part.layer].dtype)
    kept_in = [_check_state(part, of_states) for part in message.states]
    size = sum(
        part.count * layouts[part.layer]._replace(dtype=sent).token_bytes for part in message.parts
    )
    size += sum(part.count * TORCH_DTYPES[part.dtype].itemsize for part in message.states)
    if size != len(frame):
        raise KVTransferError(
            f"{len(message.parts) + len(message.states)} pieces of KV cache have {size} bytes, but "
            f"{len(frame)} came"
        )
    packed = tensor_of(message.tensors[0], frame)
    start = 0
    for part in message.parts:
        layout = layouts[part.layer]
        tensors = []
        for width in (layout.key_dim, layout.value_dim):
            shape = (layout.heads, part.count, width)
            stop = start + layout.heads * part.count * width * sent.itemsize
            numbers = _numbers(packed, start, stop, sent)
            tensors.append(numbers.view(shape).to(layout.dtype))
            start = stop
        yield KVPiece(part, *tensors)
    for state, dtype in zip(message.states, kept_in, strict=True):
        stop = start + state.count * TORCH_DTYPES[state.dtype].itemsize
        numbers = _numbers(packed, start, stop, TORCH_DTYPES[state.dtype])
        yield StatePiece(state, numbers.to(dtype))
        start = stop


def _numbers(packed: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return some bytes as numbers; torch reads them only from multiples of their size on."""
    numbers = packed[start:stop]
    return (numbers.clone() if start % dtype.itemsize else numbers).view(dtype)


def _check_state(part: StatePart, layouts: Mapping[int, StateLayout]) -> torch.dtype:
    """Return the dtype in which a part of a state is kept here."""
    layout = layouts.get(part.layer, ())
    if part.tensor >= len(layout):
        raise KVTransferError(f"layer {part.layer} has no tensor {part.tensor} of a state")
    kept = layout[part.tensor].dtype
    _check_dtypes(TORCH_DTYPES[part.dtype], kept)
    return kept


def _check_dtypes(sent: torch.dtype, kept: torch.dtype) -> None:
    if sent != kept and not (sent.is_floating_point and kept.is_floating_point):
        raise KVTransferError(
            f"the KV cache that arrived is kept as {sent}, but this one as {kept}"
        )


def encode_end(
    epoch: Epoch, layers: LayerRange, number: int, manifest: KVManifest
) -> tuple[KVEnd, tuple[Frame, ...]]:
    """Return the message that ends a transfer, and its frames.

    Raises:
        KVTransferError: the manifest is too large for one message.
    """
    data = msgspec.msgpack.encode(manifest)
    if len(data) > MAX_MANIFEST_BYTES:
        raise KVTransferError(
            f"the manifest of {len(manifest.sequences)} sequences has {size_text(len(data))}, more "
            f"than the {size_text(MAX_MANIFEST_BYTES)} that are sent; they are to be computed again"
        )
    spec, frame = frame_of_bytes(data)
    return KVEnd(epoch=epoch, layers=layers, number=number, tensors=(spec,)), (frame,)


def decode_end(message: KVEnd, frames: Sequence[Frame]) -> KVManifest:
    """Return the manifest in a message; call its `check` before relying on it.

    Raises:
        KVTransferError: it cannot be decoded.
    """
    frame = _only_frame(message, frames)
    if len(frame) > MAX_MANIFEST_BYTES:
        raise KVTransferError(f"another worker's manifest has {size_text(len(frame))}")
    try:
        return _manifest.decode(frame)
    except (
        ValueError,
        RecursionError,
    ) as exc:  # all that a msgpack decoder raises on bad bytes
        raise KVTransferError(
            f"another worker's manifest cannot be read: {str(exc)[:200]}"
        ) from exc


def _only_frame(message: KVPieces | KVEnd, frames: Sequence[Frame]) -> Frame:
    if len(frames) != 1 or message.tensors != (TensorSpec("uint8", (len(frames[0]),)),):
        raise KVTransferError(
            f"{len(frames)} frames came with {message.tensors}; expected is one of uint8"
        )
    return frames[0]
