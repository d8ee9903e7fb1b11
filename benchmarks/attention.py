"""Attention of single tokens, norms and context memory: the C library against torch, in turns.

    python -m benchmarks.attention [--rounds 15]

Computes in bfloat16 with one thread, so that what other programs do counts least. Figures are
medians over rounds, in each of which all ways take their turn. The last table tells what the KV
cache of a stage takes once layers with a window dropped what no token sees.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.common import print_table
from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.kv.cache import KVCache, as_token_ids
from distributed_llm.worker.model import token_attention
from distributed_llm.worker.model.attention import packed_attention
from distributed_llm.worker.model.fast_norms import replace_norms
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, running
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import make_checkpoint

_HEADS, _KV_HEADS, _DIM = 32, 4, 64
_LOADS = ((1, 160), (16, 160), (1, 1024), (16, 1024))
"""Sequences, and positions of each."""

_CALLS = 10
"""Calls of a round; a round's time is their mean."""

Timed = Callable[[], object]


def attention_of(kv_dtype: KVDtype, sequences: int, positions: int) -> Timed:
    """Return what computes one token of each sequence, over and over at the same position."""
    cache, module = KVCache(1, kv_dtype=kv_dtype), nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]

    def states(count: int) -> list[Tensor]:
        heads = (_HEADS, _KV_HEADS, _KV_HEADS)
        return [torch.randn(1, each, sequences * count, _DIM).bfloat16() for each in heads]

    def step(start: int, count: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        numbers = range(sequences)
        parts = [PackedSlice(SequenceId(n), start, n * count, count) for n in numbers]
        for part in parts:
            cache.begin(part.sequence_id, start, as_token_ids([0] * count))
        with running(PackedStep(cache, 0, tuple(parts), [0])):
            packed_attention(module, query, key, value, None)
        for part in parts:
            cache.commit(part.sequence_id, start + count)

    step(0, positions, *states(positions))
    one = states(1)
    return lambda: step(positions, 1, *one)


def norm_of(rows: int, *, fast: bool) -> Timed:
    """Return what computes the norm of some rows of 2,048."""
    model = nn.Sequential(LlamaRMSNorm(2048).bfloat16())
    if fast:
        replace_norms(model)
    states = torch.randn(1, rows, 2048).bfloat16()
    return lambda: model(states)


def without_library(timed: Timed) -> Timed:
    """Return what computes the same by torch alone."""

    def computed() -> None:
        with patch.object(token_attention, "can_attend", lambda *_: False):
            timed()

    return computed


def medians(ways: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """Return the µs that a call of each takes."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, timed in ways.items():
            began = time.perf_counter()
            for _ in range(_CALLS):
                timed()
            if turn:
                times[way].append((time.perf_counter() - began) / _CALLS * 1e6)
    return {way: statistics.median(each) for way, each in times.items()}


def print_attention(rounds: int) -> None:
    """Print how long a layer's attention takes, by the library and by torch, and in 8 bits."""
    rows = []
    for sequences, positions in _LOADS:
        plain = attention_of("auto", sequences, positions)
        ways = {
            "C": plain,
            "torch": without_library(plain),
            "int8": attention_of("int8", sequences, positions),
            "fp8": attention_of("fp8", sequences, positions),
        }
        took = medians(ways, rounds)
        ratios = [took[way] / took["C"] for way in ("torch", "int8", "fp8")]
        rows.append([f"{sequences} x {positions}", took["C"], *ratios])
    head = ("sequences x positions", "C, µs", "torch / C", "int8 / C", "fp8 / C")
    print(f"\nAttention of a layer, {_HEADS} heads, {_KV_HEADS} of keys, of {_DIM}; one thread")
    print_table(head, rows)


def print_norms(rounds: int) -> None:
    """Print how long an RMS norm takes."""
    rows = []
    for count in (1, 16, 512):
        ways = {"C": norm_of(count, fast=True), "transformers": norm_of(count, fast=False)}
        took = medians(ways, rounds)
        rows.append([count, took["C"], took["transformers"], took["transformers"] / took["C"]])
    print("\nAn RMS norm of rows of 2,048; one thread")
    print_table(("rows", "C, µs", "transformers, µs", "ratio"), rows)


def print_windows() -> None:
    """Print what a KV cache takes before and after layers with a window drop positions."""
    positions, window, chunk = 4096, 512, 256
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(
            Path(folder) / "model",
            "gemma3_text",
            num_layers=6,
            max_position_embeddings=positions,
            sliding_window=window,
            head_dim=256,
            layer_types=["sliding_attention"] * 5 + ["full_attention"],
        )
        stage = Stage.load(
            open_checkpoint(path),
            LayerRange(0, 6),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for start in range(0, positions, chunk):
            part = SequenceSlice(sequence_id=SequenceId(1), start=start, num_tokens=chunk)
            stage.run([part], torch.zeros(chunk, dtype=torch.int32), _NO_STATES)
        before = stage.kv_bytes
        stage.forget({SequenceId(1): positions - window})
        after = stage.kv_bytes
    print(f"\nKV cache of six layers, five with a window of {window}; {positions:,} positions")
    rows = [[before / 2**20, after / 2**20, after / before]]
    print_table(("all kept, MiB", "dropped, MiB", "ratio"), rows)


_NO_STATES: Tensor | None = None
"""The first stage gets tokens, not states."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        print_attention(given.rounds)
        print_norms(given.rounds)
        print_windows()


if __name__ == "__main__":
    main()
