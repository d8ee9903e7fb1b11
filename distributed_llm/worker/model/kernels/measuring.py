"""Measures which kernels are the fastest on this machine, among those that are right.

Takes a second or two, and some 200 MB, once per machine (`kept_choices`).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.kernels.choice import ROWS, Choice, Form, Kind, Size, fastest
from distributed_llm.worker.model.kernels.layout import Kernel, Layout
from distributed_llm.worker.model.kernels.orders import FLOAT, INT4, INT8, REPLACES, usual
from distributed_llm.worker.model.kernels.packed import kernels_for

DTYPES = (torch.bfloat16, torch.float32)
"""Dtypes of states that are measured; others use what is usual."""

SHAPES: Mapping[Size, tuple[int, int]] = {"small": (512, 1024), "large": (2048, 2048)}
"""Weights [out_features, in_features] that stand for each size."""

_COPIES: Mapping[Size, int] = {"small": 2, "large": 4}
"""How many weights take turns, so that the caches do not hold what a model's would not be."""

_GROUP = 64
"""Inputs that share a scale, in weights of 4 bits."""

_ROUND_S = 0.005
"""Time for all rounds of one kernel with one number of rows, seconds."""

_MAX_ROUNDS = 12
_CALLS = 2
_FIRST = 3.0
"""How much slower than usual the first call may be."""

_FAR_SLOWER = 4.0
"""A kernel that takes this many times as long as the fastest one so far is not tried again."""

_ERRORS: Mapping[Form, float] = {"float": 0.01, "int8": 0.025, "int4": 0.02}
"""Largest relative error of a row (root of mean squares) of a kernel that counts as right."""

_CHECKED_ROWS = 4

_BUDGET_S = 8.0
"""Time for everything, seconds; several times what it takes on a machine that is not busy."""

_LACKING = (RuntimeError, NotImplementedError, AttributeError)
"""What torch raises for a kernel that it, or this processor, lacks."""

Seconds = dict[tuple[str, str], tuple[float, ...]]
"""For each order and kernel the seconds that one product takes with each of `ROWS`."""


def measure(
    budget_s: float = _BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[Kind, Choice] | None:
    """Return the choice for each kind of weights; kinds for which no kernel is right are left out.

    Measures with one thread: several wait for each other wherever other programs take a core from
    one of them, and then what is measured is the others. torch's own setting is restored.

    Args:
        budget_s: time that it may take; on a machine so busy, it would learn nothing.
        clock: returns seconds.
        on_progress: called with the kinds of weights that are measured, and how many there are.

    Returns:
        None if the time was not enough.
    """
    started = clock()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    choices = {}
    try:
        with torch.inference_mode():
            wanted = list(kinds())
            for done, kind in enumerate(wanted):
                on_progress(done, len(wanted))
                if choice := fastest(seconds_of(kind), usual(kind).order):
                    choices[kind] = choice
                if clock() - started > budget_s:
                    return None
    finally:
        torch.set_num_threads(before)
    return choices


def kinds() -> Iterator[Kind]:
    """Yield the kinds of weights that are measured."""
    for size in SHAPES:
        for dtype in DTYPES:
            yield Kind("float", str(dtype).removeprefix("torch."), size)
        yield Kind("int8", "", size)
        yield Kind("int4", "", size)


def seconds_of(
    kind: Kind, shape: tuple[int, int] | None = None, *, patience: float = _FAR_SLOWER
) -> Seconds:
    """Return how long each order and kernel that computes rightly takes for weights of a kind.

    Args:
        kind: of the weights.
        shape: [out_features, in_features]; None: what stands for the kind.
        patience: see `_FAR_SLOWER`.
    """
    dtype = getattr(torch, kind.dtype or "bfloat16")
    weight, makers = _made(kind.form, shape or SHAPES[kind.size], dtype)
    states = torch.randn(max(ROWS), weight.shape[1], generator=_generator()).to(dtype)
    states[0] = 1  # with so large sums, kernels that let them overflow are found out
    kernels: dict[tuple[str, str], list[Kernel]] = {}
    for order, make in makers.items():
        if any(other == REPLACES.get(order) for other, _ in kernels):
            continue
        for name, kernel in _right_kernels(make, weight, states, _ERRORS[kind.form]).items():
            kernels[order, name] = [kernel]
        for _ in range(_COPIES[kind.size] - 1):
            own = {name for other, name in kernels if other == order}
            for name, kernel in make().kernels().items() if own else ():
                if name in own:
                    kernels[order, name].append(kernel)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in kernels}
    for rows in ROWS:
        with kernels_for(rows):
            for key, taken in _raced(kernels, states[:rows], patience).items():
                seconds[key].append(taken)
    return {key: tuple(values) for key, values in seconds.items()}


