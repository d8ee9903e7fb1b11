"""One step, as the attention of each layer needs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.cache import KVCache


@dataclass(frozen=True, slots=True)
class PackedSlice:
    """Tokens `[row, row + num_tokens)` of the packed row: positions of a sequence from `start`."""

    sequence_id: SequenceId
    start: int
    row: int
    num_tokens: int


@dataclass(slots=True)
class PackedStep:
    """One step, as the attention of each layer needs it.

    Attributes:
        cache: the KV cache of the stage.
        first_layer: number of the stage's first layer in the whole model.
        slices: of the sequences, in the order of the packed row.
        appended: how many times each layer of the stage has called its attention.
        coarse: layers of which products would round the scores too much; kept from step to step.
        lenders: of each layer of the stage, the one whose keys and values it reads, if these are
            another's; likewise numbered within the stage.
        single: the slices of one token.
        chunks: the other slices.
        windows: of the layers that have run, as in `Scoring`.
        made: what one layer has made for others to use again, by what it was made from.
    """

    cache: KVCache
    first_layer: int
    slices: tuple[PackedSlice, ...]
    appended: list[int]
    coarse: set[int] = field(default_factory=set)
    lenders: tuple[int | None, ...] = ()
    single: tuple[PackedSlice, ...] = field(init=False)
    chunks: tuple[PackedSlice, ...] = field(init=False)
    windows: dict[int, int] = field(default_factory=dict)
    made: dict[object, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.single = tuple(part for part in self.slices if part.num_tokens == 1)
        self.chunks = tuple(part for part in self.slices if part.num_tokens > 1)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How queries and keys make weights.

    Attributes:
        scale: factor of the scores.
        window: positions that a token attends to, itself included; 0 is all.
        softcap: scores become softcap * tanh(score / softcap); or None.
        sinks: [heads], logits that take part in softmax without a value; or None.
        slopes: [heads], by how much the score of a position exceeds that of the one before, the
            rest being equal (ALiBi); what a position adds is rounded to their dtype. Or None.
    """

    scale: float
    window: int
    softcap: float | None
    sinks: Tensor | None
    slopes: Tensor | None = None


# The step that runs in this context; a context variable, for stages may run in several threads.
_step: ContextVar[PackedStep] = ContextVar("packed_step")


@contextmanager
def running(step: PackedStep) -> Iterator[None]:
    """Have models that run in this context compute `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def running_step() -> PackedStep:
    """Return the step that runs in this context."""
    return _step.get()
