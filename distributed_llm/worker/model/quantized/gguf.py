"""Decodes tensors of GGUF files: blocks of numbers to integers with scales, all exactly.

Of each type of blocks, the layout is llama.cpp's (`ggml-common.h`, `ggml-quants.c`). The names here
are those of the fields there: `d` and `dmin` scale a whole block, `sc` and `m` a part of it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from distributed_llm.common.gguf_types import GGUF_BLOCKS
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.gguf_grids import GRID_DECODERS, Parts, fields, half

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the 16 codes of IQ4 stand for."""

_MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_MXFP4_ONE = 128

_BITS: Mapping[str, int] = {
    **{"Q2_K": 2, "Q3_K": 3, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5},
    **{"Q6_K": 6, "Q8_0": 8, "IQ4_NL": 8, "IQ4_XS": 8, "MXFP4": 8},
    **{"IQ1_S": 2, "IQ1_M": 8, "IQ2_XXS": 8, "IQ2_XS": 8, "IQ2_S": 8},
    **{"IQ3_XXS": 8, "IQ3_S": 4, "TQ1_0": 2, "TQ2_0": 2},
}
"""Bits of the codes that a type of blocks becomes."""


def decode(blocks: Tensor, kind: str) -> AffineWeight:
    """Return the weight in the blocks of a tensor.

    Args:
        blocks: uint8 [..., out_features, bytes of a row].
        kind: of the blocks, a key of `GGUF_BLOCKS`.
    """
    layout = GGUF_BLOCKS[kind]
    codes, scales, offsets = _DECODERS[kind](blocks.reshape(-1, layout.nbytes))
    rows = blocks.shape[:-1]
    return AffineWeight(
        codes.reshape(*rows, -1), scales.reshape(*rows, -1), offsets.reshape(*rows, -1), _BITS[kind]
    )


def _split(packed: Tensor, parts: int, width: int) -> Tensor:
    """Return the bytes of each block in parts: [blocks, parts, width]."""
    return packed.reshape(-1, parts, width)


def _nibbles(packed: Tensor) -> Tensor:
    """Return the codes of blocks that keep their first half in the low four bits of the bytes."""
    return fields(packed, 4).flatten(1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Return the 32 bits in 4 bytes, shifted to where a fifth bit belongs: [blocks, 32]."""
    return fields(packed, 1).transpose(1, 2).flatten(1) << 4


def _symmetric(codes: Tensor, scales: Tensor, zero: int) -> Parts:
    return codes, scales, scales * -zero


def _q4_0(blocks: Tensor) -> Parts:
    return _symmetric(_nibbles(blocks[:, 2:]), half(blocks, 0), 8)


def _q4_1(blocks: Tensor) -> Parts:
    return _nibbles(blocks[:, 4:]), half(blocks, 0), half(blocks, 2)


def _q5_0(blocks: Tensor) -> Parts:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _symmetric(codes, half(blocks, 0), 16)


def _q5_1(blocks: Tensor) -> Parts:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes, half(blocks, 0), half(blocks, 2)


def _q8_0(blocks: Tensor) -> Parts:
    return _symmetric(blocks[:, 2:] ^ 0x80, half(blocks, 0), 128)


def _q2_k(blocks: Tensor) -> Parts:
    """16 bytes of sc and m, 4 bits each; 64 bytes of codes; d; dmin."""
    parts, codes = blocks[:, :16], _split(blocks[:, 16:80], 2, 32)
    scales = half(blocks, 80) * (parts & 15)
    offsets = -(half(blocks, 82) * (parts >> 4))
    return fields(codes, 2).flatten(1), scales, offsets


def _q3_k(blocks: Tensor) -> Parts:
    """32 bytes of high bits; 64 bytes of low ones; 12 bytes of sc, 6 bits each; d."""
    high, low = blocks[:, :32], _split(blocks[:, 32:96], 2, 32)
    codes = fields(low, 2).flatten(1) | (fields(high, 1) << 2).flatten(1)
    sc_low = fields(blocks[:, 96:104], 4).flatten(1)
    sc_high = fields(blocks[:, 104:108], 2).flatten(1)
    sc = (sc_low | sc_high << 4).float() - 32
    return _symmetric(codes, half(blocks, 108) * sc, 4)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and offsets of the eight groups of a block that begins with d, dmin, sc, m.

    Of sc and m, the first four have 6 bits in a byte; of the last four, 4 bits have a byte
    together, and the other two are above those of the first four.
    """
    first, second, rest = _split(blocks[:, 4:16], 3, 4).unbind(1)
    sc = torch.cat([first & 63, rest & 15 | first >> 6 << 4], dim=1)
    m = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], dim=1)
    return half(blocks, 0) * sc, -(half(blocks, 2) * m)


def _q4_k(blocks: Tensor) -> Parts:
    codes = fields(_split(blocks[:, 16:], 4, 32), 4)
    return codes.flatten(1), *_k_scales(blocks)


def _q5_k(blocks: Tensor) -> Parts:
    low = fields(_split(blocks[:, 48:], 4, 32), 4).flatten(1)
    high = fields(blocks[:, 16:48], 1).flatten(1)
    return low | high << 4, *_k_scales(blocks)


def _q6_k(blocks: Tensor) -> Parts:
    """128 bytes of the low four bits, 64 of the high two; 16 bytes of sc, with a sign; d."""
    low = fields(_split(blocks[:, :128], 2, 64), 4).flatten(1)
    high = fields(_split(blocks[:, 128:192], 2, 32), 2).flatten(1)
    sc = blocks[:, 192:208].view(torch.int8).float()
    return _symmetric(low | high << 4, half(blocks, 208) * sc, 32)


def _iq4_codes(packed: Tensor) -> Tensor:
    levels = torch.tensor(_IQ4_LEVELS, dtype=torch.int16) + 128
    return levels.to(torch.uint8)[packed.long()]


def _iq4_nl(blocks: Tensor) -> Parts:
    return _symmetric(_iq4_codes(_nibbles(blocks[:, 2:])), half(blocks, 0), 128)


def _iq4_xs(blocks: Tensor) -> Parts:
    """D; 2 bytes of the high two bits of eight sc; 4 bytes of their low four; 128 of codes."""
    high = fields(blocks[:, 2:4], 2).transpose(1, 2).flatten(1)
    low = fields(blocks[:, 4:8], 4).transpose(1, 2).flatten(1)
    sc = (low | high << 4).float() - 32
    codes = fields(_split(blocks[:, 8:], 8, 16), 4).flatten(1)
    return _symmetric(_iq4_codes(codes), half(blocks, 0) * sc, 128)


def _mxfp4(blocks: Tensor) -> Parts:
    """An exponent of 2, plus 127; 16 bytes of codes, of twice the numbers that they stand for."""
    exponents = blocks[:, :1].to(torch.int32) - _MXFP4_ONE
    scales = torch.ldexp(torch.ones(exponents.shape), exponents)
    levels = torch.tensor(_MXFP4_LEVELS, dtype=torch.int16) + 128
    return _symmetric(levels.to(torch.uint8)[_nibbles(blocks[:, 1:]).long()], scales, 128)


_DECODERS: Mapping[str, Callable[[Tensor], Parts]] = {
    **{"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0},
    **{"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k},
    **{"IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4},
    **GRID_DECODERS,
}
