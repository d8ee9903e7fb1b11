"""Takes for a GPU the best kernel that computes rightly there: each is tried, once, on the device.

A small product is compared with one of floating-point numbers that the CPU makes. What this torch
or this device lacks, or computes otherwise than its sources say, costs speed and never gives wrong
tokens. (A kernel that makes the device itself fail ends the worker, as any such failure does.)
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from distributed_llm.worker import devices
from distributed_llm.worker.model.kernels.choice import ROWS, Choice, class_of
from distributed_llm.worker.model.kernels.gpu_choice import BLOCKS, Gpu, Integers, offers
from distributed_llm.worker.model.kernels.gpu_orders import int4_layout, int8_layout
from distributed_llm.worker.model.kernels.layout import Layout

logger = logging.getLogger(__name__)

_MOST_ERROR = 0.02
"""Relative error of a row (root of mean squares) of a product that counts as right."""

_CHANNELS = {"int8": 96, "int4": 90}
"""Rows of the weight that is tried: some have to be padded with 4 bits, none may be with 8."""

_COLUMNS = 1024
"""Its columns, beside as many as tiles can be laid side by side: kernels take them in steps."""

_checked: dict[tuple[object, ...], str] = {}
"""What is wrong with an offer; "" if nothing is."""

_used: dict[str, str] = {}
"""By what weights are used for, what their products are computed by, for people."""


def facts_of(device: torch.device) -> Gpu | None:
    """Return what the choice of kernels for a device depends on; None: it is a CPU."""
    match device.type:
        case "cpu":
            return None
        case "cuda" if torch.version.hip is None:
            return Gpu("cuda", capability=devices.capability(device))
        case "cuda":
            return Gpu("rocm", architecture=devices.architecture(device))
    return Gpu(device.type)


def right_choice(gpu: Gpu, weight: Integers, device: torch.device) -> Choice:
    """Return the best offer for a weight that is right on the device; the blocks are taken untried.

    Logs once, for each kind of weight, what is used and why nothing better is.
    """
    failed = []
    for choice in offers(gpu, weight):
        wrong = "" if choice == BLOCKS else _problem(choice, gpu, weight, device)
        if not wrong:
            break
        failed.append(f"{choice.kernels[0]} {wrong}")
    kind = f"{weight.form} in groups of {weight.group}" if weight.group else weight.form
    text = " and ".join(dict.fromkeys(choice.kernels)) + "".join(f"; {why}" for why in failed)
    if _used.get(kind) != text:
        _used[kind] = text
        log = logger.warning if failed else logger.info
        log("on %s weights of %s are multiplied by %s", device, kind, text)
    return choice


def used_text() -> str:
    """Return by which kernels this process multiplies weights of integers on its GPU, for people.

    Empty if it has loaded none there.
    """
    return ", ".join(f"{kind} by {text}" for kind, text in sorted(_used.items()))


def _problem(choice: Choice, gpu: Gpu, weight: Integers, device: torch.device) -> str:
    """Return what is wrong with an offer on a device; empty if nothing is."""
    columns = _COLUMNS + math.gcd(weight.in_features, 256)
    key = (choice, gpu, str(device), weight.group, columns, weight.dtype)
    if key not in _checked:
        try:
            error = _error(choice, gpu, weight, columns, device)
            _checked[key] = "" if error <= _MOST_ERROR else f"is wrong here by {error:.0%}"
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, NotImplementedError, AttributeError) as exc:
            first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            _checked[key] = f"fails here: {first[:200]}"
    return _checked[key]


def _error(choice: Choice, gpu: Gpu, weight: Integers, columns: int, device: torch.device) -> float:
    """Return the largest relative error of a row of products; infinite if there is a NaN."""
    dtype = getattr(torch, weight.dtype)
    make, values = _made(weight, columns, device)
    kernels = make(choice, gpu, dtype).kernels()
    states = torch.randn(max(ROWS), columns, generator=_generator())
    expected = states.to(dtype).float() @ values.T
    worst = 0.0
    for rows in ROWS:
        product = kernels[choice.kernels[class_of(rows)]](states[:rows].to(device, dtype))
        apart = (product.float().cpu() - expected[:rows]).norm(dim=1)
        wrong = apart / expected[:rows].norm(dim=1)
        worst = max(worst, float(wrong.nan_to_num(math.inf).max()))
    return worst


def _made(
    weight: Integers, columns: int, device: torch.device
) -> tuple[Callable[[Choice, Gpu, torch.dtype], Layout], Tensor]:
    """Return what makes a layout of a weight like this one on a device, and its values, float32."""
    shape = (_CHANNELS[weight.form], columns)
    if weight.form == "int8":
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=_generator())
        scales = _scales((shape[0], 1))
        there = codes.to(device), scales[:, 0].to(device)
        return lambda choice, gpu, dtype: int8_layout(choice, *there, dtype), codes * scales
    codes = torch.randint(16, shape, dtype=torch.uint8, generator=_generator())
    scales = _scales((shape[0], columns // weight.group))
    offsets = scales.flip(0) - 8 * scales
    codes_there, scales_there, offsets_there = (
        part.to(device) for part in (codes, scales, offsets)
    )
    grouped = codes.view(*scales.shape, weight.group) * scales[..., None] + offsets[..., None]
    return (
        lambda choice, gpu, dtype: int4_layout(
            choice, gpu, codes_there, scales_there, offsets_there, dtype
        ),
        grouped.view(shape),
    )


def _scales(shape: tuple[int, int]) -> Tensor:
    """Return scales that bfloat16 holds."""
    return (torch.rand(shape, generator=_generator()) + 0.5).bfloat16().float()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
