"""Layers that are called with the same states, one after another: computed in one call.

Such are the projections of queries, keys and values of one attention, or gate and up of one MLP. A
call for each takes as long as a small product, most of it Python's and the start of threads.

Which layers these are is not told by their names, which are of many kinds, but seen: a model calls
one after another with one and the same tensor. From then on the first one that gets new states
computes for all, and the others take their products. So a model's own code runs unchanged.
"""

import weakref
from collections.abc import Sequence

from torch import Tensor

from distributed_llm.worker.model.kernels.native import Blocks, JointProduct

_MOST_ROWS = 64
"""With more rows of states a call is nothing beside a product, and outputs are large to keep."""


class SharedStates:
    """Products of a few layers that may be called with the same states.

    Stages in several threads may use the same layers: products are kept together with the tensor
    that they were made from, and a layer that is called with another tensor is computed alone.

    Args:
        weights: of the layers, whose states may be shared: `Blocks.alike` is the same.
    """

    def __init__(self, weights: Sequence[Blocks]) -> None:
        self._weights = weights
        self._together: dict[int, tuple[list[int], JointProduct]] = {}  # by who is called first
        self._latest: tuple[weakref.ref[Tensor], int] | None = None
        self._made: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def product(self, number: int, states: Tensor) -> Tensor:
        """Return the product [rows, out_features] of a layer with states [..., in_features].

        Args:
            number: of the layer's weight.
            states: at least one row.
        """
        made = self._made
        if made is not None and made[0] is states:
            own = made[2].pop(number, None)
            if not made[2]:
                self._made = None
            if own is not None:
                return own
        rows = states.reshape(-1, states.shape[-1])
        if rows.shape[0] > _MOST_ROWS:
            return self._weights[number].kernels()["native"](rows)
        if made is not None:
            self._forget(made[1])
            self._made = None
        together = self._together.get(number)
        if together is None:
            self._learn(number, states)
            return self._weights[number].kernels()["native"](rows)
        numbers, product = together
        first, *others = product(rows)
        self._made = states, number, dict(zip(numbers[1:], others, strict=True))
        return first

    def _learn(self, number: int, states: Tensor) -> None:
        """See which layer was called before this one with the same states."""
        latest = self._latest
        if latest is None or latest[0]() is not states or latest[1] == number:
            self._latest = weakref.ref(states), number
            return
        numbers, _ = self._together.get(latest[1], ([latest[1]], None))
        if number not in numbers:
            numbers = [*numbers, number]
            joint = JointProduct([self._weights[each] for each in numbers])
            self._together[latest[1]] = numbers, joint

    def _forget(self, first: int) -> None:
        """Compute this layer alone from now on: another one did not take its product."""
        self._together.pop(first, None)
