"""Where the time of a decode step goes: a stage with all layers, in parts that add up.

The parts are those of the model's own code, whose modules can be timed. What is computed instead,
once layers are recorded, is timed as a whole, beside the model's own code.
"""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.common import fresh_prompts, print_table
from benchmarks.engine_peer import StageEngine, load_stage
from benchmarks.peers import THREADS
from distributed_llm.worker.model import sampled_rows
from distributed_llm.worker.model.attention import ATTENTION_NAME
from distributed_llm.worker.model.sampler import sample

_PROMPT_TOKENS = 128
_STEPS = 12
_PARTS = ("products", "experts", "attention", "norms", "head", "sampling")
_REST = "the rest: rotations, sums, activations, Python"
_OWN = "one thread, processor time: the model's own code"
_RECORDED = "one thread, processor time: recorded"


@dataclass
class Clock:
    """Adds up the time that each part takes, without that of parts inside it."""

    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _open: list[tuple[str, float]] = field(default_factory=list)

    def begin(self, part: str) -> None:
        """Start `part`; whatever is open waits."""
        now = time.perf_counter()
        if self._open:
            self._add(now)
        self._open.append((part, now))

    def end(self) -> None:
        """End the part that was begun last."""
        now = time.perf_counter()
        self._add(now)
        self._open.pop()
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    def _add(self, now: float) -> None:
        part, since = self._open[-1]
        self.spent[part] += now - since

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.end()

        return timed


def print_profile(folder: Path) -> None:
    """Print a table for one sequence and one for 16, in each form of weights."""
    torch.set_num_threads(THREADS)
    columns: dict[str, dict[str, float]] = {}
    for quantize in ("none", "int8", "int4"):
        stage, _ = load_stage(folder, torch.bfloat16, quantize)
        for count in (1, 16):
            name = f"{'bf16' if quantize == 'none' else quantize}, {count}"
            columns[name] = profile_of(stage, count)
        del stage
    print(f"\nA decode step after {_PROMPT_TOKENS} tokens, ms: form of the weights, sequences")
    rows = [
        [part, *(one[part] for one in columns.values())]
        for part in (*_PARTS, _REST, "all", _RECORDED)
    ]
    print_table(("part", *columns), rows)


def profile_of(stage: Any, count: int) -> dict[str, float]:
    """Return the ms that each part of a step of `count` sequences takes, by the median."""
    stage.reset()
    engine = StageEngine(stage)
    tokens = engine.prefill(fresh_prompts(count, _PROMPT_TOKENS))
    found: dict[str, list[float]] = defaultdict(list)
    clock = Clock()
    with _own_code(stage), _timing(stage, clock):
        for step in range(_STEPS):
            clock.spent.clear()
            clock.begin(_REST)
            engine.step([_PROMPT_TOKENS + step] * count, tokens)
            clock.end()
            for part in (*_PARTS, _REST):
                found[part].append(clock.spent[part] * 1000)
            found["all"].append(sum(clock.spent.values()) * 1000)
    medians = {part: statistics.median(times[2:]) for part, times in found.items()}
    positions = itertools.count(_PROMPT_TOKENS + _STEPS)
    return medians | _processor_time(stage, lambda: engine.step([next(positions)] * count, tokens))


def _processor_time(stage: Any, step: Callable[[], None]) -> dict[str, float]:
    """Return the least ms of processor time that a step takes in one thread, in both ways.

    Others who use the machine change it less than they change how long a step takes.
    """
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {_OWN: [], _RECORDED: []}
    for _ in range(2 * _STEPS):
        for way in found:
            with _own_code(stage) if way == _OWN else nullcontext():
                began = time.thread_time()
                step()
                found[way].append((time.thread_time() - began) * 1000)
    torch.set_num_threads(THREADS)
    return {way: min(times[2:]) for way, times in found.items()}


@contextmanager
def _own_code(stage: Any) -> Iterator[None]:
    """Have the model's own code compute all steps."""
    recorded = [(layer, vars(layer).pop("forward", None)) for layer in stage._held.layers]
    yield
    for layer, forward in recorded:
        if forward is not None:
            layer.forward = forward


@contextmanager
def _timing(stage: Any, clock: Clock) -> Iterator[None]:
    """Time the parts of whatever `stage` runs."""
    model: nn.Module = stage._forward._model
    handles = []
    for name, module in model.named_modules():
        part = _part_of(name, module)
        if part is not None:
            handles.append(module.register_forward_pre_hook(_begin(clock, part)))
            handles.append(module.register_forward_hook(lambda *_: clock.end()))
    attention = ATTENTION_NAME
    timed = clock.around("attention", ALL_ATTENTION_FUNCTIONS[attention])
    with (
        patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {attention: timed}),
        patch.object(sampled_rows, "sample", clock.around("sampling", sample)),
    ):
        yield
    for handle in handles:
        handle.remove()


def _begin(clock: Clock, part: str) -> Callable[..., None]:
    return lambda *_: clock.begin(part)


def _part_of(name: str, module: nn.Module) -> str | None:
    """Return the part that a module's forward counts to; None: to that of whoever calls it."""
    kind = type(module).__name__
    if name.endswith("lm_head"):
        return "head"
    if "Norm" in kind:
        return "norms"
    if "Experts" in kind:
        return "experts"
    return "products" if kind.endswith("Linear") else None
