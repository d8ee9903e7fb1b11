"""Weights on their way from the files into a model: what transformers' loader slices.

Floating-point numbers come as they are, whatever the files hold. Integers with scales may come as
rows of bytes instead (`quantized/rows`), in a form that kernels compute with.
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.gguf_types import GgufScheme
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import WeightForm
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.decoding import decoded, shape_of
from distributed_llm.worker.model.quantized.gguf_rows import rows_of_blocks
from distributed_llm.worker.model.quantized.quantize import quantized
from distributed_llm.worker.model.quantized.rows import to_rows
from distributed_llm.worker.model.quantized.targets import Target
from distributed_llm.worker.model.tensor_files import TensorReader

_NOWHERE = torch.device("meta")


@dataclass(frozen=True)
class Piece:
    """A weight of the files that is a tensor of the model, or some rows of one.

    Attributes:
        weight: as the files hold it.
        target: what becomes of it, if it is of a GGUF file.
    """

    weight: StoredWeight
    target: Target | None = None

    @property
    def keeps_rows(self) -> bool:
        """Whether its rows are those of the tensor, but for their order."""
        return self.target is None or self.target.convert is None


@dataclass(frozen=True)
class Entry:
    """A tensor by the name that transformers' loader knows it by.

    Attributes:
        name: as in a checkpoint of floating-point numbers.
        pieces: that it is made of; they follow each other along the rows, unless their target says
            otherwise.
    """

    name: str
    pieces: tuple[Piece, ...]

    @property
    def lies_as_in_files(self) -> bool:
        """Whether its matrices are [.., out_features, in_features], whatever the model wants."""
        return all(piece.target is not None and piece.keeps_rows for piece in self.pieces)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return what the values, or rows of bytes, of all pieces make."""
        target = self.pieces[0].target
        if target is not None:
            return target.joined(values)
        return values[0] if len(values) == 1 else torch.cat(list(values), dim=-2)


