"""Compare ways to multiply by the weights of a 1.1 B Llama on the CPU, in turns in one run.

    python -m benchmarks.kernels --dtype bfloat16

`F.linear` is what transformers runs. Every product uses another copy of the weight than the one
before, so that each is read from memory, as in a model. Times are medians; ratios are of medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_llm.worker.model.kernels import PackedLinear, kernels_for

SHAPES = {
    "q, o": (2048, 2048),
    "k, v": (256, 2048),
    "gate, up": (5632, 2048),
    "down": (2048, 5632),
    "head": (32000, 2048),
}
ROWS = (1, 2, 4, 8, 16, 64, 128, 512)
_MOST_ROWS_WITHOUT_ONEDNN = 4
"""Beyond this torch's own bfloat16 kernel takes many times as long."""
_BYTES_OF_COPIES = 150_000_000
"""Several times the cache of the processor."""


def measure(
    rows: int, weights: list[Tensor], packed: list[PackedLinear], rounds: int
) -> list[float]:
    """Return the median seconds of F.linear, F.linear without oneDNN (or NaN), and packed."""
    states = torch.randn(rows, weights[0].shape[1]).to(weights[0].dtype)
    plain, others, modules = cycle(weights), cycle(weights[::-1]), cycle(packed)
    ways: list[Callable[[], Tensor]] = [
        lambda: F.linear(states, next(plain)),
        lambda: F.linear(states, next(others)),
        lambda: next(modules)(states),
    ]
    times: list[list[float]] = [[], [], []]
    for turn in range(rounds + 1):
        for number, way in enumerate(ways):
            without = number == 1
            if without and rows > _MOST_ROWS_WITHOUT_ONEDNN:
                continue
            with kernels_for(1 if without else 2):
                started = time.perf_counter()
                way()
                taken = time.perf_counter() - started
            if turn:  # the first makes the kernels
                times[number].append(taken)
    return [statistics.median(taken) if taken else float("nan") for taken in times]


def run(dtype: torch.dtype, rounds: int) -> None:
    """Measure and print."""
    print(f"{dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| weight | rows | F.linear, ms | without oneDNN | packed | F.linear / packed |")
    print("|---|---|---|---|---|---|")
    for name, (out_features, in_features) in SHAPES.items():
        copies = max(2, _BYTES_OF_COPIES // (out_features * in_features * dtype.itemsize))
        layers = [
            nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
            for _ in range(copies)
        ]
        weights = [layer.weight.detach() for layer in layers]
        packed = [PackedLinear(layer) for layer in layers]
        for rows in ROWS:
            plain, without, own = measure(rows, weights, packed, rounds)
            off = "" if without != without else f"{without * 1e3:.2f}"
            print(
                f"| {name} [{out_features}, {in_features}] | {rows} | {plain * 1e3:.2f} | {off} "
                f"| {own * 1e3:.2f} | {plain / own:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        run(getattr(torch, arguments.dtype), arguments.rounds)
