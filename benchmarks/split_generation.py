"""A model split over workers on this machine against `transformers.generate` in one process.

    python -m benchmarks.split_generation [--folder FOLDER] [--rounds 3]

Both run in turns (A B A B) on the same cores; the table shows medians. The workers share the cores
and, with one step under way at a time, compute one after the other, as the one process does.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import fresh_prompts
from benchmarks.make_checkpoint import make_checkpoint
from distributed_llm import DistributedClient, Generation, LocalCluster

PROMPT_TOKENS = 128
NEW_TOKENS = 32
WORKERS = 3
MIB = 1024 * 1024


@dataclass(frozen=True)
class Speed:
    """One measurement of a batch; rates in tokens of all sequences per second."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    outside_stages_ms: float = 0.0
    wire_bytes_per_token: float = 0.0


# ------------------------------------------------------------------ transformers, one process


class Baseline:
    """`transformers.generate` in a child process; it answers one line per measurement."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.split_generation", "--baseline", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.load_s = float(self._ask_line()["load_s"])

    def measure(self, count: int) -> Speed:
        """Return the speed with `count` sequences."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return Speed(**self._ask_line())

    def rss(self) -> int:
        """Return its memory, bytes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        """End it."""
        self._process.communicate("")

    def _ask_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def serve_baseline(folder: Path) -> None:
    """Load the model, then measure each number of sequences that is read from stdin."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(psutil.cpu_count() or 1)
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    print(json.dumps({"load_s": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        ids = torch.tensor(fresh_prompts(int(line), PROMPT_TOKENS))
        took: dict[int, float] = {}
        for new in (1, NEW_TOKENS):
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            took[new] = time.perf_counter() - started
        speed = Speed(
            prefill_tokens_per_s=ids.numel() / took[1],
            decode_tokens_per_s=len(ids) * (NEW_TOKENS - 1) / (took[NEW_TOKENS] - took[1]),
        )
        print(json.dumps(asdict(speed)), flush=True)


# ------------------------------------------------------------------ split over workers


def measure_split(client: DistributedClient, count: int) -> Speed:
    """Return the speed of the cluster with `count` sequences sent at once."""
    prompts = fresh_prompts(count, PROMPT_TOKENS)
    sent_before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda prompt: _stream(client, prompt), prompts))
    firsts, lasts, generations = zip(*answers, strict=True)
    wire = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - sent_before
    return Speed(
        prefill_tokens_per_s=count * PROMPT_TOKENS / (max(firsts) - started),
        decode_tokens_per_s=count * (NEW_TOKENS - 1) / (max(lasts) - max(firsts)),
        outside_stages_ms=statistics.median(map(_outside_stages_ms, generations)),
        wire_bytes_per_token=wire / (count * (PROMPT_TOKENS + NEW_TOKENS - 1)),
    )


def _stream(client: DistributedClient, prompt: list[int]) -> tuple[float, float, Generation]:
    times: list[float] = []
    for chunk in client.stream(prompt, max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True):
        if chunk.generation:
            return times[0], times[-1], chunk.generation
        times.append(time.perf_counter())
    raise AssertionError("no end")


def _outside_stages_ms(generation: Generation) -> float:
    """Return the time per step that no stage computed, in ms."""
    timings = generation.timings
    computed = sum(stage.compute_s for stage in timings.stages)
    steps = max(stage.tasks for stage in timings.stages)
    return (timings.first_token_s + timings.decode_s - computed) / steps * 1000


# ------------------------------------------------------------------ the table


def run(folder: Path, rounds: int) -> None:
    """Measure and print."""
    read_s = _read_files(folder)
    started = time.perf_counter()
    with LocalCluster(folder, workers=WORKERS, coordinator={"strategy": "memory"}) as cluster:
        up_s = time.perf_counter() - started
        with DistributedClient(cluster.address) as client:
            _print_memory("after loading", cluster, client)
            _print_alone(client, rounds)
            baseline = Baseline(folder)
            for count in (1, 8):
                ours, theirs = [], []
                for turn in range(rounds + 1):
                    a, b = measure_split(client, count), baseline.measure(count)
                    if turn:  # the first is for warming up
                        ours.append(a)
                        theirs.append(b)
                _print_speed(count, ours, theirs)
            _print_memory("after all runs", cluster, client)
            print(f"| transformers, one process | all | | {baseline.rss() / MIB:.0f} | |")
            _print_load(cluster, read_s, up_s, baseline.load_s)
        baseline.close()


def _median(speeds: Sequence[Speed], field: str) -> float:
    return float(statistics.median(getattr(speed, field) for speed in speeds))


def _print_speed(count: int, ours: Sequence[Speed], theirs: Sequence[Speed]) -> None:
    print(f"\n{count} sequence(s), {PROMPT_TOKENS} tokens in, {NEW_TOKENS} out\n")
    print("| | split over 3 workers | transformers, one process | ratio |\n|---|---|---|---|")
    for name, field in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s")):
        a, b = _median(ours, field), _median(theirs, field)
        print(f"| {name}, tokens/s | {a:.1f} | {b:.1f} | {a / b:.2f} |")
    print(f"| outside the stages, ms per step | {_median(ours, 'outside_stages_ms'):.2f} | | |")
    print(f"| wire, bytes per token | {_median(ours, 'wire_bytes_per_token'):.0f} | | |")


def _print_alone(client: DistributedClient, rounds: int) -> None:
    """Print where the time of one sequence goes while nothing else runs on the machine."""
    firsts, steps = [], []
    for turn in range(rounds + 1):
        first, whole = (_cost(client, new) for new in (1, NEW_TOKENS))
        if turn:
            firsts.append(first)
            steps.append([(b - a) / (NEW_TOKENS - 1) for a, b in zip(first, whole, strict=True)])
    print("\n| 1 sequence, nothing else running | computing, ms | outside the stages, ms |")
    print("|---|---|---|")
    for name, costs in ((f"prefill of {PROMPT_TOKENS} tokens", firsts), ("a decode step", steps)):
        computing, outside = (statistics.median(values) for values in zip(*costs, strict=True))
        print(f"| {name} | {computing:.1f} | {outside:.2f} |")


def _cost(client: DistributedClient, new_tokens: int) -> tuple[float, float]:
    """Return the ms that the stages computed for an answer, and the ms that they did not."""
    prompt = fresh_prompts(1, PROMPT_TOKENS)[0]
    timings = client.generate(
        prompt, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True, details=True
    ).timings
    computed = sum(stage.compute_s for stage in timings.stages)
    return computed * 1000, (timings.first_token_s + timings.decode_s - computed) * 1000


def _print_memory(when: str, cluster: LocalCluster, client: DistributedClient) -> None:
    status = client.status()
    pids = {worker.name: worker.pid for worker in cluster.workers}
    print(f"\n| process, {when} | layers | weights + KV, MiB | memory (RSS), MiB | above, MiB |")
    print("|---|---|---|---|---|")
    for worker in status.workers:
        held = worker.weight_bytes + worker.kv_bytes
        used = psutil.Process(pids[worker.name]).memory_info().rss
        print(
            f"| {worker.name} | {worker.layers} | {held / MIB:.0f} | {used / MIB:.0f} "
            f"| {(used - held) / MIB:.0f} |"
        )
    rss = psutil.Process(cluster.coordinator.pid).memory_info().rss
    print(f"| coordinator | | | {rss / MIB:.0f} | |")


def _print_load(cluster: LocalCluster, read_s: float, up_s: float, baseline_s: float) -> None:
    loaded = [
        line.rsplit(" in ", 1)[1]
        for line in cluster.coordinator.log.read_text().splitlines()
        if " loaded layers " in line
    ]
    print("\n| load | s |\n|---|---|")
    print(f"| reading the files (cached by the system) | {read_s:.1f} |")
    print(f"| a worker's layers, three at a time | {', '.join(loaded)} |")
    print(f"| from nothing to serving | {up_s:.1f} |")
    print(f"| transformers, from_pretrained | {baseline_s:.1f} |")


def _read_files(folder: Path) -> float:
    for _ in range(2):
        started = time.perf_counter()
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                while file.read(16 * MIB):
                    pass
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--baseline", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.baseline:
        serve_baseline(arguments.baseline)
    else:
        folder = arguments.folder or Path(tempfile.gettempdir()) / "dllm-llama-1.1b"
        run(make_checkpoint(folder), arguments.rounds)
