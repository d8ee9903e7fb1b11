"""Decodes blocks of GGUF whose codes are rows of a grid: eight, or four, numbers at once. Exactly.

The layouts are llama.cpp's, as for `gguf`; the grids are those of the `gguf` package. What a row
of a grid stands for is multiplied by signs and by the scale of a part of the block. TQ1 and TQ2 are
here too: three numbers, of which five share a byte, or four.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from gguf import quants
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]
"""Codes uint8 [blocks, numbers]; scales and offsets, float32 [blocks, groups]."""

_BLOCK = 256
_HALF = 128
_IQ1_DELTA = 8
"""Parts of 1 in which IQ1 moves its numbers, up or down."""


@functools.cache
def _grid(kind: str) -> Tensor:
    """Return the grid of a type, int16 [rows, numbers]."""
    known: Any = getattr(quants, kind)
    known.init_grid()
    return torch.from_numpy(known.grid).to(torch.int16).flatten(0, 2)


def half(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 at byte `start` of each block, float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def fields(packed: Tensor, bits: int) -> Tensor:
    """Return the fields of `bits` in bytes [..., width], the lowest first: [..., fields, width]."""
    found = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.stack(found, dim=-2)


def _in_order(packed: Tensor, bits: int) -> Tensor:
    """Return the fields of each byte, one byte after the other: [blocks, fields]."""
    return fields(packed, bits).transpose(-1, -2).flatten(1)


def _words(packed: Tensor, kind: torch.dtype) -> Tensor:
    """Return bytes as integers of more bytes, int64."""
    return packed.contiguous().view(kind).long()


def _signs(bits: Tensor) -> Tensor:
    """Return -1 for each bit that is set in bytes [..., bytes], else 1: int16 [..., bytes, 8]."""
    return 1 - 2 * fields(bits, 1).transpose(-1, -2).to(torch.int16)


def _even_signs(index: Tensor) -> Tensor:
    """Return signs of which seven bits tell the first seven: the number of -1 is even."""
    parity = sum(index >> shift for shift in range(7)) & 1
    return _signs((index | parity << 7).to(torch.uint8))


def _symmetric(values: Tensor, scales: Tensor) -> Parts:
    """Return values from -127 to 127, int16 [blocks, ...], as codes."""
    codes = (values + _HALF).to(torch.uint8).reshape(len(scales), _BLOCK)
    return codes, scales, scales * -_HALF


def _iq2_xxs(blocks: Tensor) -> Parts:
    """D; for each 32 numbers four bytes of rows, and a word: four signs of seven bits, a scale."""
    parts = blocks[:, 2:].reshape(-1, 8, 8)
    words = _words(parts[..., 4:].flatten(1), torch.int32)
    signs = _even_signs(torch.stack([words >> shift & 127 for shift in range(0, 28, 7)], dim=-1))
    values = _grid("IQ2_XXS")[parts[..., :4].long()] * signs
    return _symmetric(values, half(blocks, 0) * (0.5 + (words >> 28 & 15)) * 0.25)


def _iq2_xs(blocks: Tensor) -> Parts:
    """D; 32 words of a row (9 bits) and signs (7); 8 bytes of scales."""
    words = _words(blocks[:, 2:66], torch.int16) & 0xFFFF
    values = _grid("IQ2_XS")[words & 511] * _even_signs(words >> 9)
    return _symmetric(values, half(blocks, 0) * (0.5 + _in_order(blocks[:, 66:], 4)) * 0.25)


def _iq2_s(blocks: Tensor) -> Parts:
    """D; 32 bytes of rows; 32 of signs; 8 of the rows' high two bits; 8 of scales."""
    rows = blocks[:, 2:34].long() | _in_order(blocks[:, 66:74], 2).long() << 8
    values = _grid("IQ2_S")[rows] * _signs(blocks[:, 34:66])
    return _symmetric(values, half(blocks, 0) * (0.5 + _in_order(blocks[:, 74:], 4)) * 0.25)


