"""Has the layers of a model keep latents instead of keys and values of every head.

In transformers, latent attention makes keys and values of the latent and of the shared part of the
key in one method, `expand_kv`, right before it calls its attention function. Here that method
returns both as they are. The function (`attention`) gets them as the values and the keys of one
head, and computes the same by the matrix that the method would have multiplied by.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.worker.model.kernels.native.latents import absorbed, can_multiply, values

_EXPANSION = "kv_b_proj"
_TRIED_TOKENS = 2
_TOLERANCE = 0.02
"""Of the largest number: bfloat16 rounds by 0.004 of each."""


class LatentExpansion(nn.Module):
    """The matrix that makes keys and values of latents.

    Args:
        linear: the layer that it replaces, with the rows of each head's key and then of its value.
        key_dim: numbers of a head's key that are made of the latent.

    Attributes:
        weight: [heads * (key_dim + value_dim), rank].
        key_dim: as given.
        value_dim: numbers of a head's value.
        rank: numbers of a latent.
    """

    def __init__(self, linear: nn.Linear, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.weight = linear.weight
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.rank = linear.in_features

    def forward(self, latents: Tensor) -> Tensor:
        """Return [..., heads * (key_dim + value_dim)] for latents [..., rank]."""
        return F.linear(latents, self.weight)

    @property
    def heads(self) -> int:
        """How many heads keys and values are made for."""
        return self.weight.shape[0] // (self.key_dim + self.value_dim)

    def absorbed(self, queries: Tensor) -> Tensor:
        """Return what scores shared keys and latents as queries score the keys made of them.

        Args:
            queries: [heads, tokens, key_dim + shared_dim].

        Returns:
            [heads, tokens, shared_dim + rank].
        """
        if can_multiply(queries, self._by_head(), *self._dims, queries.shape[-1]):
            return absorbed(queries, self._by_head(), self.key_dim)
        own, shared = queries.tensor_split((self.key_dim,), dim=-1)
        return torch.cat((shared, torch.bmm(own, self._by_head()[:, : self.key_dim])), dim=-1)

    def values_of(self, attended: Tensor) -> Tensor:
        """Return attended values for attended latents.

        Args:
            attended: [tokens, heads, rank].

        Returns:
            [tokens, heads, value_dim].
        """
        if can_multiply(attended, self._by_head(), *self._dims):
            return values(attended, self._by_head(), self.key_dim)
        # In this order the large matrix is read row by row, as it lies in memory.
        columns = attended.permute(1, 2, 0)
        return torch.bmm(self._by_head()[:, self.key_dim :], columns).permute(2, 0, 1)

    def expanded(self, shared: Tensor, latents: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all heads, with zeros behind them where they are shorter.

        Args:
            shared: [1, positions, shared_dim].
            latents: [1, positions, rank].
            dim: of the result; at least that of keys and of values.

        Returns:
            Keys and values, [heads, positions, dim] each.
        """
        positions = latents.shape[1]
        made = self(latents[0]).view(positions, self.heads, -1).transpose(0, 1)
        keys = made.new_empty((self.heads, positions, dim))
        stop = self.key_dim + shared.shape[-1]
        keys[..., : self.key_dim] = made[..., : self.key_dim]
        keys[..., self.key_dim : stop] = shared
        keys[..., stop:] = 0
        values = made[..., self.key_dim :]
        return keys, F.pad(values, (0, dim - self.value_dim)) if dim > self.value_dim else values

    @property
    def _dims(self) -> tuple[int, int]:
        return self.key_dim, self.value_dim

    def _by_head(self) -> Tensor:
        return self.weight.view(self.heads, -1, self.rank)


def keep_latents(layer: nn.Module) -> None:
    """Have a loaded layer give its latents to its attention function.

    A layer that has no latent attention, as some of Kimi Linear's, is left as it is.

    Raises:
        UnsupportedModel: its attention expands latents in another way.
    """
    for module in list(layer.modules()):
        if hasattr(module, _EXPANSION):
            _replace_expansion(module)


def expansion_of(module: nn.Module) -> LatentExpansion | None:
    """Return what makes keys and values of the latents that an attention module gives; or None."""
    expansion = getattr(module, _EXPANSION, None)
    return expansion if isinstance(expansion, LatentExpansion) else None


def _replace_expansion(module: Any) -> None:
    linear = getattr(module, _EXPANSION)
    if not (isinstance(linear, nn.Linear) and linear.bias is None and hasattr(module, "expand_kv")):
        raise _not_as_expected(module)
    expansion = LatentExpansion(linear, module.qk_nope_head_dim, module.v_head_dim)
    weight = expansion.weight
    made = torch.arange(_TRIED_TOKENS * (expansion.rank + module.qk_rope_head_dim))
    tried = made.sin().to(weight.device, weight.dtype).view(1, 1, _TRIED_TOKENS, -1)
    latents, shared = tried.tensor_split((expansion.rank,), dim=-1)
    with torch.inference_mode():
        expected = module.expand_kv(latents, shared)
        dim = max(states.shape[-1] for states in expected)
        actual = expansion.expanded(shared[0], latents[0], dim)
        alike = all(
            _is_alike(one[..., : other.shape[-1]], other[0])
            for one, other in zip(actual, expected, strict=True)
        )
    if not alike:
        raise _not_as_expected(module)
    setattr(module, _EXPANSION, expansion)
    module.expand_kv = _as_they_are


def _is_alike(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    largest = expected.float().abs().amax()
    # What is not finite is another matter, and is told by who meets it in a step.
    return not bool((actual.float() - expected.float()).abs().amax() > _TOLERANCE * largest)


def _as_they_are(latents: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shared part of the keys, and the latents; what `expand_kv` is replaced by."""
    return shared, latents


def _not_as_expected(module: nn.Module) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(module).__name__} of the installed transformers does not make its keys and values "
        "in the way that this program expects. Install another version (pip install -U "
        "transformers) on every machine, or use another model."
    )
