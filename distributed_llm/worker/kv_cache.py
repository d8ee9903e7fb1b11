"""Keys and values of every sequence in every layer of one stage, and the token ids behind them.

A step is a transaction. `begin` cuts a sequence back to where the step starts and notes its tokens,
`append` writes one layer's keys and values beyond the cut, and only `commit` makes the new
positions count. A step that fails in between leaves positions that no one counts; running it again
overwrites them. So a task may be run twice, or half, and never corrupts a sequence.

Everything of one sequence in one layer lies in two tensors `[heads, capacity, head_dim]`, so that
attention reads it without gathering, and a layer moves to another worker as two slices.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TokenIds = npt.NDArray[np.int32]

_BLOCK = 64
"""Capacity grows in multiples of this many positions."""


class _LayerKV:
    """Keys `[heads, capacity, head_dim]` and values `[heads, capacity, value_dim]`."""

    __slots__ = ("keys", "values")

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values


class _Sequence:
    """What is held of one sequence: `length` positions, in all layers.

    Attributes:
        layers: None where nothing was ever written.
        tokens: [capacity] int32; those below `length` count, those of a running step lie beyond.
    """

    __slots__ = ("layers", "length", "tokens")

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self.layers: list[_LayerKV | None] = [None] * num_layers
        self.tokens: TokenIds = np.empty(0, dtype=np.int32)


class KVCache:
    """The KV cache of one stage.

    Args:
        num_layers: layers of the stage, numbered from 0.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._sequences: dict[int, _Sequence] = {}
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, those not yet filled included."""
        return self._nbytes

    @property
    def sequence_ids(self) -> tuple[int, ...]:
        """The sequences of which anything is held."""
        return tuple(self._sequences)

    def length(self, sequence_id: int) -> int:
        """Return how many positions of the sequence are held in all layers; 0 if unknown."""
        sequence = self._sequences.get(sequence_id)
        return sequence.length if sequence else 0

    def begin(self, sequence_id: int, start: int, token_ids: TokenIds) -> None:
        """Start a step that computes `token_ids` at positions from `start` on.

        Positions from `start` on are forgotten.

        Raises:
            ValueError: positions before `start` are not held.
        """
        sequence = self._sequences.get(sequence_id)
        if start > (sequence.length if sequence else 0):
            raise ValueError(f"sequence {sequence_id} has no position {start - 1}")
        if sequence is None:
            sequence = self._sequences[sequence_id] = _Sequence(self._num_layers)
        sequence.length = start
        stop = start + len(token_ids)
        if stop > len(sequence.tokens):
            grown = np.empty(_capacity_for(stop), dtype=np.int32)
            grown[:start] = sequence.tokens[:start]
            sequence.tokens = grown
        sequence.tokens[start:stop] = token_ids

    def append(
        self, layer: int, sequence_id: int, start: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values from position `start` on; return all up to there.

        Args:
            layer: number of the layer within the stage.
            sequence_id: of a sequence whose step was begun.
            start: where the step starts.
            keys: [heads, tokens, head_dim].
            values: [heads, tokens, value_dim].

        Returns:
            Views [heads, start + tokens, head_dim] and [heads, start + tokens, value_dim]; good
            until the next call for this sequence and layer.
        """
        layers = self._sequences[sequence_id].layers
        stop = start + keys.shape[1]
        held = layers[layer]
        if held is None or stop > held.keys.shape[1]:
            held = layers[layer] = self._grow(held, start, stop, keys, values)
        held.keys[:, start:stop] = keys
        held.values[:, start:stop] = values
        return held.keys[:, :stop], held.values[:, :stop]

    def commit(self, sequence_id: int, length: int) -> None:
        """Count `length` positions of the sequence as held: every layer of the step succeeded."""
        self._sequences[sequence_id].length = length

    def truncate(self, sequence_id: int, length: int) -> None:
        """Forget all positions of the sequence from `length` on; nothing if it has no more."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            sequence.length = min(sequence.length, length)

    def tokens(self, sequence_id: int, length: int) -> TokenIds:
        """Return the first `length` token ids, int32; those of a running step may be among them."""
        return self._sequences[sequence_id].tokens[:length]

    def free(self, sequence_ids: Iterable[int]) -> None:
        """Forget these sequences and give back their memory; unknown ones are passed over."""
        for sequence_id in sequence_ids:
            sequence = self._sequences.pop(sequence_id, None)
            if sequence is not None:
                self._nbytes -= sum(_nbytes(held) for held in sequence.layers if held)

    def _grow(
        self, held: _LayerKV | None, start: int, stop: int, keys: Tensor, values: Tensor
    ) -> _LayerKV:
        capacity = _capacity_for(stop)
        grown = _LayerKV(_empty_like(keys, capacity), _empty_like(values, capacity))
        if held is not None:
            grown.keys[:, :start] = held.keys[:, :start]
            grown.values[:, :start] = held.values[:, :start]
            self._nbytes -= _nbytes(held)
        self._nbytes += _nbytes(grown)
        return grown


def as_token_ids(token_ids: Sequence[int]) -> TokenIds:
    """Return `token_ids` as the int32 array that the cache keeps."""
    return np.asarray(token_ids, dtype=np.int32)


def _capacity_for(positions: int) -> int:
    # A quarter more than is needed: a token is copied four times in all however long its sequence
    # grows, and no more than a fifth of the memory lies idle.
    return -(-(positions + positions // 4) // _BLOCK) * _BLOCK


def _empty_like(states: Tensor, capacity: int) -> Tensor:
    heads, _, head_dim = states.shape
    return torch.empty((heads, capacity, head_dim), dtype=states.dtype, device=states.device)


def _nbytes(held: _LayerKV) -> int:
    return held.keys.nbytes + held.values.nbytes