def _iq3_xxs(blocks: Tensor) -> Parts:
    """D; 64 bytes of rows; for each 32 numbers a word: four signs of seven bits, a scale."""
    words = _words(blocks[:, 66:], torch.int32)
    signs = _even_signs(torch.stack([words >> shift & 127 for shift in range(0, 28, 7)], dim=-1))
    values = _grid("IQ3_XXS")[blocks[:, 2:66].long()].reshape(-1, 8, 4, 8) * signs
    return _symmetric(values, half(blocks, 0) * (0.5 + (words >> 28 & 15)) * 0.5)


def _iq3_s(blocks: Tensor) -> Parts:
    """D; 64 bytes of rows; 8 of their ninth bits; 32 of signs; 4 of scales. All values are odd."""
    rows = blocks[:, 2:66].long() | _in_order(blocks[:, 66:74], 1).long() << 8
    values = _grid("IQ3_S")[rows].reshape(-1, 32, 8) * _signs(blocks[:, 74:106])
    scales = half(blocks, 0) * (1 + 2 * _in_order(blocks[:, 106:], 4).float())
    codes = (values + 15 >> 1).to(torch.uint8).reshape(-1, _BLOCK)
    return codes, 2 * scales, -15 * scales


def _iq1_s(blocks: Tensor) -> Parts:
    """D; 32 bytes of rows; 8 words: the rows' high three bits, a scale, up or down."""
    words = _words(blocks[:, 34:], torch.int16)
    high = torch.stack([words >> shift & 7 for shift in range(0, 12, 3)], dim=-1).flatten(1)
    values = _grid("IQ1_S")[blocks[:, 2:34].long() | high << 8]
    scales = half(blocks, 0) * (2 * (words >> 12 & 7) + 1)
    moved = (1 - 2 * (words >> 15 & 1)) / _IQ1_DELTA
    return (values + 1).to(torch.uint8).reshape(-1, _BLOCK), scales, scales * (moved - 1)


def _iq1_m(blocks: Tensor) -> Parts:
    """32 bytes of rows; 16 of high three bits, and up or down; 4 words: scales, parts of d."""
    words = _words(blocks[:, 48:], torch.int16) & 0xFFFF
    places = torch.arange(0, 16, 4)
    bits = ((words >> 12) << places).sum(dim=1, keepdim=True)
    d = bits.to(torch.int16).view(torch.float16).float()
    high = _in_order(blocks[:, 32:48], 4).long()
    values = _grid("IQ1_S")[blocks[:, :32].long() | (high & 7) << 8]
    moved = _IQ1_DELTA * values + 1 - 2 * (high >> 3)[..., None]
    scales = torch.stack([words >> shift & 7 for shift in range(0, 12, 3)], dim=-1).flatten(1)
    return _symmetric(moved, d * (2 * scales + 1) / _IQ1_DELTA)


def _ternary(codes: Tensor, d: Tensor) -> Parts:
    scales = d.expand(-1, 2)
    return codes.reshape(-1, _BLOCK), scales, -scales


def _tq1_0(blocks: Tensor) -> Parts:
    """48 bytes of five numbers each, 4 of four; d. The numbers are digits to the base 3."""
    found = []
    for start, stop, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        packed = blocks[:, start:stop].to(torch.int16)
        digits = [(packed * 3**place & 255) * 3 >> 8 for place in range(count)]
        found += [digit.to(torch.uint8) for digit in digits]
    return _ternary(torch.cat(found, dim=1), half(blocks, 52))


def _tq2_0(blocks: Tensor) -> Parts:
    """64 bytes of four numbers each; d."""
    return _ternary(fields(blocks[:, :64].reshape(-1, 2, 32), 2), half(blocks, 64))


GRID_DECODERS: Mapping[str, Callable[[Tensor], Parts]] = {
    **{"IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs},
    **{"IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0},
}
"""By the names of types in llama.cpp."""
