"""Rows of bytes of the KV cache as attention reads them: decoded in pieces, never all at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.worker.kv.coding import RowCoding

_CPU_BYTES = 8 * 1024 * 1024
"""Numbers that are decoded at once on a CPU, bytes: little enough to stay in its caches."""

_DEVICE_BYTES = 256 * 1024 * 1024
"""Elsewhere: enough for the calls to weigh little."""


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Keys and values of one layer that are kept in 8 bits.

    Attributes:
        coding: how.
        key_dim: numbers of a key.
        value_dim: numbers of a value.
        dtype: of the numbers.
    """

    coding: RowCoding
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def rotated(self, queries: Tensor) -> Tensor:
        """Return queries turned as the keys are that they are multiplied by; see `row_scores`."""
        if queries.shape[-1] == self.key_dim:
            return self.coding.rotated(queries)
        of_keys, of_values = queries.tensor_split((self.key_dim,), dim=-1)
        return torch.cat((self.coding.rotated(of_keys), of_values), dim=-1)

    def decoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers of rows; queries have to be rotated as the keys are."""
        return (
            self.coding.decoded(keys, self.key_dim, self.dtype),
            self.coding.decoded(values, self.value_dim, self.dtype),
        )

    def at_once(self, keys: Tensor) -> int:
        """Return how many positions, of rows [..., heads, positions, bytes], to decode at once."""
        limit = _CPU_BYTES if keys.device.type == "cpu" else _DEVICE_BYTES
        position = keys.shape[-3] * (self.key_dim + self.value_dim) * self.dtype.itemsize
        return max(1, limit // position)

    def pieces(self, keys: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield positions [start, stop) in pieces to decode at once."""
        size = self.at_once(keys)
        for first in range(start, stop, size):
            yield first, min(first + size, stop)
