"""The workers of a machine with several GPUs: which there are, and what each is called. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_llm.common.units import split_address

_NAME_CHARS = 56
"""Characters of a machine's name that are left in those of its workers."""


@dataclass(frozen=True)
class GpuWorker:
    """A worker that drives one GPU.

    Attributes:
        name: by which the coordinator knows it.
        device: torch's name of the GPU.
        peer_bind: "HOST:PORT" on which it listens for other workers.
    """

    name: str
    device: str
    peer_bind: str


def gpus_of(device: str, present: Sequence[str]) -> tuple[str, ...]:
    """Return the GPUs that are to have a worker each; none if there is just one device to drive.

    "auto" means them on a machine that has several of the fastest kind. GPUs of another kind
    are left alone: they are most often part of the processor, and would take its memory.

    Args:
        device: as in the settings of a worker.
        present: torch's names of all devices, the fastest first.
    """
    if device != "auto":
        return ()
    kind = present[0].partition(":")[0]
    found = tuple(name for name in present if name.partition(":")[0] == kind)
    return found if len(found) > 1 else ()


def workers_for(devices: Sequence[str], machine: str, peer_bind: str) -> tuple[GpuWorker, ...]:
    """Return a worker for each GPU.

    Args:
        devices: torch's names of them ("cuda:0").
        machine: what a single worker would be called.
        peer_bind: "HOST:PORT" on which it would listen; the workers take this port and the ones
            after it, or any ports if it is 0.
    """
    host, port = split_address(peer_bind)
    shown = f"[{host}]" if ":" in host else host
    return tuple(
        GpuWorker(
            name=f"{machine[:_NAME_CHARS]}-gpu{device.partition(':')[2]}",
            device=device,
            peer_bind=f"{shown}:{port + number if port else 0}",
        )
        for number, device in enumerate(devices)
    )
