"""Products of rows of states with the weights that each has chosen, by the C library."""

import itertools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.calls import ExpertsCall, tell

MOST_ROWS = 16
"""Rows of states up to which all that they have chosen is multiplied in one call."""

_FORMS = ("int8_products", "int4_products", "row_products")
"""What multiplies by weights of each form, in the order of products.h."""


class NativeWeight(NamedTuple):
    """A weight that the library multiplies bfloat16 states by.

    Attributes:
        function: of the library.
        shape: [out_features, in_features].
        group: inputs that have a scale in common, for int4; else 0.
        described: addresses and sizes, as the library reads them.
    """

    function: library.Product
    shape: tuple[int, int]
    group: int
    described: tuple[int, int, int]


class ExpertWeights:
    """Weights of one form and size, among which rows of states choose.

    Args:
        weights: not empty. Their memory has to stay as long as this is used.
    """

    def __init__(self, weights: Sequence[NativeWeight]) -> None:
        first = weights[0]
        self._channels, self._inputs = first.shape
        self._form, self._group = _FORMS.index(first.function.name), first.group
        self._function = library.function(
            "expert_products", library.NAMES[first.function.instructions]
        )
        self._table = array("q", itertools.chain.from_iterable(each.described for each in weights))
        self._count = len(weights)

    def products(self, states: Tensor, chosen: Tensor) -> Tensor:
        """Return the product of a row of states for each choice, [choices, out_features].

        Args:
            states: bfloat16 [rows, in_features].
            chosen: int64 [choices], numbers of weights; as many for each row, in the rows' order.

        Raises:
            MemoryError: there is none for what is made on the way.
            ValueError: states and weights are not equally wide.
        """
        library.check_width(states, self._inputs)
        states, chosen = states.contiguous(), chosen.contiguous()
        choices = chosen.shape[0]
        output = states.new_empty(choices, self._channels)
        self._function(
            *(states.data_ptr(), output.data_ptr(), self._table.buffer_info()[0]),
            *(chosen.data_ptr(), self._count, choices, choices // states.shape[0], self._inputs),
            *(self._group, self._form, torch.get_num_threads()),
        )
        tell(
            ExpertsCall(
                *(self._function.instructions, states, output, self._table, self._count),
                *(chosen, self._form, self._group),
            )
        )
        return output


def experts_of(weights: Sequence[NativeWeight | None]) -> ExpertWeights | None:
    """Return these weights together; None if they are not all of one form and size."""
    known = [each for each in weights if each is not None]
    if len(known) < len(weights) or len({each[:3] for each in known}) != 1:
        return None
    return ExpertWeights(known)
