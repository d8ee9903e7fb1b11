"""Workers that take at least a given time for each task, as child processes.

    python -m tests.unhurried_worker SECONDS NAME=COORDINATOR [NAME=COORDINATOR ...]

Each is `dllm worker`, but its compute thread sleeps after each task that took less than SECONDS. So
a test decides how long an answer takes at least, however fast this machine is. The setting
`slowdown` cannot do that: it multiplies what a task takes here.

All are forks of one process, which loads torch once.
"""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.keyring import STATE_VARIABLE
from distributed_llm.common.waiting_threads import limit_active_waiting


@contextmanager
def unhurried_workers(
    coordinators: Mapping[str, str], *, min_task_s: float, max_memory: str, threads: int = 0
) -> Iterator[None]:
    """Run such workers until the context ends; they may not have joined yet when that begins.

    They write their warnings and errors to this process's stderr, and end with this process.

    Args:
        coordinators: "HOST:PORT" to join, by the name of the worker.
        min_task_s: time that each task takes at least, seconds.
        max_memory: for weights and KV cache, such as "256MiB", of each.
        threads: to compute with; 0 is one per core.
    """
    settings = {"MAX_MEMORY": max_memory, "THREADS": str(threads), "LOG_LEVEL": "warning"}
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DLLM_") or name in (STATE_VARIABLE, CACHE_VARIABLE)
    }
    environment |= {f"DLLM_WORKER__{setting}": value for setting, value in settings.items()}
    workers = [f"{name}={coordinator}" for name, coordinator in coordinators.items()]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.unhurried_worker", str(min_task_s), *workers],
        env=environment,
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Be the child processes: run `dllm worker` with an engine that waits after each task."""
    min_task_s, *workers = sys.argv[1:]
    limit_active_waiting(os.environ)  # as `dllm worker`, before torch is loaded
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would not survive a fork
    gc.disable()  # likewise: among so many new objects it takes a fifth of the time
    from distributed_llm import __main__ as dllm
    from distributed_llm.worker import service, work
    from distributed_llm.worker.compute.engine import Engine
    from distributed_llm.worker.cores import Cores

    class UnhurriedEngine(Engine):
        def _wait(self, computed_s: float) -> None:
            time.sleep(max(0.0, float(min_task_s) - computed_s))

    while len(workers) > 1 and os.fork():
        workers.pop(0)
    name, _, coordinator = workers[0].partition("=")
    os.environ |= {"DLLM_WORKER__NAME": name, "DLLM_WORKER__COORDINATOR": coordinator}
    sys.argv[1:] = ["worker", "--exit-with-parent"]
    with (
        patch.object(service, "Engine", UnhurriedEngine),
        patch.object(work, "own_cores", lambda: Cores(1, "as told", "")),
    ):
        dllm.main()


if __name__ == "__main__":
    main()
