"""Converts torch tensors to frames of a message, and back."""

import torch
from torch import Tensor

from distributed_llm.common.tensors import DtypeName, Frame, TensorSpec

TORCH_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def tensor_of(spec: TensorSpec, frame: Frame) -> Tensor:
    """Return the tensor in a frame, on the CPU; it owns its memory and is writable.

    The frame is copied because it may start at any address, while torch needs aligned memory.
    """
    return torch.frombuffer(bytearray(frame), dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape)


def frame_of(tensor: Tensor) -> tuple[TensorSpec, Frame]:
    """Return spec and frame of a tensor that is not empty; one on the CPU may share its memory."""
    held = tensor.detach().contiguous().cpu()
    spec = TensorSpec(DTYPE_NAMES[held.dtype], tuple(held.shape))
    return spec, held.view(-1).view(torch.uint8).numpy().data
