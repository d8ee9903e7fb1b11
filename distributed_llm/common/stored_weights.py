"""The weights of a model as its files hold them: one tensor each, or several that belong together.

A *scheme* says how to read them: GPTQ, for instance, keeps a matrix as packed integers, scales and
zero points. Pure: what is computed from their numbers is the worker's (`worker/model/quantized`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.weight_forms import WeightForm


class Scheme(Protocol):
    """How weights are kept in files: a frozen value with the parameters that its decoder needs."""

    @property
    def label(self) -> str:
        """What people call it: "GPTQ, 4 bits, groups of 128"."""

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best; None: floating-point numbers."""

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers, but for the rounding of scales."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the model.

    Attributes:
        name: of the weight, as it would be in a file of floating-point numbers
            ("model.layers.0.mlp.up_proj.weight"), or in a GGUF file ("blk.0.ffn_up.weight").
        shape: of its numbers, [..., out_features, in_features] if it is a matrix.
        parts: the tensors that it is made of, by their part in the scheme ("qweight", "scales");
            by "" if it is one tensor.
        scheme: how they are read; None: they are the numbers themselves.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    scheme: Scheme | None = None
