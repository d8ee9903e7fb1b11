"""What the C library was called for, told to whoever records it.

torch tells of its own operations (`TorchDispatchMode`), but knows nothing of what a library does
with the addresses of its tensors.
"""

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Places(NamedTuple):
    """Where what single tokens attend to is kept.

    Attributes:
        numbers: of one `Part` after another, as attention.c reads them.
        starts: [tokens + 1], where each token's parts begin.
    """

    numbers: "array[int]"
    starts: "array[int]"


NO_PLACES = Places(array("q"), array("q"))
"""Of a layer without attention."""


@dataclass(frozen=True, slots=True)
class NormCall:
    """A call of `rms_norm`; `kind` is a number of norms.c."""

    states: Tensor
    output: Tensor
    weight: Tensor
    epsilon: float
    kind: int


@dataclass(frozen=True, slots=True)
class ProductsCall:
    """A call that multiplies states [rows, inputs] with some weights.

    Attributes:
        function: "int8_products", "int4_products" or "row_products".
        instructions: number of the processor's instructions.
        states: in rows.
        output: memory for the products, one after another.
        weights: addresses and sizes, as C reads them.
        count: of the weights.
        group: what the function is told beside the shape.
    """

    function: str
    instructions: int
    states: Tensor
    output: Tensor
    weights: "array[int]"
    count: int
    group: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """A call of `expert_products`; see `experts.ExpertWeights`.

    Attributes:
        instructions: number of the processor's instructions.
        states: [choices / sharing, inputs].
        output: [choices, channels].
        weights: addresses and sizes, as C reads them.
        count: of the weights.
        chosen: [choices] int64.
        form: a number of products.h.
        group: inputs of the weights that have a scale in common.
    """

    instructions: int
    states: Tensor
    output: Tensor
    weights: "array[int]"
    count: int
    chosen: Tensor
    form: int
    group: int


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A call of `attend_tokens`; see `attention.attend`.

    Attributes:
        sizes: as attention.c reads them, strides among them.
        kept: a number of attention.c.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    sinks: Tensor | None
    rotation: Tensor | None
    sizes: "array[int]"
    scale: float
    softcap: float
    kept: int
    places: Places


@dataclass(frozen=True, slots=True)
class LatentCall:
    """A call that multiplies what each head has by its rows of a weight; see `latents`.

    Attributes:
        function: "absorb_queries" or "latent_values".
        states: that are multiplied.
        weight: of all heads.
        output: what is made.
        sizes: as latents.c reads them, strides among them.
    """

    function: str
    states: Tensor
    weight: Tensor
    output: Tensor
    sizes: "array[int]"


@dataclass(frozen=True, slots=True)
class ConvolutionCall:
    """A call of `convolve`; see `recurrences.convolve`.

    Attributes:
        window: is changed.
        sizes: as convolutions.c reads them.
    """

    column: Tensor
    window: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor
    sizes: "array[int]"
    silu: bool


@dataclass(frozen=True, slots=True)
class RecurrenceCall:
    """A call that makes a new state of another one.

    Attributes:
        function: "delta_rule" or "selective_update".
        read: the tensors that are read beside the state, in the function's order.
        state: float32, before.
        made: after.
        output: bfloat16.
        sizes: as recurrences.c reads them.
    """

    function: str
    read: tuple[Tensor | None, ...]
    state: Tensor
    made: Tensor
    output: Tensor
    sizes: "array[int]"


NativeCall = (
    NormCall
    | ProductsCall
    | ExpertsCall
    | AttentionCall
    | LatentCall
    | ConvolutionCall
    | RecurrenceCall
)


class Listener(Protocol):
    """Is told of calls, and of operations that it shall not see."""

    paused: bool
    """What happens now is no part of what is recorded."""

    def called(self, call: NativeCall) -> None:
        """Handle that the library was called."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def tell(call: NativeCall) -> None:
    """Tell of a call, if somebody listens in this context."""
    listener = _listener.get()
    if listener is not None:
        listener.called(call)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener` told of the calls in this context."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Keep from whoever listens what happens meanwhile: it is done in each step anew."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    listener.paused = True
    try:
        yield
    finally:
        listener.paused = False
