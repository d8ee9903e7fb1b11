"""Attention of many runs of queries, each over a run of positions of its own, by torch's kernel.

`torch.nn.attention.varlen.varlen_attn` computes it in one call on GPUs with FlashAttention. Where
the positions of a run begin, and how many there are, is in tensors. Its table of pages is not used:
FlashAttention 2 wants pages of 256 positions, and a run could begin with a page only.

Nobody has run it for this project, so it is tried on the device before it is used, against products
of floating-point numbers on the CPU. Where it is missing, fails or is wrong, attention goes on as
without it, and the log says so.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.gpu_check import facts_of
from distributed_llm.worker.model.kernels.gpu_choice import Gpu

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16)
_FIRST_CAPABILITY = (8, 0)
"""NVIDIA's, from which on FlashAttention computes."""

_MOST_DIM = 256
_DIM_MULTIPLE = 8

_MOST_ERROR = 0.02
"""Of a row, relative to its root of mean squares; and of a log-sum-exp."""

_EVERYTHING = (-1, -1)
_CAUSAL = (-1, 0)

_right: dict[tuple[torch.device, torch.dtype, int], bool] = {}
"""What is known of the kernel."""


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_ends: Tensor,
    starts: Tensor,
    most_queries: int,
    most_positions: int,
    *,
    scale: float,
    lengths: Tensor | None = None,
    window: tuple[int, int] = _EVERYTHING,
) -> tuple[Tensor, Tensor]:
    """Compute attention of runs of queries over runs of positions.

    Args:
        queries: [queries, heads, dim], run by run.
        keys: [positions, kv_heads, dim].
        values: [positions, kv_heads, dim].
        query_ends: int32 [runs + 1], where the queries of each run begin, and the last end.
        starts: int32 [runs + 1], likewise of positions.
        most_queries: of a run, at most.
        most_positions: of a run, at most.
        scale: factor of the scores.
        lengths: int32 [runs], how many positions each run has; then runs may lie anywhere. None:
            they follow one another.
        window: how many positions before and after its own a query sees, if the last query stands
            at the last position; -1: all.

    Returns:
        The attended values, [queries, heads, dim], and the log-sum-exp of the scores, float32
        [heads, queries].
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    attended, lse = varlen_attn(
        queries,
        keys,
        values,
        query_ends,
        starts,
        most_queries,
        most_positions,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=window,
        enable_gqa=queries.shape[1] != keys.shape[1],
        seqused_k=lengths,
        num_splits=None if torch.version.hip else 1,  # what else is served changes nothing
    )
    return attended, lse


def last_tokens(window: int) -> tuple[int, int]:
    """Return the window of queries that are the last positions of their run.

    Args:
        window: positions that a query sees, itself included; 0 is all before it.
    """
    return (window - 1, 0) if window else _CAUSAL


def is_offered(gpu: Gpu | None, dtype: torch.dtype, dim: int) -> bool:
    """Return whether a device may have the kernel, for numbers of a dtype, `dim` in each key."""
    if gpu is None or dtype not in _DTYPES or dim > _MOST_DIM or dim % _DIM_MULTIPLE:
        return False
    if gpu.kind == "cuda":
        return gpu.capability >= _FIRST_CAPABILITY
    return gpu.kind in ("rocm", "xpu")


def may_be_offered(device: torch.device) -> bool:
    """Return whether a device is of a kind that may have the kernel: no CPU."""
    return facts_of(device) is not None


def is_right(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Return whether the kernel is offered on a device and computes rightly there.

    It is tried when it is first asked for, which waits for the device.
    """
    key = device, dtype, dim
    right = _right.get(key)
    if right is None:
        offered = is_offered(facts_of(device), dtype, dim)
        right = _right[key] = offered and _passes(device, dtype, dim)
    return right


def _passes(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Try the kernel, and log how that ended; return whether it is right."""
    problem = _problem(device, dtype, dim)
    if problem:
        logger.warning("on %s attention over pages %s; it goes on without", device, problem)
    else:
        logger.info("on %s attention reads pages of KV cache", device)
    return not problem


def _problem(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Return what is wrong with the kernel on a device; empty if nothing is."""
    try:
        error = max(_error_of_tokens(device, dtype, dim), _error_of_chunks(device, dtype, dim))
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, AttributeError, TypeError, ValueError, ImportError) as exc:
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        return f"fails: {first[:200]}"
    return "" if error <= _MOST_ERROR else f"is wrong by {error:.0%}"


