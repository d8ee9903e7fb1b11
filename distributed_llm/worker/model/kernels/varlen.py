"""Attention of many runs of queries, each over a run of positions of its own, by torch's kernel.

`torch.nn.attention.varlen.varlen_attn` computes it in one call on GPUs with FlashAttention. Where
the positions of a run begin, and how many there are, is in tensors. Its table of pages is not used:
FlashAttention 2 wants pages of 256 positions, and a run could begin with a page only.

Nobody has run it for this project, so it is tried on the device before it is used, against products
of floating-point numbers on the CPU. Where it is missing, fails or is wrong, attention goes on as
without it, and the log says so.
"""

import logging

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
    lengths: Tensor,
    window: tuple[int, int] = _EVERYTHING,
) -> tuple[Tensor, Tensor]:
    """Compute attention of runs of queries over runs of positions.

    Args:
        queries: [queries, heads, dim], run by run.
        keys: [positions, kv_heads, dim].
        values: [positions, kv_heads, dim].
        query_ends: int32 [runs + 1], where the queries of each run begin, and the last end.
        starts: int32 [runs + 1], where the positions of each run begin; the last says nothing.
        most_queries: of a run, at most.
        most_positions: of a run, at most.
        scale: factor of the scores.
        lengths: int32 [runs], how many positions each run has.
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
        error = max(_error(*trial, device, dtype, dim) for trial in _TRIALS)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, AttributeError, TypeError, ValueError, ImportError) as exc:
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        return f"fails: {first[:200]}"
    return "" if error <= _MOST_ERROR else f"is wrong by {error:.0%}"


_KV_HEADS, _GROUP = 2, 3

_Runs = tuple[tuple[int, int, int], ...]

_PIECES: _Runs = (
    (640, 256, 2),
    (64, 1, 1),
    (130, 100, 1),
    (896, 64, 70),
    (0, 300, 1),
    (700, 40, 3),
)
"""Start, length and queries of runs, in no order and partly the same: of single tokens."""

_CHUNKS: _Runs = ((300, 200, 70), (40, 33, 33), (900, 100, 5))
"""Likewise of chunks, of which the queries are the last positions."""

_TRIALS = ((_PIECES, 1, _EVERYTHING), (_CHUNKS, _GROUP, (-1, 0)), (_CHUNKS, _GROUP, (39, 0)))
"""Runs, heads of queries for each of keys, and the window of what is tried."""


def _error(
    runs: _Runs,
    group: int,
    window: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
) -> float:
    """Return the largest error of a row or a log-sum-exp; infinite if there is a NaN.

    Numbers are large where no run is.
    """
    starts, lengths, counts = zip(*runs, strict=True)
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    queries = _random((int(ends[-1]), _KV_HEADS * group, dim), dtype)
    keys, values = (_random((1024, _KV_HEADS, dim), dtype) for _ in range(2))
    unused = torch.ones(len(keys), dtype=torch.bool)
    expected = []
    for n, (start, length, _) in enumerate(runs):
        own = slice(start, start + length)
        unused[own] = False
        rows = queries[ends[n] : ends[n + 1]]
        expected.append(_reference(rows, keys[own], values[own], window))
    keys[unused], values[unused] = 100.0, 100.0
    attended, lse = attend(
        queries.to(device),
        keys.to(device),
        values.to(device),
        ends.to(device),
        torch.tensor([*starts, 0], dtype=torch.int32, device=device),
        -(-max(counts) // 128) * 128,
        1 << (max(lengths) - 1).bit_length(),
        scale=dim**-0.5,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        window=window,
    )
    right = torch.cat([each for each, _ in expected])
    right_lse = torch.cat([each for _, each in expected], dim=1)
    apart = (attended.float().cpu() - right).norm(dim=-1) / right.norm(dim=-1)
    both = torch.cat([apart.flatten(), (lse.float().cpu() - right_lse).abs().flatten()])
    return float(both.nan_to_num(float("inf")).max())


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


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(shape, generator=generator).to(dtype)
