"""Keys and values in 8 bits: rows of bytes, which hold the codes of one head and their scale.

A row holds what one position has of one head: a code of 8 bits per number, and one scale for all.
The cache keeps, grows and sends rows as it does numbers; who reads them decodes them.

One large number makes the steps between int8 codes wide for all of its row, and the keys of many
models have a few channels that are far larger than the others. So keys are rotated before they
become int8: the large ones are spread over all channels. Queries are rotated alike, which leaves
their products with the keys as they were. (QuaRot: Ashkboos et al., 2024.) fp8 has relative steps,
so large numbers do no harm to small ones, and rotated ones would be coarser.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.common.kv_dtypes import KVDtype, kv_row_bytes

_LARGEST: dict[KVDtype, float] = {"int8": 127.0, "fp8": 448.0}
_LEAST_SCALE = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True)
class _Bits:
    """Where the bits of fp8, with its sign copied to the left, are in a wider type of 16 bits.

    Attributes:
        dtype: the wider type.
        shift: to the left.
        kept: the bits that count then.
        factor: makes up for the bias of the exponents, which is 7 in fp8.
    """

    dtype: torch.dtype
    shift: int
    kept: int
    factor: float


_FLOAT16 = _Bits(torch.float16, 7, 0xBFFF - 0x10000, 2.0**8)
_BFLOAT16 = _Bits(torch.bfloat16, 4, 0x87F0 - 0x10000, 2.0**120)


@dataclass(frozen=True)
class RowCoding:
    """How numbers become rows of bytes, and rows of bytes numbers.

    Attributes:
        kv_dtype: of the codes; not auto.
    """

    kv_dtype: KVDtype

    def rotated(self, states: Tensor) -> Tensor:
        """Return queries or keys, [..., dim], so that their products stay what they were."""
        turn = self.rotation(states.shape[-1], states.device)
        if turn is None:
            return states
        return torch.matmul(states.float(), turn).to(states.dtype)

    def turned_back(self, states: Tensor) -> Tensor:
        """Return what was turned by `rotated`."""
        turn = self.rotation(states.shape[-1], states.device)
        if turn is None:
            return states
        return torch.matmul(states.float(), turn.T).to(states.dtype)

    def rotation(self, dim: int, device: torch.device) -> Tensor | None:
        """Return the matrix, float32 [dim, dim], by which queries and keys are turned, if any."""
        return _rotation(dim, device) if self.kv_dtype == "int8" else None

    def encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows, uint8 [..., row bytes], of keys and of values, [..., dim]."""
        keys = self.rotated(keys)
        if keys.shape != values.shape:
            return self._rows(keys), self._rows(values)
        rows = self._rows(torch.stack((keys, values)))  # few calls: a token is encoded in each step
        return rows[0], rows[1]

    def decoded(self, rows: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Return the numbers of rows, [..., dim]; those of keys are rotated."""
        scales = rows[..., dim + dim % 2 :].view(torch.bfloat16).to(dtype)
        codes = rows[..., :dim]
        if self.kv_dtype == "int8":
            return codes.view(torch.int8).to(dtype).mul_(scales)
        if rows.device.type != "cpu":
            return codes.view(torch.float8_e4m3fn).to(dtype).mul_(scales)
        # Ten times as fast as torch's own way. With the factor of bfloat16, scales become infinite
        # where numbers are larger than any of float16: such steps fail.
        bits = _BFLOAT16 if dtype == torch.bfloat16 else _FLOAT16
        wider = codes.view(torch.int8).to(torch.int16)
        wider.bitwise_left_shift_(bits.shift).bitwise_and_(bits.kept)
        return wider.view(bits.dtype).to(dtype).mul_(scales * bits.factor)

    def _rows(self, states: Tensor) -> Tensor:
        dim = states.shape[-1]
        largest = _LARGEST[self.kv_dtype]
        states = states.float()
        # What is not finite makes a scale that is not, so that it is noticed as ever.
        sizes = states.abs().amax(dim=-1, keepdim=True)
        scales = sizes.div_(largest).clamp_(min=_LEAST_SCALE).to(torch.bfloat16)
        codes = (states / scales.float()).clamp_(-largest, largest)
        kept = (
            codes.round_().to(torch.int8)
            if self.kv_dtype == "int8"
            else codes.to(torch.float8_e4m3fn)
        )
        rows = torch.zeros(
            (*states.shape[:-1], kv_row_bytes(dim, 1, self.kv_dtype)),
            dtype=torch.uint8,
            device=states.device,
        )
        rows[..., :dim] = kept.view(torch.uint8)
        rows[..., dim + dim % 2 :] = scales.view(torch.uint8)
        return rows


def coding_of(kv_dtype: KVDtype) -> RowCoding | None:
    """Return how keys and values become rows of bytes; None if they stay numbers."""
    return None if kv_dtype == "auto" else RowCoding(kv_dtype)


@functools.cache
def _rotation(dim: int, device: torch.device) -> Tensor:
    """Return an orthogonal matrix, float32 [dim, dim], the same on all machines.

    It is a cosine transform, after half of the channels have changed their sign: numbers that are
    alike in all channels would gather in one.
    """
    channels = torch.arange(dim, dtype=torch.float64)
    matrix = torch.cos(math.pi / dim * (channels[:, None] + 0.5) * channels) * math.sqrt(2 / dim)
    matrix[:, 0] *= math.sqrt(0.5)
    signs = [-1.0 if channel * 0x9E3779B1 >> 15 & 1 else 1.0 for channel in range(dim)]
    return (torch.tensor(signs, dtype=torch.float64)[:, None] * matrix).float().to(device)