_KV_HEADS, _GROUP = 2, 3

_PIECES = ((640, 256, 2), (64, 1, 1), (130, 100, 1), (896, 64, 70), (0, 300, 1), (700, 40, 3))
"""Start, length and queries for each head of keys of runs: in no order, and partly the same."""

_CHUNKS = ((70, 200, 0), (33, 33, 0), (70, 200, 40), (5, 300, 256))
"""Queries, positions and window of what is tried as one run."""


def _error_of_tokens(device: torch.device, dtype: torch.dtype, dim: int) -> float:
    """Return the largest error of runs that lie anywhere, among which others have large numbers."""
    starts, lengths, counts = zip(*_PIECES, strict=True)
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    queries = _random((int(ends[-1]), _KV_HEADS, dim), dtype)
    keys, values = (_random((1024, _KV_HEADS, dim), dtype) for _ in range(2))
    used = torch.zeros(len(keys), dtype=torch.bool)
    for start, length, _ in _PIECES:
        used[start : start + length] = True
    keys[~used], values[~used] = 100.0, 100.0
    expected = [
        _reference(
            queries[ends[n] : ends[n + 1]],
            keys[start : start + length],
            values[start : start + length],
            _EVERYTHING,
        )
        for n, (start, length, _) in enumerate(_PIECES)
    ]
    made = attend(
        queries.to(device),
        keys.to(device),
        values.to(device),
        ends.to(device),
        torch.tensor([*starts, 0], dtype=torch.int32, device=device),
        -(-max(counts) // 128) * 128,
        1 << (max(lengths) - 1).bit_length(),
        scale=dim**-0.5,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
    )
    return _error(made, expected)


def _error_of_chunks(device: torch.device, dtype: torch.dtype, dim: int) -> float:
    """Return the largest error of queries that are the last positions of their run."""
    worst = 0.0
    for count, positions, window in _CHUNKS:
        queries = _random((count, _KV_HEADS * _GROUP, dim), dtype)
        keys, values = (_random((positions, _KV_HEADS, dim), dtype) for _ in range(2))
        expected = _reference(queries, keys, values, last_tokens(window))
        made = attend(
            queries.to(device),
            keys.to(device),
            values.to(device),
            torch.tensor([0, count], dtype=torch.int32, device=device),
            torch.tensor([0, positions], dtype=torch.int32, device=device),
            count,
            positions,
            scale=dim**-0.5,
            window=last_tokens(window),
        )
        worst = max(worst, _error(made, [expected]))
    return worst


def _reference(
    queries: Tensor, keys: Tensor, values: Tensor, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return what `attend` does for one run, in float32 on the CPU."""
    count, heads, dim = queries.shape
    keys, values = (
        states.float().repeat_interleave(heads // states.shape[1], dim=1)
        for states in (keys, values)
    )
    scores = torch.einsum("qhd,khd->hqk", queries.float(), keys) * dim**-0.5
    own = torch.arange(count)[:, None] + len(keys) - count
    distance = torch.arange(len(keys)) - own
    before, after = window
    hidden = (distance < -before) if before >= 0 else torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance > after) if after >= 0 else torch.zeros_like(hidden)
    scores.masked_fill_(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values), torch.logsumexp(scores, dim=-1)


def _error(made: tuple[Tensor, Tensor], expected: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the largest error of a row or a log-sum-exp; infinite if there is a NaN."""
    attended = torch.cat([values for values, _ in expected])
    lse = torch.cat([sums for _, sums in expected], dim=1)
    apart = (made[0].float().cpu() - attended).norm(dim=-1) / attended.norm(dim=-1)
    sums_apart = (made[1].float().cpu() - lse).abs()
    both = torch.cat([apart.flatten(), sums_apart.flatten()])
    return float(both.nan_to_num(float("inf")).max())


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(shape, generator=generator).to(dtype)
