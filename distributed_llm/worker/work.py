"""From settings to a running worker."""

import gc
import logging
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import msgspec

from distributed_llm.common.messages import Capabilities
from distributed_llm.common.settings import WorkerSettings
from distributed_llm.common.stopping import exit_code
from distributed_llm.common.types import size_text
from distributed_llm.worker.compute.probe import measure
from distributed_llm.worker.service import Worker

logger = logging.getLogger(__name__)


async def work(settings: WorkerSettings) -> int:
    """Work until SIGINT or SIGTERM, or until drained; return the code to exit with.

    Raises:
        ConfigError: the device or the memory that `settings` name is not there.
        CoordinatorUnreachable: no coordinator answered at the start.
        CheckpointError: this machine cannot load the model.
        ProtocolMismatch: the coordinator speaks another version.
        AddressInUse: `peer_bind` cannot be listened on.
    """
    gc.freeze()  # looking for garbage among all that was imported stops every thread for 0.4 s
    threads = settings.threads or os.cpu_count() or 1
    measured = _measure(settings, threads)
    capabilities = msgspec.structs.replace(
        measured,
        memory_bandwidth_bytes_per_s=measured.memory_bandwidth_bytes_per_s / settings.slowdown,
        flops_per_s=measured.flops_per_s / settings.slowdown,
    )
    logger.info(
        "%s on %s: %s for weights and KV cache, reads %.1f GB/s, %d threads",
        capabilities.device_name,
        capabilities.device,
        size_text(capabilities.memory_bytes),
        capabilities.memory_bandwidth_bytes_per_s / 1e9,
        threads,
    )
    worker = Worker(
        settings.name or _host_name(),
        capabilities,
        address=settings.coordinator,
        peer_bind=settings.peer_bind,
        slowdown=settings.slowdown,
        min_task_s=settings.min_task_s,
        local_model=settings.model,
        connect_timeout_s=settings.connect_timeout_s,
        leave_timeout_s=settings.leave_timeout_s,
    )
    return exit_code(await worker.run())


def _measure(settings: WorkerSettings, threads: int) -> Capabilities:
    """Measure in a thread that ends.

    Every thread that computes gets helpers from OpenMP, which stay as long as it does. With those
    of the main thread beside those of the compute thread they would outnumber the cores, and GNU's
    OpenMP then puts them to sleep after every product instead of letting them wait for the next
    one: a decode step took 186 ms instead of 98.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(
            measure, settings.device, threads=threads, max_memory_bytes=settings.max_memory
        ).result()


def _host_name() -> str:
    """Return this machine's name in the letters that worker names may have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname().split(".")[0])
    return name.lstrip("._-")[:60] or "worker"
