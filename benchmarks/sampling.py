"""Sampling a token for each of 16 sequences from 152,000 logits, with the C library and without it.

    python -m benchmarks.sampling [--rounds 25]

Both take turns. Figures are the least over rounds: of processor time in one thread, which other
programs change least, and of time in two threads.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import print_table
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.worker.model import candidates
from distributed_llm.worker.model.sampled_rows import RowToSample, sample_rows

_SEQUENCES, _VOCABULARY = 16, 151_936

_CASES: Mapping[str, tuple[Sampling, float]] = {
    "greedy": (Sampling(), 1.0),
    "top-k 50": (Sampling(temperature=1.0, top_k=50), 1.0),
    "top-p 0.95, peaked logits": (Sampling(temperature=1.0, top_p=0.95), 4.0),
    "top-p 0.95, flat logits": (Sampling(temperature=1.0, top_p=0.95), 1.0),
    "top-p 0.95, flat logits, temperature 0.7": (Sampling(temperature=0.7, top_p=0.95), 1.0),
    "nothing is cut off": (Sampling(temperature=1.0), 1.0),
}
"""Parameters, and the standard deviation of the logits."""


_CLOCKS: Mapping[int, Callable[[], float]] = {1: time.thread_time, 2: time.perf_counter}
"""By the number of threads."""


def ms_of(logits: Tensor, sampling: Sampling, *, threads: int, library: bool) -> float:
    """Return how long it takes to sample each row."""
    torch.set_num_threads(threads)
    clock = _CLOCKS[threads]
    history = np.zeros(0, dtype=np.int32)
    rows = [RowToSample(sampling, number, history, None) for number in range(len(logits))]
    with patch.object(candidates, "can_cut", lambda: library):
        began = clock()
        sample_rows(logits, rows)
        return (clock() - began) * 1000


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    logits = torch.randn(_SEQUENCES, _VOCABULARY, generator=torch.Generator().manual_seed(0))
    ways = [(threads, library) for threads in _CLOCKS for library in (True, False)]
    table = []
    for name, (sampling, scale) in _CASES.items():
        scaled = logits * scale
        turns = [
            [ms_of(scaled, sampling, threads=threads, library=library) for threads, library in ways]
            for _ in range(given.rounds)
        ]
        table.append([name, *map(min, zip(*turns, strict=True))])
    print(f"Sampling {_SEQUENCES} x {_VOCABULARY:,}, ms")
    head = ("one thread: C", "without", "two threads: C", "without")
    print_table(("parameters", *head), table)


if __name__ == "__main__":
    main()