def _right_kernels(
    make: Callable[[], Layout], weight: Tensor, states: Tensor, bound: float
) -> dict[str, Kernel]:
    """Return those kernels of a layout that compute what they should; none if it cannot be made."""
    try:
        kernels = make().kernels()
    except _LACKING:
        return {}
    expected = states[:_CHECKED_ROWS].float() @ weight.T
    right = {}
    for name, kernel in kernels.items():
        try:
            errors = [_error(kernel(states[:rows]), expected) for rows in ROWS[::2]]
        except _LACKING:
            continue
        if max(errors) <= bound:
            right[name] = kernel
    return right


def _raced(
    kernels: Mapping[tuple[str, str], Sequence[Kernel]], states: Tensor, patience: float
) -> dict[tuple[str, str], float]:
    """Return the least time of each kernel; they take turns."""
    turns = {key: cycle(own) for key, own in kernels.items()}
    # Twice, as one call may be interrupted, and what looks far too slow is not tried again.
    taken = {key: min(_timed(turns[key], states, 1) for _ in range(2)) for key in kernels}
    best = min(taken.values(), default=0.0)
    spent = 0.0
    for turn in range(_MAX_ROUNDS):
        most = patience * best * (1 if turn else _FIRST)
        for key in [key for key in kernels if taken[key] <= most]:
            again = _timed(turns[key], states, _CALLS)
            taken[key] = min(taken[key], again)
            spent += again * _CALLS
        best = min(taken.values(), default=0.0)
        if spent > _ROUND_S * len(kernels):
            break
    return {key: value if value <= patience * best else math.inf for key, value in taken.items()}


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of the first rows; infinite if there is a NaN."""
    rows = min(len(actual), len(expected))
    wrong = (actual[:rows].float() - expected[:rows]).norm(dim=1) / expected[:rows].norm(dim=1)
    return float(wrong.max().nan_to_num(math.inf))


def _timed(kernels: Iterator[Kernel], states: Tensor, calls: int) -> float:
    """Return the seconds of a call, of several in a row with other weights, as in a model."""
    chosen = [next(kernels) for _ in range(calls)]
    started = time.perf_counter()
    for kernel in chosen:
        kernel(states)
    return max(time.perf_counter() - started, 1e-9) / calls


def _made(
    form: Form, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Callable[[], Layout]]]:
    """Return a weight, float32, and what makes each layout of it."""
    channels, inputs = shape
    if form == "float":
        weight = torch.randn(shape, generator=_generator()).to(dtype)

        def layer() -> nn.Linear:
            linear = nn.Linear(inputs, channels, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            return linear

        return weight.float(), {
            order: lambda make=make: make(layer())  # type: ignore[misc]
            for order, make in FLOAT.items()
        }
    if form == "int8":
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=_generator())
        scales = torch.rand(channels, generator=_generator()) + 0.5
        return codes * scales[:, None], {
            order: lambda make=make: make(codes, scales)  # type: ignore[misc]
            for order, make in INT8.items()
        }
    codes = torch.randint(16, shape, dtype=torch.uint8, generator=_generator())
    groups = (channels, inputs // _GROUP)
    scales = (torch.rand(groups, generator=_generator()) + 0.5).bfloat16().float()
    offsets = -7 * scales  # not what some kernels take for zero: that costs them something
    values = codes.view(*groups, _GROUP) * scales[..., None] + offsets[..., None]
    return values.view(shape), {
        order: lambda make=make: make(codes, scales, offsets, dtype)  # type: ignore[misc]
        for order, make in INT4.items()
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
