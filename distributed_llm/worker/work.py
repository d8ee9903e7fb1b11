"""Runs a worker as its settings say: measures the machine, then serves."""

import gc
import logging
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from distributed_llm.common.addresses import (
    addresses_for_others,
    listens,
    machine_name,
)
from distributed_llm.common.cache_folder import cache_folder, offload_folder
from distributed_llm.common.errors import ConfigError
from distributed_llm.common.keyring import enrolled_name
from distributed_llm.common.messages import Capabilities
from distributed_llm.common.settings import WorkerSettings
from distributed_llm.common.stopping import exit_code
from distributed_llm.common.units import split_address
from distributed_llm.common.wording import count_text, size_text
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.worker import devices
from distributed_llm.worker.compute.copies import measure_copies
from distributed_llm.worker.compute.disk import measure_disk
from distributed_llm.worker.compute.probe import measure, usable_memory_bytes
from distributed_llm.worker.cores import own_cores
from distributed_llm.worker.links import bind_for
from distributed_llm.worker.model.device_copies import copies_to
from distributed_llm.worker.model.kernels.kept_choices import settle
from distributed_llm.worker.service import Worker
from distributed_llm.worker.way_in import WayIn

logger = logging.getLogger(__name__)


async def work(settings: WorkerSettings, way_in: WayIn) -> int:
    """Run a worker until SIGINT, SIGTERM or until it is drained; return the exit code.

    Args:
        way_in: to the coordinator that `settings` name.

    Raises:
        ConfigError: this machine lacks the device or the memory that `settings` name.
        NotAllowed: the coordinator does not know this machine's key.
        CoordinatorUnreachable: none answered at the start.
        CheckpointError: this machine cannot load the model.
        ProtocolMismatch: the coordinator speaks another version.
        AddressInUse: `peer_bind` cannot be listened on.
    """
    gc.freeze()  # collecting garbage among imported modules stops every thread for 0.4 s
    cores = own_cores()
    threads = settings.threads or cores.threads
    logger.info("measuring the memory and the speed of this machine")
    # Who only looks slower would have cores of its own.
    measured = _measure(settings, threads, cores.shares if settings.slowdown == 1 else "")
    capabilities = msgspec.structs.replace(
        measured,
        memory_bandwidth_bytes_per_s=measured.memory_bandwidth_bytes_per_s / settings.slowdown,
        flops_per_s=measured.flops_per_s / settings.slowdown,
    )
    logger.info(
        "%s on %s: %s of memory to use, reads %.1f GB/s, %s (%s)",
        capabilities.device_name,
        capabilities.device,
        size_text(capabilities.memory_bytes),
        capabilities.memory_bandwidth_bytes_per_s / 1e9,
        count_text(threads, "thread"),
        "as set" if settings.threads else cores.reason,
    )
    worker = Worker(
        name_of(settings),
        capabilities,
        address=settings.coordinator,
        addresses=way_in.addresses,
        login=way_in.login,
        peer_bind=bind_for(
            settings.peer_bind,
            settings.coordinator,
            way_in.addresses,
            alone=not await others_reach(settings.coordinator),
        ),
        slowdown=settings.slowdown,
        local_model=settings.model,
        connect_timeout_s=settings.connect_timeout_s,
        leave_timeout_s=settings.leave_timeout_s,
        cache=ContentCache(cache_folder(), settings.cache_limit),
        max_transfer_rate=settings.max_transfer_rate,
    )
    return exit_code(await worker.run())


def name_of(settings: WorkerSettings) -> str:
    """Return what a worker is called: as is settled, or after its machine.

    Raises:
        ConfigError: the key file is damaged, or others can read it.
    """
    return settings.name or enrolled_name(settings.coordinator) or machine_name()


def _with_offload(capabilities: Capabilities, offload_bytes: int) -> Capabilities:
    """Measure where layers may stay: beside a GPU in the machine's memory, else on the disk.

    Raises:
        ConfigError: the device can use neither, or the disk has too little room.
    """
    made = msgspec.structs.replace(capabilities, offload_bytes=offload_bytes)
    device = torch.device(capabilities.device)
    if device.type != "cpu":
        copies = copies_to(device)
        if copies is None:
            raise ConfigError(
                f"offload is set, but this worker computes on {capabilities.device}, which is not "
                "sent weights in every step: only NVIDIA's and AMD's GPUs are. Leave it out, or "
                "start a worker with --device cpu beside."
            )
        made = _with_ram(made, device, measure_copies(copies, device))
    if (on_disk := offload_bytes - made.ram_bytes) > 0:
        rate = measure_disk(offload_folder(), on_disk)
        logger.info(
            "Layers that fit nowhere else may stay on the disk: %s in %s, read at %.1f GB/s",
            *(size_text(on_disk), offload_folder(), rate / 1e9),
        )
        made = msgspec.structs.replace(made, disk_bytes_per_s=rate)
    return made


def _with_ram(capabilities: Capabilities, device: torch.device, bytes_per_s: float) -> Capabilities:
    """Note how much of the room for layers is in the machine's memory.

    That is at most a GPU's share of what is free: the others of the machine may have workers, too.
    """
    gpus = sum(torch.device(name).type == device.type for name in devices.present())
    usable = usable_memory_bytes(torch.device("cpu")) // max(1, gpus)
    ram_bytes = min(capabilities.offload_bytes, usable)
    logger.info(
        "Layers that do not fit on the GPU may stay in memory: %s, copied at %.1f GB/s",
        *(size_text(ram_bytes), bytes_per_s / 1e9),
    )
    return msgspec.structs.replace(capabilities, ram_bytes=ram_bytes, ram_bytes_per_s=bytes_per_s)


async def others_reach(coordinator: str) -> bool:
    """Return whether a coordinator on this machine listens for other machines as well, now.

    Args:
        coordinator: "HOST:PORT" at which it is found here.
    """
    _, port = split_address(coordinator)
    outside = addresses_for_others(f"0.0.0.0:{port}")
    return bool(outside) and await listens(outside[0])


def _measure(settings: WorkerSettings, threads: int, shares: str) -> Capabilities:
    """Measure this machine, and at first start its kernels, in a thread that ends afterwards.

    Each thread that computes gets helper threads from OpenMP, which live as long as it does. If the
    main thread had helpers too, there would be more threads than cores, and GNU's OpenMP would let
    idle helpers sleep instead of spin: a decode step took 186 ms instead of 98.
    """

    def all_of_it() -> Capabilities:
        capabilities = measure(
            settings.device,
            threads=threads,
            max_memory_bytes=settings.max_memory,
            shares=shares,
        )
        if capabilities.device == "cpu":
            settle(cache_folder() / "kernels", capabilities.device_name)
        if settings.offload:
            return _with_offload(capabilities, settings.offload)
        return capabilities

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(all_of_it).result()
