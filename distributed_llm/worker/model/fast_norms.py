"""RMS norms that take one pass over the states; transformers' own take six."""

import inspect

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.kernels.native.norms import NormKind, can_compute, rms_norm

_ROWS = 3
"""Rows of states that a norm is tried with."""

_EQUAL = 0.97
"""Share of numbers that have to be equal: the sum of squares may be rounded in another order."""


class FastNorm(nn.Module):
    """An RMS norm of bfloat16 states, and of the float32 states that some models add up.

    Args:
        weight: bfloat16 [columns].
        epsilon: added to the mean of squares.
        kind: see `rms_norm`.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float, kind: NormKind) -> None:
        super().__init__()
        self.weight = weight
        self._epsilon = epsilon
        self._kind = kind

    def forward(self, states: Tensor) -> Tensor:
        """Return the norm of states [..., columns]."""
        if states.dtype != torch.bfloat16:
            added = self._kind is NormKind.PLUS_ONE
            weight = self.weight.float() + 1 if added else self.weight.float()
            return torch.rms_norm(states, weight.shape, weight.to(states.dtype), self._epsilon)
        return rms_norm(states, self.weight, self._epsilon, self._kind)


def replace_norms(model: nn.Module) -> None:
    """Replace those RMS norms of `model` for which a `FastNorm` is found to compute the same.

    Models have norms of many classes, and not all do what their names say; so each is tried.
    """
    for name, module in list(model.named_modules()):
        if (fast := _fast_norm(module)) is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, fast)


def _fast_norm(module: nn.Module) -> FastNorm | None:
    """Return what computes the same as a norm; None if nothing does."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if not isinstance(epsilon, float) or set(own) != {"weight"} or weight is None:
        return None
    if weight.dim() != 1 or not can_compute(weight) or isinstance(module, FastNorm):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None  # it may be given a gate too
    columns = len(weight)
    states = torch.linspace(-3, 4, _ROWS * columns).view(columns, _ROWS).T.to(weight.dtype)
    with torch.inference_mode():
        try:
            expected = module(states)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return None  # it is a norm of something else
        for kind in NormKind:
            fast = FastNorm(weight, epsilon, kind)
            if isinstance(expected, Tensor) and _same(fast(states), expected):
                return fast
    return None


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two are equal but for roundings of the sum of squares."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    equal = float((actual == expected).float().mean())
    return equal >= _EQUAL and torch.allclose(actual.float(), expected.float(), rtol=2**-7)
