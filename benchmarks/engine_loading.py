"""How fast weights are loaded, and made integers, and the memory that it takes."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.common import print_table
from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm
from distributed_llm.worker.model.quantized.quantize import quantized

_GB, _MB = 1e9, 1e6
_ROWS, _COLUMNS = 5632, 2048


def print_loading(folder: Path, rounds: int, base: Path | None) -> None:
    """Print both tables; the files are in the system's cache.

    Args:
        folder: of the checkpoint.
        rounds: loads that medians are of; a checkout takes turns with the other one.
        base: an older checkout to compare with, or None.
    """
    source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    checkouts = {"now": {}, **({} if base is None else {"before": {"PYTHONPATH": str(base)}})}
    rows = []
    for quantize in ("none", "int8", "int4"):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for _ in range(rounds):
            for name, env in checkouts.items():
                with peers.ours(folder, quantize=quantize, **env) as peer:
                    found[name].append(peer.loaded)
        rows += [(quantize, name, *_cells(loads, source)) for name, loads in found.items()]
    head = ("load, quantize", "", "first touch, s", "s", "GB/s of files", "CPU s", "GB/s per core")
    print_table((*head, "weights, MB", "peak, MB", "above weights, MB"), rows)
    print_table(
        ("made of bfloat16, one core", "GB/s"),
        [(str(form), _rate(form)) for form in (INT8, *(WeightForm(4, g) for g in INT4_GROUPS))],
    )


def _cells(loads: Sequence[Mapping[str, float]], source: int) -> tuple[float, ...]:
    touched, took, cpu = (
        statistics.median(one[key] for one in loads) for key in ("touch_s", "load_s", "cpu_s")
    )
    weights, peak = (max(one[key] for one in loads) for key in ("weight_bytes", "peak_bytes"))
    speeds = touched, took, source / took / _GB, cpu, source / cpu / _GB
    return *speeds, weights / _MB, peak / _MB, (peak - weights) / _MB


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
