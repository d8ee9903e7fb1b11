"""Which order and which kernels a machine uses for the weights of a kind: pure values."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ROWS = (1, 4, 16, 128)
"""Numbers of rows that kernels are measured with; each stands for a class of numbers."""

_MOST_ROWS = (1, 7, 47)
"""The largest number of rows of each class but the last, which has no limit."""

_SMALLEST_LARGE = 1024 * 2048
"""Elements of the smallest weight that counts as large."""

_CLEARLY_FASTER = 1.1
"""By so much another order has to be faster, on average over the classes of rows."""

Form = Literal["float", "int8", "int4"]
Size = Literal["small", "large"]


@dataclass(frozen=True)
class Kind:
    """Weights for which the same kernels are the fastest.

    Attributes:
        form: in which they are held.
        dtype: of the weights if they are floating-point numbers, without "torch."; else "".
        size: of the matrix.
    """

    form: Form
    dtype: str
    size: Size

    def __str__(self) -> str:
        return " ".join(filter(None, (self.form, self.dtype, self.size)))


@dataclass(frozen=True)
class Choice:
    """An order, and the kernel that reads it for each class of `ROWS`."""

    order: str
    kernels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.kernels) != len(ROWS):
            raise ValueError(f"{len(self.kernels)} kernels for {len(ROWS)} classes of rows")


def class_of(rows: int) -> int:
    """Return the index of the class in `ROWS` that a number of rows belongs to."""
    return bisect_left(_MOST_ROWS, rows)


def size_of(elements: int) -> Size:
    """Return which size a weight of so many elements counts as."""
    return "large" if elements >= _SMALLEST_LARGE else "small"


def fastest(
    seconds: Mapping[tuple[str, str], tuple[float, ...]], preferred: str = ""
) -> Choice | None:
    """Return the order whose best kernels take the least time over all classes of rows.

    A weight is held once, so its order has to do for prompts and for single tokens: what counts is
    the product of times, in which twice as fast weighs the same in each class.

    Args:
        seconds: for each order and kernel the time for each class; infinite where it is wrong or
            far too slow.
        preferred: order that is used unless another one is clearly faster: what other programs do
            meanwhile disturbs measurements.
    """
    best: tuple[float, Choice] | None = None
    for order in dict.fromkeys(order for order, _ in seconds):
        own = {kernel: times for (name, kernel), times in seconds.items() if name == order}
        kernels = tuple(min(own, key=lambda kernel: own[kernel][i]) for i in range(len(ROWS)))
        times = [own[kernel][i] for i, kernel in enumerate(kernels)]
        if math.inf in times:
            continue
        total = sum(map(math.log, times))
        if order == preferred:
            total -= len(times) * math.log(_CLEARLY_FASTER)
        if best is None or total < best[0]:
            best = total, Choice(order, kernels)
    return best[1] if best else None
