"""Products with bfloat16 weights that lie row by row, by the C library."""

from array import array

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.calls import ProductsCall, tell
from distributed_llm.worker.model.kernels.native.experts import NativeWeight


def row_product(
    states: Tensor, weight: Tensor, bias: Tensor | None, instructions: str | None = None
) -> Tensor:
    """Return states @ weight.T + bias, rounded once.

    Args:
        states: bfloat16 [rows, in_features].
        weight: bfloat16 [out_features, in_features].
        bias: bfloat16 [out_features], or None.
        instructions: of the processor, see `library.NAMES`; None: the best it has.

    Raises:
        library.Missing: this machine cannot compute so, or not with numbers of another dtype.
        MemoryError: there is none for the states in float32.
        ValueError: states and weight are not equally wide.
    """
    if states.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        raise library.Missing("only numbers of bfloat16 are multiplied row by row")
    library.check_width(states, weight.shape[1])
    function = library.function("row_products", instructions or library.instructions())
    states = states.contiguous()
    output = states.new_empty(states.shape[0], weight.shape[0])
    table = array("q", _described(weight, bias))
    function(
        *(states.data_ptr(), output.data_ptr(), table.buffer_info()[0], 1),
        *(*states.shape, torch.get_num_threads()),
    )
    tell(ProductsCall(function.name, function.instructions, states, output, table, 1, ()))
    return output


def native_rows(weight: Tensor, bias: Tensor | None) -> NativeWeight:
    """Return a weight [out_features, in_features] with its bias, where they lie now."""
    function = library.function("row_products", library.instructions())
    out_features, in_features = weight.shape
    return NativeWeight(function, (out_features, in_features), 0, _described(weight, bias))


def _described(weight: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    """Return a weight with its bias, as the library reads it."""
    return weight.data_ptr(), 0 if bias is None else bias.data_ptr(), len(weight)
