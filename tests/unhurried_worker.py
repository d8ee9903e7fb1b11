"""A worker that takes at least a given time for each task, as a child process.

    python -m tests.unhurried_worker SECONDS worker [FLAG ...]

It is `dllm worker`, but its compute thread sleeps after each task that took less than SECONDS. So a
test decides how long an answer takes at least, however fast this machine is. The setting `slowdown`
cannot do that: it multiplies what a task takes here.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.keyring import STATE_VARIABLE
from distributed_llm.common.waiting_threads import limit_active_waiting


@contextmanager
def unhurried_worker(
    coordinator: str, name: str, *, min_task_s: float, max_memory: str, threads: int = 0
) -> Iterator[None]:
    """Run such a worker until the context ends; it may not have joined yet when that begins.

    It writes its warnings and errors to this process's stderr, and ends with this process.

    Args:
        coordinator: "HOST:PORT" to join.
        name: of the worker.
        min_task_s: time that each task takes at least, seconds.
        max_memory: for weights and KV cache, such as "256MiB".
        threads: to compute with; 0 is one per core.
    """
    settings = {
        "COORDINATOR": coordinator,
        "NAME": name,
        "MAX_MEMORY": max_memory,
        "THREADS": str(threads),
        "LOG_LEVEL": "warning",
    }
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DLLM_") or name in (STATE_VARIABLE, CACHE_VARIABLE)
    }
    environment |= {f"DLLM_WORKER__{setting}": value for setting, value in settings.items()}
    command = ["-m", "tests.unhurried_worker", str(min_task_s), "worker", "--exit-with-parent"]
    with subprocess.Popen(
        [sys.executable, *command], env=environment, stdin=subprocess.PIPE
    ) as process:
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    """Be the child process: run a verb of `dllm`, with an engine that waits after each task."""
    min_task_s = float(sys.argv.pop(1))
    limit_active_waiting(os.environ)  # as `dllm worker`, before torch is loaded
    gc.disable()  # likewise: among so many new objects it takes a fifth of the time
    from distributed_llm import __main__ as dllm
    from distributed_llm.worker import service, work
    from distributed_llm.worker.compute.engine import Engine
    from distributed_llm.worker.cores import Cores

    class UnhurriedEngine(Engine):
        def _wait(self, computed_s: float) -> None:
            time.sleep(max(0.0, min_task_s - computed_s))

    with (
        patch.object(service, "Engine", UnhurriedEngine),
        patch.object(work, "own_cores", lambda: Cores(1, "as told", "")),
    ):
        dllm.main()


if __name__ == "__main__":
    main()
