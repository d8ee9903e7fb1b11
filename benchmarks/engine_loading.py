"""How fast weights are loaded, and made integers, and the memory that it takes."""

import statistics
import time
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.common import print_table
from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm
from distributed_llm.worker.model.quantized.quantize import quantized

_GB, _MB = 1e9, 1e6
_ROWS, _COLUMNS = 5632, 2048


def print_loading(folder: Path, rounds: int) -> None:
    """Print both tables; the files are in the system's cache."""
    source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rows = []
    for quantize in ("none", "int8", "int4"):
        found = [_load(folder, quantize) for _ in range(rounds)]
        took = statistics.median(loaded["load_s"] for loaded in found)
        weights, peak = (max(one[key] for one in found) for key in ("weight_bytes", "peak_bytes"))
        above = (peak - weights) / _MB
        rows.append((quantize, took, source / took / _GB, weights / _MB, peak / _MB, above))
    head = ("load, quantize", "s", "GB/s of files", "weights, MB", "peak, MB", "above weights, MB")
    print_table(head, rows)
    print_table(
        ("made of bfloat16, one core", "GB/s"),
        [(str(form), _rate(form)) for form in (INT8, *(WeightForm(4, g) for g in INT4_GROUPS))],
    )


def _load(folder: Path, quantize: str) -> dict[str, float]:
    with peers.ours(folder, quantize=quantize) as peer:
        return peer.loaded


def _rate(form: WeightForm) -> float:
    """Return bytes of bfloat16 per second of one core's time that become integers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    values = (torch.randn(_ROWS, _COLUMNS) * 0.02).bfloat16()
    took = []
    for _ in range(5):
        began = time.process_time()
        quantized(values, form)
        took.append(time.process_time() - began)
    torch.set_num_threads(before)
    return values.nbytes / statistics.median(took) / _GB
