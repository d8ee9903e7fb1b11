"""torch's operations for GPUs, made up on the CPU after what their sources say of orders and types.

They have the names and the checks of the real ones, so what calls those can be run without a GPU.
What they cannot show is that the real ones do what their sources say.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from distributed_llm.worker.model.kernels import gpu_check
from distributed_llm.worker.model.kernels.gpu_choice import Gpu
from distributed_llm.worker.model.quantized import linear

GPUS = {
    "cuda": Gpu("cuda", capability=(8, 0)),
    "rocm": Gpu("rocm", architecture="gfx90a"),
    "xpu": Gpu("xpu"),
    "mps": Gpu("mps"),
}

_TILE = 16
"""Columns of a tile of matrix cores."""


@contextmanager
def gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Let the CPU count as a GPU of a kind that has these operations, for weights of integers."""
    with monkeypatch.context() as patch, torch.library._scoped_library("aten", "IMPL") as library:
        patch.setattr(linear, "facts_of", lambda device: GPUS[kind])
        forget(patch)
        operations = _Operations(kind)
        library.impl("_convert_weight_to_int4pack", operations.pack, "CPU")
        library.impl("_weight_int4pack_mm", operations.product, "CPU")
        yield GPUS[kind]


def forget(patch: pytest.MonkeyPatch) -> None:
    """Let no kernel have been tried yet."""
    patch.setattr(gpu_check, "_checked", {})
    patch.setattr(gpu_check, "_used", {})


class _Operations:
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def pack(self, matrix: Tensor, inner: int) -> Tensor:
        """Pack uint8 [n, k / 2] as `_convert_weight_to_int4pack` does."""
        assert matrix.dtype == torch.uint8
        assert matrix.is_contiguous()
        assert inner in (2, 4, 8)
        n, k = matrix.shape[0], 2 * matrix.shape[1]
        if self._kind == "xpu":
            return matrix.view(torch.int32)
        assert k % (_TILE * inner) == 0
        assert n % (16 if self._kind == "rocm" else 8) == 0
        upper, lower = matrix >> 4, matrix & 15
        codes = torch.stack((upper, lower), -1).view(n, k).int()
        rows, columns = self._places(n, k, inner)
        words = torch.zeros(rows.shape[:-1], dtype=torch.int32)
        for at in range(8):
            words |= codes[rows[..., at], columns[..., at]] << 4 * at
        return words.view(n // 8, k // (_TILE * inner), 32, inner // 2)

    def product(self, states: Tensor, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
        """Multiply as `_weight_int4pack_mm` does."""
        assert states.is_contiguous()
        assert packed.is_contiguous()
        assert packed.dtype == torch.int32
        assert pairs.dtype == states.dtype
        if self._kind in ("cuda", "rocm"):
            assert states.dtype == torch.bfloat16
        assert group in (32, 64, 128, 256)
        k = states.shape[1]
        n = packed.shape[0] * (1 if self._kind == "xpu" else 8)
        assert pairs.shape == (k // group, n, 2)
        codes = self._codes(packed, n, k).view(n, k // group, group)
        scales, middles = pairs.float().transpose(0, 1)[:, :, None].unbind(-1)
        weight = ((codes - 8) * scales + middles).view(n, k)
        return (states.float() @ weight.T).to(states.dtype)

    def _codes(self, packed: Tensor, n: int, k: int) -> Tensor:
        if self._kind in ("xpu", "mps"):
            halves = packed.view(torch.uint8).view(n, k // 2)
            return torch.stack((halves & 15, halves >> 4), -1).view(n, k).float()
        rows, columns = self._places(n, k, 2 * packed.shape[3])
        words = packed.reshape(rows.shape[:-1])
        codes = torch.empty(n, k)
        for at in range(8):
            codes[rows[..., at], columns[..., at]] = (words >> 4 * at & 15).float()
        return codes

    def _places(self, n: int, k: int, inner: int) -> tuple[Tensor, Tensor]:
        """Return row and column of each code, [row tiles, column tiles, lanes, words, 8]."""
        lanes, height = (64, 16) if self._kind == "rocm" else (32, 8)
        shape = (n // height, k // (_TILE * inner), lanes, inner // 2, 8)
        tile, outer, lane, word, at = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
        byte = at % 4  # of the four whose upper halves come first, then their lower ones
        base = (outer * inner + 2 * word + byte // 2) * _TILE // 2
        if self._kind == "rocm":
            return tile * 16 + lane % 16, 2 * (base + lane // 16 * 2 + byte % 2) + at // 4
        return tile * 8 + lane // 4, 2 * (base + lane % 4 + 4 * (byte % 2)) + at // 4
