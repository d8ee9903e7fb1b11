"""Tensors of torch as they cross the wire."""

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
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def tensor_of(spec: TensorSpec, frame: Frame) -> Tensor:
    """Return the tensor in a frame, on the CPU; it owns its memory and may be written to.

    It is copied because a frame may lie at any address, and numbers may not.
    """
    return torch.frombuffer(bytearray(frame), dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape)


def frame_of(tensor: Tensor) -> tuple[TensorSpec, Frame]:
    """Return a tensor, not empty, as it crosses the wire."""
    held = tensor.detach().contiguous().cpu()
    spec = TensorSpec(_NAMES[held.dtype], tuple(held.shape))
    return spec, held.view(-1).view(torch.uint8).numpy().data
