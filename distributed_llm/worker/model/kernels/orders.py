"""The orders in which weights of each form may be held on this machine, by name."""

import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.kernels.choice import Choice, Kind
from distributed_llm.worker.model.kernels.int4 import Int4Pack, Int4Rows, channels_of_block
from distributed_llm.worker.model.kernels.int8 import Int8Fbgemm, Int8OneDnn, Int8Rows
from distributed_llm.worker.model.kernels.kleidi import Int4Kleidi
from distributed_llm.worker.model.kernels.layout import Layout
from distributed_llm.worker.model.kernels.native import Int4Blocks, Int8Blocks, instructions
from distributed_llm.worker.model.kernels.packed import (
    CopiedLinear,
    FloatLinear,
    PackedLinear,
    RowLinear,
)

INT8: dict[str, Callable[[Tensor, Tensor], Layout]] = {
    "rows": Int8Rows,
    "fbgemm": Int8Fbgemm,
    "fbgemm 7 bits": lambda codes, scales: Int8Fbgemm(codes, scales, levels=63),
    "onednn": Int8OneDnn,
    "blocks": Int8Blocks,
}
"""Makes a layout of codes int8 [out_features, in_features] and scales float32 [out_features]."""

REPLACES = {"fbgemm 7 bits": "fbgemm"}
"""Orders that are used only where a more accurate one, with the same kernel, computes wrongly."""

INT4: dict[str, Callable[[Tensor, Tensor, Tensor, torch.dtype], Layout]] = {
    "rows": Int4Rows,
    "pack": lambda codes, scales, offsets, dtype: Int4Pack(codes, scales, offsets),
    "blocks": lambda codes, scales, offsets, dtype: Int4Blocks(codes, scales, offsets),
    "kleidi": lambda codes, scales, offsets, dtype: Int4Kleidi(codes, scales, offsets),
}
"""Makes a layout of codes uint8 [out_features, in_features], scales and offsets [.., groups]."""

FLOAT: dict[str, Callable[[nn.Linear], FloatLinear]] = {
    "rows": RowLinear,
    "copied": CopiedLinear,
    "packed": PackedLinear,
}
"""Makes a layer of another one, whose weight it takes."""


def usual(kind: Kind) -> Choice:
    """Return what is used where nothing was measured: by the processor's instructions alone."""
    if kind.form != "float" and instructions() != "none":
        return Choice("blocks", ("native",) * 4)
    if kind.form == "int8":
        if _is_x86() and torch.cpu._is_vnni_supported():
            return Choice("fbgemm", ("fbgemm",) * 4)
        return Choice("rows", ("upcast",) * 4)
    if kind.form == "int4":
        if _is_x86() and channels_of_block() is not None:
            return Choice("pack", ("native", "native", "native", "unpacked bfloat16"))
        return Choice("rows", ("upcast",) * 4)
    if kind.dtype == "bfloat16" and instructions() != "none":
        if torch.cpu._is_avx512_bf16_supported():
            return Choice("copied", ("native", "native", "native", "linear"))
        # Elsewhere than on x86, where that was measured, layers had better be recorded.
        first = "linear" if _is_x86() else "native"
        return Choice("copied", (first, "native", "native", "upcast"))
    if _packing_helps(kind.dtype):
        return Choice("packed", ("padded", "padded", "onednn", "onednn"))
    return Choice("rows", ("linear",) * 4)


def _packing_helps(dtype: str) -> bool:
    """Return whether weights in oneDNN's order are likely to be faster than those of `nn.Linear`.

    They were measured to be, for any number of rows, in float32 with AVX2 or AVX-512, and in
    bfloat16 with AVX512-BF16. A processor that emulates bfloat16 loses with one row what it gains
    with many.
    """
    onednn_here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not _is_x86() or not onednn_here:
        return False
    if dtype == "bfloat16":
        return torch.cpu._is_avx512_bf16_supported()
    return dtype == "float32" and torch.cpu._is_avx2_supported()


def _is_x86() -> bool:
    return platform.machine() in {"x86_64", "AMD64"}