class WeightReader:
    """Reads weights and decodes them, one quantized weight at a time; may be used by many threads.

    Args:
        tensors: reads the tensors that weights are made of.
    """

    def __init__(self, tensors: TensorReader) -> None:
        self._tensors = tensors
        self._decoding = threading.Lock()

    def of_shapes(self, *, here: bool = True) -> "ShapeReader":
        """Return a reader of what weights look like, not of what is in them.

        Args:
            here: the files are on this machine, so that small parts can be read.
        """
        return ShapeReader(self._tensors, here=here)

    def plain(self, weight: StoredWeight) -> Tensor:
        """Return a weight that is not quantized."""
        return self._tensors.read(weight.parts[""])

    def floats(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Return the numbers of a piece, large ones in `dtype`."""
        with self._decoding:
            values = self._decoded(piece.weight)
            if piece.target is not None and piece.target.convert is not None:
                dtype = torch.float32
            if isinstance(values, AffineWeight):
                values = values.dequantized(dtype)
            elif piece.weight.scheme is not None:
                values = values.to(dtype)
            if piece.target is None:
                return values
            return piece.target.values(values.float() if piece.target.convert else values)

    def rows(self, piece: Piece, form: WeightForm) -> tuple[Tensor, Tensor | None]:
        """Return the rows of a quantized piece in `form`, and the order of its inputs if any.

        Numbers that do not fit the form become the nearest ones.
        """
        stored = piece.weight
        with self._decoding:
            if isinstance(stored.scheme, GgufScheme):
                assert piece.target is not None
                blocks, kind = self._tensors.read(stored.parts[""]), stored.scheme.kind
                check = functools.partial(_check_finite, stored)
                rows = rows_of_blocks(blocks, kind, stored.shape[-1], form, check)
                return piece.target.ordered(rows), None
            weight = self._decoded(stored)
            if isinstance(weight, Tensor):
                weight = quantized(weight, form)
            elif not weight.fits(form):
                weight = quantized(weight.dequantized(), form)
            rows = to_rows(weight, form)
            ordered = rows if piece.target is None else piece.target.ordered(rows)
            return ordered, weight.input_order

    def _decoded(self, weight: StoredWeight) -> AffineWeight | Tensor:
        parts: Mapping[str, Tensor] = {
            name: self._tensors.read(info) for name, info in weight.parts.items()
        }
        value = decoded(weight, parts)
        if weight.scheme is not None:
            _check_finite(weight, value)
        return value


def _check_finite(weight: StoredWeight, value: AffineWeight | Tensor) -> None:
    """Refuse a quantized weight some of whose numbers are none: its file is damaged.

    Raises:
        CheckpointError: with the file.
    """
    numbers = [value] if isinstance(value, Tensor) else [value.scales, value.offsets]
    if all(bool(torch.isfinite(part).all()) for part in numbers):
        return
    files = sorted({part.file for part in weight.parts.values()})
    raise CheckpointError(
        f"{weight.name} in {', '.join(files)} is damaged: its scales are not finite numbers. "
        "Copy or download the model again."
    )


class ShapeReader(WeightReader):
    """Returns tensors of the right shape that hold nothing."""

    def __init__(self, tensors: TensorReader, *, here: bool) -> None:
        super().__init__(tensors)
        self._read = tensors.read if here else None

    def plain(self, weight: StoredWeight) -> Tensor:
        """Return a tensor as large as a weight."""
        return torch.empty(weight.shape, dtype=torch.bfloat16, device=_NOWHERE)

    def floats(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Return a tensor as large as a piece."""
        shape = shape_of(piece.weight, self._read)
        if piece.target is None:
            return torch.empty(shape, dtype=dtype, device=_NOWHERE)
        if piece.target.convert is None:
            return piece.target.ordered(torch.empty(shape, dtype=dtype, device=_NOWHERE))
        return piece.target.convert(torch.zeros(shape)).to(_NOWHERE)


class Floats:
    """An entry as floating-point numbers.

    Args:
        reader: of its pieces.
        entry: to be read.
        dtype: of quantized numbers and of tables; others have that of the files.
        transposed: the model holds matrices as [.., in_features, out_features].
    """

    def __init__(
        self, reader: WeightReader, entry: Entry, dtype: torch.dtype, *, transposed: bool
    ) -> None:
        self._reader = reader
        self._entry = entry
        self._dtype = dtype
        self._transposed = transposed

    def __getitem__(self, index: Any) -> Tensor:
        pieces = self._entry.pieces
        if len(pieces) > 1 and all(piece.target is None for piece in pieces):
            return self._one_by_one()[index]
        joined = self._entry.joined([self._values(piece) for piece in pieces])
        if self._transposed and self._entry.lies_as_in_files:
            joined = joined.transpose(-1, -2)
        return joined[index]

    def _one_by_one(self) -> Tensor:
        """Return pieces that are rows of a table, in `dtype`; one at a time is in memory twice."""
        pieces = self._entry.pieces
        values = self._values(pieces[0])
        rows = [piece.weight.shape[0] for piece in pieces]
        joined = values.new_empty((sum(rows), *values.shape[1:]), dtype=self._dtype)
        for place, piece in zip(torch.split(joined, rows), pieces, strict=True):
            place.copy_(values if piece is pieces[0] else self._values(piece))
        return joined

    def _values(self, piece: Piece) -> Tensor:
        if piece.weight.scheme is None and piece.target is None:
            return self._reader.plain(piece.weight)
        values = self._reader.floats(piece, self._dtype)
        if self._transposed and piece.weight.scheme is not None and piece.target is None:
            return values.transpose(-1, -2)
        return values


class Rows:
    """An entry as rows of bytes.

    Args:
        reader: of its pieces.
        entry: to be read.
        form: of its integers.
        orders: is told, by the entry's name, in which order its inputs are.
    """

    def __init__(
        self, reader: WeightReader, entry: Entry, form: WeightForm, orders: dict[str, Tensor]
    ) -> None:
        self._reader = reader
        self._entry = entry
        self._form = form
        self._orders = orders

    def __getitem__(self, index: Any) -> Tensor:
        pieces = []
        for piece in self._entry.pieces:
            rows, order = self._reader.rows(piece, self._form)
            pieces.append(rows)
            if order is not None:
                self._orders[self._entry.name] = order
        return self._entry.joined(pieces)[index]
