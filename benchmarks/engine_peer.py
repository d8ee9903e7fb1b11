"""A stage with all layers, or `transformers`, as a child process of `benchmarks.engine`.

    python benchmarks/engine_peer.py FOLDER [--quantize int8] [--transformers]

It uses only what a stage has had for long, so that `PYTHONPATH` may name another checkout to
compare with. The questions and answers are those of `benchmarks.peers`.
"""

import argparse
import contextlib
import importlib
import json
import mmap
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_MOST_TOKENS = 512
"""Tokens that are read at a time, as a coordinator does."""

Prompts = list[list[int]]
Answer = dict[str, Any]


def load_stage(folder: Path, dtype: torch.dtype, quantize: str) -> tuple[Any, Answer]:
    """Return a stage with all layers, what loading it took, and the memory for it before.

    A virtual machine's memory is given by its host when it is first touched, which may take longer
    than loading. So as much memory as the files have is touched, timed and freed right before.
    """
    from distributed_llm.common.checkpoint import open_checkpoint
    from distributed_llm.common.types import LayerRange
    from distributed_llm.worker.model.stage import Stage

    checkpoint = open_checkpoint(folder)
    layers = LayerRange(0, checkpoint.num_layers)
    how: dict[str, Any] = {} if quantize == "none" else {"quantize": quantize}
    _settle_kernels()
    Stage.ensure_supported(checkpoint)  # takes its time once for each architecture
    touched = _touch(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began, cpu_began = time.perf_counter(), time.process_time()
    stage = Stage.load(checkpoint, layers, device=torch.device("cpu"), dtype=dtype, **how)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return stage, {
        "load_s": took,
        "cpu_s": cpu,
        "touch_s": touched,
        "weight_bytes": stage.weight_bytes,
        "peak_bytes": _memory("VmHWM") - before,
    }


def _settle_kernels() -> None:
    """Choose kernels by measuring them, as a worker does at its start; an older one does not."""
    with contextlib.suppress(ImportError), tempfile.TemporaryDirectory() as folder:
        kept = importlib.import_module("distributed_llm.worker.model.kernels.kept_choices")
        kept.settle(Path(folder), platform.processor())


def _touch(nbytes: int) -> float:
    """Return how many seconds it takes to write to each page of new memory; it is freed again."""
    began = time.perf_counter()
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for place in range(0, nbytes, mmap.PAGESIZE):
            memory[place] = 1
    return time.perf_counter() - began


def _memory(field: str) -> int:
    """Return the bytes that Linux tells of this process: `VmRSS`, or `VmHWM` for the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    told = dict(line.split(":", 1) for line in lines)
    return int(told[field].split()[0]) * 1024


class StageEngine:
    """A stage that is asked as a coordinator asks it: prompts in chunks, then steps of all."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage

    def answer(self, prompts: Prompts, new_tokens: int) -> Answer:
        """Read the prompts and decode greedily; return seconds of both and the tokens."""
        self._stage.reset()
        began = time.perf_counter()
        tokens = self.prefill(prompts)
        read = time.perf_counter()
        for step in range(new_tokens - 1):
            self.step([len(prompt) + step for prompt in prompts], tokens)
        done = time.perf_counter()
        return {"prefill_s": read - began, "decode_s": done - read, "tokens": tokens}

    def prefill(self, prompts: Prompts) -> Prompts:
        """Read the prompts; return the first token after each, as a list that may grow."""
        firsts: Prompts = [[] for _ in prompts]
        parts: list[tuple[int, int, int]] = []
        room = _MOST_TOKENS
        for i, prompt in enumerate(prompts):
            start = 0
            while start < len(prompt):
                size = min(room, len(prompt) - start)
                parts.append((i, start, start + size))
                start, room = start + size, room - size
                if not room:
                    self._run(prompts, parts, firsts)
                    parts, room = [], _MOST_TOKENS
        if parts:
            self._run(prompts, parts, firsts)
        return firsts

    def step(self, positions: list[int], tokens: Prompts) -> None:
        """Decode one token of each sequence, which is added to its `tokens`."""
        ids = torch.tensor([own[-1] for own in tokens], dtype=torch.int32)
        parts = [(i, position, position + 1) for i, position in enumerate(positions)]
        output = self._stage.run(self._slices(parts, [True] * len(parts)), ids, None)
        for own, token in zip(tokens, output.token_ids.tolist(), strict=True):
            own.append(token)

    def _run(self, prompts: Prompts, parts: list[tuple[int, int, int]], firsts: Prompts) -> None:
        ids = torch.tensor([t for i, a, b in parts for t in prompts[i][a:b]], dtype=torch.int32)
        ends = [b == len(prompts[i]) for i, _, b in parts]
        output = self._stage.run(self._slices(parts, ends), ids, None)
        done = [i for (i, _, _), end in zip(parts, ends, strict=True) if end]
        for i, token in zip(done, output.token_ids.tolist(), strict=True):
            firsts[i].append(token)

    @staticmethod
    def _slices(parts: list[tuple[int, int, int]], ends: list[bool]) -> list[Any]:
        from distributed_llm.common.messages import SequenceSlice
        from distributed_llm.common.sampling_params import Sampling
        from distributed_llm.common.types import SequenceId

        return [
            SequenceSlice(
                sequence_id=SequenceId(i),
                start=a,
                num_tokens=b - a,
                sample=end,
                sampling=Sampling() if end else None,
            )
            for (i, a, b), end in zip(parts, ends, strict=True)
        ]


class TransformersEngine:
    """`generate` of the whole model, for a batch of prompts of one length."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def answer(self, prompts: Prompts, new_tokens: int) -> Answer:
        """Generate one token, then all; return seconds of both and the tokens."""
        first_s, _ = self._generate(prompts, 1)
        all_s, tokens = self._generate(prompts, new_tokens) if new_tokens > 1 else (first_s, [])
        return {"prefill_s": first_s, "decode_s": all_s - first_s, "tokens": tokens}

    def _generate(self, prompts: Prompts, new_tokens: int) -> tuple[float, Prompts]:
        ids = torch.tensor(prompts)
        began = time.perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        took = time.perf_counter() - began
        return took, output[:, ids.shape[1] :].tolist()


def serve(answer: Callable[[Prompts, int], Answer], loaded: Answer) -> None:
    """Tell how loading went, then answer each line of stdin."""
    print(json.dumps(loaded), flush=True)
    draw = random.Random(0)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = asked.get("prompts") or [
            draw.choices(range(3, 31_000), k=asked["prompt_tokens"])
            for _ in range(asked["sequences"])
        ]
        print(json.dumps(answer(prompts, asked["new_tokens"])), flush=True)


def main() -> None:
    """Load what is asked for, and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--transformers", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    if given.transformers:
        began = time.perf_counter()
        engine = TransformersEngine(given.folder, dtype)
        serve(engine.answer, {"load_s": time.perf_counter() - began})
    else:
        stage, loaded = load_stage(given.folder, dtype, given.quantize)
        serve(StageEngine(stage).answer, loaded)


if __name__ == "__main__":
    main()
