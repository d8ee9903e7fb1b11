"""What depends on the kind of a device: which there are, their memory, waiting for them.

ROCm's GPUs are torch's "cuda" devices.
"""

import ctypes
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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
        return capability(device) >= (8, 0)
    return True


def capability(device: torch.device) -> tuple[int, int]:
    """Return NVIDIA's number for what a GPU of theirs can do, major and minor."""
    return torch.cuda.get_device_capability(device)


def architecture(device: torch.device) -> str:
    """Return AMD's name for the architecture of a GPU of theirs ("gfx90a")."""
    properties: Any = torch.cuda.get_device_properties(device)
    return str(properties.gcnArchName).partition(":")[0]


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


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for what that was asked to do before.

    A GPU with memory of its own copies it later, out of pinned memory, which torch keeps until
    then. Out of any other memory torch copies at once, and first waits until the GPU has nothing
    left to do: with one such copy in each layer a GPU would never have the next layer in hand.
    """
    if device.type in ("cpu", "mps"):
        return tensor.to(device)
    if _backend(device) is not None:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def overwritten(target: Tensor, tensor: Tensor) -> None:
    """Copy a tensor of the CPU over one of a device, as `sent` does it."""
    if _backend(target.device) is not None and target.device.type != "mps":
        tensor = tensor.pin_memory()
    target.copy_(tensor, non_blocking=True)


def fetched(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, once its device has computed it; itself if it is there.

    A GPU with memory of its own writes into pinned memory, several times as fast as elsewhere.
    """
    if tensor.device.type in ("cpu", "mps") or _backend(tensor.device) is None:
        return tensor.cpu()
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return held.copy_(tensor)


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
