"""What depends on the kind of a device: which there are, their memory, waiting for them.

ROCm's GPUs are torch's "cuda" devices.
"""

import ctypes
import sys
from contextlib import suppress
from types import ModuleType

import torch

from distributed_llm.common.errors import StageError


def present() -> list[str]:
    """Return torch's names of the devices of this machine; the first is the fastest."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    gpus += [f"xpu:{i}" for i in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        gpus.append("mps")
    return [*gpus, "cpu"]


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices of bfloat16.

    NVIDIA's do from Ampere on (older ones emulate it, if at all), Apple's from macOS 14 on.
    """
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def own_memory(device: torch.device) -> tuple[int, int] | None:
    """Return (free, total) bytes of a GPU with memory of its own, None if it uses the machine's.

    What torch's allocator keeps without need is given back first, or it would count as taken.
    """
    if (backend := _backend(device)) is None or device.type == "mps":
        return None
    backend.empty_cache()
    free, total = backend.mem_get_info(device)
    return int(free), int(total)


def give_memory_back(device: torch.device) -> None:
    """Give freed memory back to the system; torch and glibc's malloc would keep it for later."""
    if (backend := _backend(device)) is not None:
        backend.empty_cache()
    elif sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif (backend := _backend(device)) is not None:
        backend.synchronize(device)


def name_of_gpu(device: torch.device) -> str:
    """Return what its maker calls a GPU; empty if it uses the machine's memory, or is none."""
    backend = _backend(device)
    return "" if backend is None or device.type == "mps" else str(backend.get_device_name(device))


def lost(device: torch.device, exc: BaseException) -> StageError:
    """Return the error with which a worker ends whose device failed.

    What such a device holds cannot be trusted, and no later call to it succeeds.
    """
    return StageError(
        f"The device {device} failed: {str(exc).strip()[:300]}. What it holds is lost, so this "
        "worker ends, and others take its layers. Start it again; if that happens often, look at "
        "the GPU's driver, power and temperature."
    )


def _backend(device: torch.device) -> ModuleType | None:
    """Return torch's module for a kind of GPU, None for the CPU."""
    return {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}.get(device.type)
