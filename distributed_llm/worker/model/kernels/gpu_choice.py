"""Which kernels a GPU is offered for a weight of integers, the best one first. Pure.

What is offered follows from facts alone: those of the device, and those of the weight. It is what
torch's sources say that each operation takes (`aten/src/ATen/native`: `cuda/int4mm.cu`,
`cuda/int8mm.cu`, `mps/operations/Quantized.mm`, `mps/kernels/Quantized.metal`; for XPU those of
`torch-xpu-ops`). Nobody has run them for this project, so an offer is tried on the device before it
is taken (`gpu_check`), and the last one, blocks of floating-point numbers, needs nothing special.
"""

from dataclasses import dataclass
from typing import Literal

from distributed_llm.worker.model.kernels.choice import ROWS, Choice

BLOCKS = Choice("rows", ("blocks",) * len(ROWS))
"""What any device can do: some channels at a time become floating-point numbers."""

_FIRST_BFLOAT16 = (8, 0)
"""NVIDIA's capability from which on its kernel is built: those whose cores multiply bfloat16."""

_CDNA2 = ("gfx90a", "gfx942", "gfx950")
"""AMD's architectures that the kernel is built for."""

_GROUPS = (32, 64, 128, 256)
"""Sizes of groups that the kernels for 4 bits are built for."""

_DTYPES = ("float32", "float16", "bfloat16")

_METAL_SIDE = 32
"""Both sides of a weight of 8 bits have to be multiples of this on an Apple GPU."""


@dataclass(frozen=True)
class Gpu:
    """What is known of a device.

    Attributes:
        kind: "cuda" (NVIDIA), "rocm" (AMD), "xpu" (Intel), "mps" (Apple); else any other name.
        capability: of NVIDIA's.
        architecture: of AMD's, without what follows its name ("gfx90a").
    """

    kind: str
    capability: tuple[int, int] = (0, 0)
    architecture: str = ""


@dataclass(frozen=True)
class Integers:
    """What is known of a weight.

    Attributes:
        form: of its codes.
        out_features: its rows.
        in_features: its columns; a multiple of `group`.
        group: columns that share a scale; 0: all of them.
        dtype: of the states that it is multiplied by, without "torch.".
    """

    form: Literal["int8", "int4"]
    out_features: int
    in_features: int
    group: int
    dtype: str


def offers(gpu: Gpu, weight: Integers) -> tuple[Choice, ...]:
    """Return orders and kernels for a weight, from the best to the one that always does."""
    best = _int4(gpu, weight) if weight.form == "int4" else _int8(gpu, weight)
    return (BLOCKS,) if best is None else (best, BLOCKS)


def inner_tiles(in_features: int) -> int:
    """Return how many tiles of 16 columns `_convert_weight_to_int4pack` may lay side by side.

    It takes 8, 4 or 2, which have to divide the columns; with 8, a thread reads 16 bytes at once.

    Args:
        in_features: a multiple of 32.
    """
    return next(count for count in (8, 4, 2) if in_features % (16 * count) == 0)


def channel_multiple(gpu: Gpu) -> int:
    """Return what the rows of a weight of 4 bits are padded to a multiple of.

    A tile is 8 rows high on NVIDIA's and Apple's GPUs, and 16 on AMD's and Intel's.
    """
    return 16 if gpu.kind in ("rocm", "xpu") else 8


def _int4(gpu: Gpu, weight: Integers) -> Choice | None:
    """Return the order and kernels of `_weight_int4pack_mm`, if the device has it.

    NVIDIA's multiplies bfloat16 only, so states of float32 are left to blocks, which round nothing;
    those of float16 lose three of eleven bits, less than the weight's own rounding. Apple's reads
    the whole weight again for each row of states, so prompts are left to blocks, which read the
    same order.
    """
    if weight.group not in _GROUPS or weight.dtype not in _DTYPES:
        return None
    packed = Choice("tiles", ("int4pack",) * len(ROWS))
    match gpu.kind:
        case "cuda" if gpu.capability >= _FIRST_BFLOAT16 and weight.dtype != "float32":
            return packed
        case "rocm" if gpu.architecture in _CDNA2 and weight.dtype != "float32":
            return packed
        case "xpu":
            return packed
        case "mps":
            return Choice("rows", ("int4pack", "int4pack", "blocks", "blocks"))
    return None


def _int8(gpu: Gpu, weight: Integers) -> Choice | None:
    """Return the order and kernels of `_weight_int8pack_mm`, if the device has it.

    On CUDA and ROCm it computes each number of the result by itself, so it reads the weight again
    for each row of states: it is for few rows.
    """
    if weight.dtype not in _DTYPES:
        return None
    sides = (weight.out_features, weight.in_features)
    match gpu.kind:
        case "cuda" | "rocm":
            return Choice("rows", ("int8pack", "int8pack", "blocks", "blocks"))
        case "xpu":
            return Choice("rows", ("int8pack",) * len(ROWS))
        case "mps" if not any(side % _METAL_SIDE for side in sides):
            return Choice("rows", ("int8pack",) * len(ROWS))
    return None
