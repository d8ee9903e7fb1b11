"""Attention over a part of the positions, and the sum of such parts.

A part's result comes with the logarithm of the sum of the exponents of its scores (lse). So parts
are put together exactly, and an attention sink, which is a score without a value, is added.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

_FEW_BYTES = 1024 * 1024
"""Keys and values for which the calls of products take longer than the fused kernel, bytes."""

_MAX_ROUNDED = 16.0
"""Scores that bfloat16 holds well enough: it rounds them by 1/32 at most."""

_LARGE = 2**16
"""Numbers of a matrix for which one more call weighs little."""

_MUCH_FASTER = 1.2
_ROUNDS = 5


class Partial(NamedTuple):
    """Attention over some positions.

    Attributes:
        attended: [..., value_dim].
        lse: float32 [...]; None where nobody needs it.
    """

    attended: Tensor
    lse: Tensor | None


def fused(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    hidden: Tensor | None,
    *,
    is_causal: bool = False,
) -> Partial:
    """Compute attention with torch's fused kernel for CPUs.

    Args:
        queries: [batch, heads, tokens, dim].
        keys: [batch, heads, positions, dim].
        values: [batch, heads, positions, dim].
        scale: factor of the scores.
        hidden: added to the scores, in their dtype; may be expanded to their shape.
        is_causal: whether token i attends to the first i + 1 positions only.
    """
    attended, lse = _flash(queries, keys, values, 0.0, is_causal, attn_mask=hidden, scale=scale)
    return Partial(attended, lse)


def scores_of(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the scores of few queries of each of many heads, [heads, positions, tokens].

    They are rounded to their dtype; see `rounds_too_much`.

    Args:
        queries: [heads, tokens, dim], multiplied by the scale already; as in `row_scores`.
        keys: [heads, positions, key_dim].
        values: [heads, positions, value_dim].
    """
    if queries.shape[-1] > keys.shape[-1]:
        return row_scores(queries, keys, values).transpose(1, 2)
    # In this order the large matrix is read row by row, as it lies in memory.
    return torch.bmm(keys, queries.transpose(1, 2))


def row_scores(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the scores of queries, [heads, tokens, positions].

    Those of latents are float32 where their dtype would round them too much.

    Args:
        queries: [heads, tokens, key_dim]; or [heads, tokens, key_dim + value_dim], of which the
            rest is multiplied by the values, which are latents (`latents`).
        keys: [heads, positions, key_dim].
        values: [heads, positions, value_dim].
    """
    of_keys, of_values = queries.tensor_split((keys.shape[-1],), dim=-1)
    if not of_values.shape[-1]:
        return torch.matmul(queries, keys.transpose(1, 2))
    scores = _products(of_values, values.transpose(1, 2))
    scores += _products(of_keys, keys.transpose(1, 2))
    if not rounds_too_much(scores):
        return scores
    return row_scores(queries.float(), keys.float(), values.float())


def rounds_too_much(scores: Tensor) -> bool:
    """Return whether scores are so large that their dtype makes other weights of them."""
    if scores.dtype == torch.float32:
        return False
    lowest, highest = torch.stack(torch.aminmax(scores)).tolist()  # a GPU is waited for once
    return bool(max(highest, -lowest) > _MAX_ROUNDED)


def weighted(scores: Tensor, values: Tensor, softcap: float | None, *, with_lse: bool) -> Partial:
    """Return attention by its scores, minus infinity where a position does not count.

    Args:
        scores: [heads, positions, tokens]; they are overwritten.
        values: [heads, positions, value_dim].
        softcap: as in `Scoring`.
        with_lse: whether lse is needed.
    """
    if softcap is not None:
        hidden = scores.isneginf()
        scores = scores.div_(softcap).tanh_().mul_(softcap).masked_fill_(hidden, float("-inf"))
    if not with_lse:
        weights = torch.softmax(scores.transpose(1, 2), dim=-1).to(values.dtype)
        return Partial(_products(weights, values), None)
    weights = torch.softmax(scores.transpose(1, 2), dim=-1, dtype=torch.float32)
    # The largest weight is exp(largest score - lse).
    lse = scores.amax(dim=1).float() - weights.amax(dim=-1).log()
    return Partial(_products(weights.to(values.dtype), values), lse)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return [n, rows, columns], the product of each of n pairs of matrices.

    Large ones are multiplied one after the other on a CPU: of many at once, in other dtypes than
    float32, oneDNN copies what does not lie in one piece, and what is transposed it reads slowly.
    """
    count, rows, columns = len(left), left.shape[1], right.shape[2]
    large = right[0].numel() >= _LARGE and left.device.type == "cpu"
    if not large or left.dtype == torch.float32:
        return torch.bmm(left, right)
    products = left.new_empty((count, rows, columns))
    for one, two, product in zip(left, right, products, strict=True):
        torch.mm(one, two, out=product)
    return products


def products_are_faster(dtype: torch.dtype, shape: tuple[int, ...], queries: int) -> bool:
    """Return whether products (`scores_of`, `weighted`) are to be preferred over `fused`.

    Args:
        dtype: of all tensors.
        shape: of the keys, [batch, heads, positions, dim].
        queries: of each head.
    """
    batch, heads, positions, dim = shape
    if batch == 1:
        return False
    if dtype == torch.float32:
        return True
    nbytes = 2 * batch * heads * positions * dim * dtype.itemsize
    return nbytes >= _FEW_BYTES and _measured(dtype, heads, queries, dim)


@functools.cache
def _measured(dtype: torch.dtype, heads: int, queries: int, dim: int) -> bool:
    """Return whether products are much faster on this machine; takes some milliseconds."""
    batch, positions = 8, 256
    keys = torch.ones((batch, heads, positions, dim), dtype=dtype)
    tokens = torch.ones((batch, heads, queries, dim), dtype=dtype)
    each, of_each = keys.flatten(0, 1), tokens.flatten(0, 1)
    of_fused = _least_s(lambda: fused(tokens, keys, keys, 1, None))
    of_products = _least_s(
        lambda: weighted(scores_of(of_each, each, each), each, None, with_lse=False)
    )
    return of_fused > _MUCH_FASTER * of_products


def _least_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        began = time.thread_time()  # others that use the processor do not count
        run()
        times.append(time.thread_time() - began)
    return min(times)


def merged(attended: Tensor, lse: Tensor) -> Partial:
    """Put parts together.

    Args:
        attended: [parts, ..., value_dim].
        lse: float32 [parts, ...]; minus infinity where there is no such part.
    """
    weights = torch.softmax(lse, dim=0)
    total = (attended * weights[..., None]).sum(dim=0)
    return Partial(total.to(attended.dtype), torch.logsumexp(lse, dim=0))


def with_sinks(part: Partial, sinks: Tensor) -> Tensor:
    """Return attention that a sink shares, of which `sinks` has the logits, as `part.lse`."""
    assert part.lse is not None
    kept = torch.sigmoid(part.lse - sinks.float())
    return (part.attended * kept[..., None]).to(part.attended.dtype)
