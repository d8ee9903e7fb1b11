"""Modules that hold weights in an order that only their kernels know."""

from abc import ABC, abstractmethod

from torch import nn


class OpaqueWeights(nn.Module, ABC):
    """A module with weights that are no parameters, because nothing can be loaded into them."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of memory that these weights take, including padding; without bias."""

    @abstractmethod
    def tensors(self) -> list[object]:
        """Return what holds these weights, so that they can be freed one by one."""


def packed_nbytes(model: nn.Module) -> int:
    """Return the bytes of memory that the opaque weights of `model` take."""
    return sum(m.weight_bytes for m in model.modules() if isinstance(m, OpaqueWeights))
