"""What this machine can give of models' weights: where the bytes of each tensor are."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.model_files import TensorInfo, ends_early, read_header, unreadable


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor are on this machine.

    Attributes:
        file: that holds them.
        offset: of the first one in it.
        nbytes: how many there are.
    """

    file: Path
    offset: int
    nbytes: int


def places_in_file(file: Path, tensors: Iterable[TensorInfo]) -> list[Place]:
    """Return where tensors are in a safetensors file, by the header of that.

    Raises:
        CheckpointError: the file cannot be read, or holds another tensor under one of the names.
    """
    header, places = read_header(file.parent, file.name), []
    for tensor in tensors:
        found = header.get(tensor.name)
        if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            raise CheckpointError(
                f"{file} is another file than the coordinator has opened: {tensor.name} is another "
                "tensor there. Download it again, and start the coordinator again."
            )
        places.append(Place(file, found.offset, found.nbytes))
    return places


class Shelf:
    """The tensors that may be given to others, by their SHA-256. Safe to use from any thread."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._lock = threading.Lock()

    def put(self, sha256: str, place: Place) -> None:
        """Offer a tensor, whose bytes have this SHA-256."""
        with self._lock:
            self._places[sha256] = place

    def clear(self) -> None:
        """Offer nothing any more."""
        with self._lock:
            self._places.clear()

    def read(self, sha256: str, offset: int, length: int) -> bytes | None:
        """Return bytes `[offset, offset + length)` of a tensor; None if it is not offered.

        Raises:
            CheckpointError: its file cannot be read any more, or the tensor is not that long.
        """
        with self._lock:
            place = self._places.get(sha256)
        if place is None:
            return None
        if offset + length > place.nbytes:
            raise CheckpointError(
                f"Bytes {offset} to {offset + length} were asked for of a tensor of {place.nbytes}."
            )
        try:
            with open(place.file, "rb", buffering=0) as file:
                file.seek(place.offset + offset)
                data = file.read(length)
        except OSError as exc:
            raise unreadable(place.file, exc) from exc
        if data is None or len(data) < length:
            raise ends_early(place.file, sha256)
        return data
