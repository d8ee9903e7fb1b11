"""A worker whose speed is known, and changes while it runs.

    DLLM_WORKER__SLOWDOWN=8 python -m benchmarks.paced_worker

It is `dllm worker`, with three differences. Every line on stdin is a number: how many times slower
to look from now on. A task takes so many times what `Pace` says, whatever else runs on this machine
(it is computed as usual, and then waits). And its probes are made up: the first says what a machine
of no remarkable speed would, so the coordinator has to find out how fast the worker is by what its
tasks take; later ones, while it has no layers, follow the slowdown.

It ends when stdin does.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from benchmarks.pace import Pace
from distributed_llm.common.config import load_settings
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.log import configure
from distributed_llm.common.messages import Capabilities, SequenceSlice, StageTime
from distributed_llm.worker import service, work
from distributed_llm.worker.compute import engine, held_stages, loading
from distributed_llm.worker.compute.engine import Engine
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.step_results import StageOutput
from distributed_llm.worker.model.task_inputs import Masks
from distributed_llm.worker.session.events import Probe, Probed
from distributed_llm.worker.way_in import find_way_in

_T = TypeVar("_T")

BYTES_PER_S = 10e9
FLOPS_PER_S = 50e9


class PacedStage(Stage):
    """A stage that says it took what `Pace` says."""

    def run(
        self,
        sequences: Sequence[SequenceSlice],
        token_ids: Tensor,
        hidden_states: Tensor | None,
        masks: Masks | None = None,
    ) -> StageOutput:
        """Compute, as usual."""
        prompts = sum(part.num_tokens for part in sequences if part.num_tokens > 1)
        self.pace = Pace(
            layers=len(self.layers),
            last=self._last,
            answering=sum(part.num_tokens == 1 for part in sequences),
            prompt_tokens=prompts,
        )
        return super().run(sequences, token_ids, hidden_states, masks)

    @property
    def layers_s(self) -> float:
        """Seconds of the latest step, at slowdown 1."""
        return self.pace.layers_s


class PacedEngine(Engine):
    """An engine that is as slow as the latest line on stdin says."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        threading.Thread(target=self._obey, name="pace", daemon=True).start()

    def _timed(self, stage: Stage, work: Callable[[], _T]) -> tuple[_T, StageTime]:
        assert isinstance(stage, PacedStage)
        self._paced = stage
        try:
            return super()._timed(stage, work)
        finally:
            del self._paced  # or its memory could not be freed

    def _wait(self, computed_s: float) -> None:
        time.sleep(max(0.0, self._paced.pace.task_s * self.slowdown - computed_s))

    def _obey(self) -> None:
        for line in sys.stdin:
            self.slowdown = float(line)
        os._exit(0)


def unremarkable(measured: Capabilities, slowdown: float) -> Capabilities:
    """Return what was measured, but with speeds that are always the same, and cores of its own.

    Args:
        slowdown: by which the worker is going to divide them.
    """
    return msgspec.structs.replace(
        measured,
        memory_bandwidth_bytes_per_s=BYTES_PER_S * slowdown,
        flops_per_s=FLOPS_PER_S * slowdown,
        shares="",
    )


def remeasure(order: Probe, capabilities: Capabilities, *, slowdown: float) -> Probed:
    """Return what a later probe says."""
    speeds = BYTES_PER_S / slowdown, FLOPS_PER_S / slowdown
    return Probed(order.session, *speeds, capabilities.memory_bytes)


def main() -> None:
    """Work until a signal, or until stdin ends."""
    settings = load_settings(None, environment=os.environ, overrides={}).worker
    configure(settings.log_level)
    measure = work._measure
    work._measure = lambda *given: unremarkable(measure(*given), settings.slowdown)
    engine.remeasure = remeasure  # type: ignore[attr-defined]
    held_stages.Stage = loading.Stage = PacedStage  # type: ignore[attr-defined]
    service.Engine = PacedEngine  # type: ignore[attr-defined]
    try:
        way_in = asyncio.run(find_way_in(settings))
        code = asyncio.run(work.work(settings, way_in))
    except DistributedLLMError as exc:
        print(f"Error ({exc.code}): {exc}", file=sys.stderr, flush=True)
        code = exc.exit_code
    os._exit(code)


if __name__ == "__main__":
    main()
