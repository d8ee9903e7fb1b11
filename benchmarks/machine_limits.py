"""What this machine can do at best: read memory, and multiply matrices.

python -m benchmarks.machine_limits
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import print_table
from benchmarks.peers import THREADS

_READ_BYTES = 1 << 29
"""Many times the caches of the processor."""

_ROWS, _IN, _OUT = 512, 2048, 5632
_TRIES = 8


@dataclass(frozen=True)
class Limits:
    """The best of several tries, with as many threads as the engines have.

    Attributes:
        read_bytes_per_s: of memory.
        flops: of a product [512, 2048] x [2048, 5632], per second, by type.
    """

    read_bytes_per_s: float
    flops: dict[str, float]


def measure_limits() -> Limits:
    """Measure for a few seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.inference_mode():
            return Limits(_read_rate(), _flops())
    finally:
        torch.set_num_threads(before)


def print_limits(limits: Limits) -> None:
    """Print a table."""
    rows = [("reading memory", f"{limits.read_bytes_per_s / 1e9:.1f} GB/s")]
    rows += [(f"products, {name}", f"{rate / 1e9:.0f} G/s") for name, rate in limits.flops.items()]
    print_table((f"this machine, {THREADS} threads", "at best"), rows)


def _best_s(work: Callable[[], object]) -> float:
    took = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def _read_rate() -> float:
    """Return bytes per second of whatever reads fastest: a sum, the largest, a product."""
    values = torch.ones(_READ_BYTES // 4)
    matrix = values.view(-1, 4096)
    vector = torch.ones(4096)
    ways: tuple[Callable[[], object], ...] = (
        values.sum,
        values.amax,
        lambda: torch.mv(matrix, vector),
    )
    return _READ_BYTES / min(map(_best_s, ways))


def _flops() -> dict[str, float]:
    return {
        "float32": _operations() / _best_s(_product(torch.float32)),
        "bfloat16": _operations() / _best_s(_product(torch.bfloat16)),
        "int8, inputs made integers as well": _operations() / _best_s(_integer_product()),
    }


def _operations() -> int:
    return 2 * _ROWS * _IN * _OUT


def _product(dtype: torch.dtype) -> Callable[[], object]:
    states, weight = torch.randn(_ROWS, _IN).to(dtype), torch.randn(_OUT, _IN).to(dtype)
    return lambda: torch.nn.functional.linear(states, weight)


def _integer_product() -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tensors of such types are deprecated
        quantized = torch.quantize_per_tensor(torch.randn(_OUT, _IN), 0.03, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    states = torch.randn(_ROWS, _IN)
    return lambda: torch.ops.quantized.linear_dynamic(states, packed)


if __name__ == "__main__":
    print_limits(measure_limits())
