"""Makes rows of bytes out of blocks of GGUF, some rows at a time.

All experts of a layer are one tensor, of billions of numbers: as numbers they would take many times
what they become.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distributed_llm.common.weight_forms import WeightForm
from distributed_llm.worker.model.quantized import gguf
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.quantize import quantized
from distributed_llm.worker.model.quantized.rows import row_bytes, to_rows

_AT_ONCE = 1 << 22
"""Numbers that are decoded at a time."""


def rows_of_blocks(
    blocks: Tensor,
    kind: str,
    width: int,
    form: WeightForm,
    check: Callable[[AffineWeight], None],
) -> Tensor:
    """Return the rows of a tensor in `form`, uint8 [..., out_features, row_bytes].

    Args:
        blocks: uint8 [..., out_features, bytes of a row].
        kind: of the blocks, a key of `GGUF_BLOCKS`.
        width: numbers of a row.
        form: that they become; the nearest numbers, if they do not fit it.
        check: is given the integers of each part before they are used; may raise.
    """
    flat = blocks.reshape(-1, blocks.shape[-1])
    made = torch.empty((len(flat), row_bytes(form, width)), dtype=torch.uint8)
    step = max(1, _AT_ONCE // width)
    for start in range(0, len(flat), step):
        part = gguf.decode(flat[start : start + step], kind)
        check(part)
        if not part.fits(form):
            part = quantized(part.dequantized(), form)
        made[start : start + step] = to_rows(part, form)
    return made.view(*blocks.shape[:-1], -1)
