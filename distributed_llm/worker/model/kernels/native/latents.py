"""Products of latent attention that stand for keys and values of each head, by the C library."""

from array import array

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.calls import LatentCall, tell
from distributed_llm.worker.model.kernels.native.norms import EIGHT, can_compute

MOST_TOKENS = 16
"""Tokens up to which these are quicker than torch's products."""


def can_multiply(states: Tensor, weight: Tensor, *dims: int) -> bool:
    """Return whether the functions here take these.

    Args:
        states: [heads, tokens, numbers] or [tokens, heads, numbers].
        weight: [heads, key_dim + value_dim, rank].
        dims: numbers that a head has of each kind.
    """
    return (
        can_compute(states)
        and can_compute(weight)
        and weight.is_contiguous()
        and states.numel() <= MOST_TOKENS * len(weight) * states.shape[-1]
        and all(dim % EIGHT == 0 for dim in dims)
    )


def absorbed(queries: Tensor, weight: Tensor, key_dim: int) -> Tensor:
    """Return what scores shared keys and latents as queries score the keys made of them.

    Args:
        queries: bfloat16 [heads, tokens, key_dim + shared_dim]; see `can_multiply`.
        weight: bfloat16 [heads, key_dim + value_dim, rank].
        key_dim: numbers of a key that are made of a latent.

    Returns:
        bfloat16 [heads, tokens, shared_dim + rank].

    Raises:
        MemoryError: there is none for the sums.
    """
    heads, tokens, dim = queries.shape
    shared_dim, (_, both, rank) = dim - key_dim, weight.shape
    queries = queries if queries.stride(2) == 1 else queries.contiguous()
    output = queries.new_empty(heads, tokens, shared_dim + rank)
    steps = queries.stride()[:2]
    sizes = array("q", (heads, tokens, key_dim, shared_dim, both - key_dim, rank, *steps))
    return _computed(LatentCall("absorb_queries", queries, weight, output, sizes))


def values(latents: Tensor, weight: Tensor, key_dim: int) -> Tensor:
    """Return the values that are made of latents.

    Args:
        latents: bfloat16 [tokens, heads, rank]; see `can_multiply`.
        weight: bfloat16 [heads, key_dim + value_dim, rank].
        key_dim: numbers of a key that are made of a latent.

    Returns:
        bfloat16 [tokens, heads, value_dim].

    Raises:
        MemoryError: there is none for latents in float32.
    """
    tokens, heads, rank = latents.shape
    value_dim = weight.shape[1] - key_dim
    latents = latents if latents.stride(2) == 1 else latents.contiguous()
    output = latents.new_empty(tokens, heads, value_dim)
    step, head_step = latents.stride()[:2]
    sizes = array("q", (heads, tokens, key_dim, 0, value_dim, rank, head_step, step))
    return _computed(LatentCall("latent_values", latents, weight, output, sizes))


def _computed(call: LatentCall) -> Tensor:
    if getattr(library.loaded(), call.function)(
        *(call.states.data_ptr(), call.weight.data_ptr(), call.output.data_ptr()),
        *(call.sizes.buffer_info()[0], torch.get_num_threads()),
    ):
        raise MemoryError("no memory for products with latents")
    tell(call)
    return call.output
