"""Weights of 8 bits with a scale for each output channel, in the orders that kernels read.

Two of the three multiply integers: they round the states to integers as well, each row by its own
largest value, so that no sequence of a batch spoils another's.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.layout import Kernel, largest, product_in_blocks


class Int8Rows:
    """Codes as they are, row by row.

    Args:
        codes: int8 [out_features, in_features].
        scales: float32 [out_features].
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._codes = codes
        self._scales = scales
        self._scales16 = scales.to(torch.bfloat16)

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernels that read this order."""
        upcast: dict[str, Kernel] = {
            "upcast": lambda states: self._upcast(states, torch.float32),
            "upcast bfloat16": lambda states: self._upcast(states, torch.bfloat16),
        }
        if self._codes.device.type != "cpu" or self._codes.shape[1] % 32:
            return upcast
        return {**upcast, "weight only": self._weight_only}

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self._codes.nbytes + self._scales.nbytes + self._scales16.nbytes

    def tensors(self) -> list[object]:
        """Return codes and scales."""
        return [self._codes, self._scales, self._scales16]

    def _upcast(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        channels, inputs = self._codes.shape
        output = product_in_blocks(
            states.to(dtype),
            (channels, inputs),
            lambda start, stop: self._codes[start:stop],
        )
        return output * self._scales

    def _weight_only(self, states: Tensor) -> Tensor:
        product = torch.ops.aten._weight_int8pack_mm
        output: Tensor = product(states.to(torch.bfloat16), self._codes, self._scales16)
        return output


class Int8Fbgemm:
    """Codes in the order of FBGEMM, whose product is the fastest one for few rows.

    Without VNNI its sums of two products overflow 16 bits, unless states have 7 bits.

    Args:
        codes: int8 [out_features, in_features].
        scales: float32 [out_features].
        levels: magnitude that the largest value of a row is rounded to: 127, or 63.
    """

    def __init__(self, codes: Tensor, scales: Tensor, levels: int = 127) -> None:
        channels, inputs = codes.shape
        self._nbytes = channels * (inputs + 12)
        self._levels = levels
        zeros = torch.zeros(channels, dtype=torch.int64)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():  # torch will have other tensors of integers some day
                warnings.simplefilter("ignore")
                weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
            self._packed: object = torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = engine

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel that reads this order."""
        return {"fbgemm": self._product}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and sums of channels."""
        return self._nbytes

    def tensors(self) -> list[object]:
        """Return the object that holds everything."""
        return [self._packed]

    def _product(self, states: Tensor) -> Tensor:
        most = largest(states)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        levels = self._levels
        output: Tensor = product(states / most, 1 / levels, levels + 1, self._packed)
        return output.mul_(most)


class Int8OneDnn:
    """Codes in the order of oneDNN, whose product is the fastest one for many rows.

    Args:
        codes: int8 [out_features, in_features].
        scales: float32 [out_features].
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scales = scales
        self._nbytes = codes.nbytes + scales.nbytes
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self._half = torch.tensor(128.5)

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel that reads this order."""
        return {"onednn": self._product}

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self._nbytes

    def tensors(self) -> list[object]:
        """Return codes and scales."""
        return [self._packed, self._scales]

    def _product(self, states: Tensor) -> Tensor:
        most = largest(states)
        rounded = torch.addcmul(self._half, states, 127 / most).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise.default
        weight = (self._packed, self._scales, self._zeros, None)
        output: Tensor = product(rounded, 1.0, 128, *weight, 1.0, 0, torch.float32, "none", [], "")
        return output.mul_(most.div_(127))
