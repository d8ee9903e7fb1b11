"""One step, as the attention of each layer and layers with a state of their own need it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.page_tables import TableKey, TokenTables
from distributed_llm.worker.kv.states import SequenceState, StateTensors, joined


@dataclass(frozen=True, slots=True)
class PackedSlice:
    """Tokens `[row, row + num_tokens)` of the packed row: positions of a sequence from `start`.

    Attributes:
        source: how many of the sequence's first positions are what an encoder reads.
    """

    sequence_id: SequenceId
    start: int
    row: int
    num_tokens: int
    source: int = 0

    @property
    def is_source(self) -> bool:
        """Whether the tokens are what an encoder reads."""
        return self.start < self.source


@dataclass(slots=True)
class StateGroup:
    """Slices for which a layer with a state of its own is called together.

    They are of one token each and go on from a state, or it is one slice.

    Attributes:
        parts: the slices.
        begun: their states before the step; None: the sequence begins here.
        made: by layer of the stage, the tensors of the states after the step.
    """

    parts: tuple[PackedSlice, ...]
    begun: tuple[SequenceState, ...] | None
    made: list[StateTensors]
    _latest: tuple[int, StateTensors] | None = field(default=None, init=False)

    def given(self, layer: int) -> StateTensors | None:
        """Return the states before the step in one layer, not to be written.

        They are the same tensors until another layer asks.
        """
        if self.begun is None:
            return None
        if self._latest is None or self._latest[0] != layer:
            self._latest = layer, joined(self.begun, layer)
        return self._latest[1]


class PageLayer(NamedTuple):
    """What the tables of a layer that attends to pages follow from; see `TableKey`."""

    window: int
    section: int
    group: int


@dataclass(slots=True)
class PackedStep:
    """One step, as the attention of each layer and layers with a state of their own need it.

    Attributes:
        cache: the KV cache of the stage.
        first_layer: number of the stage's first layer in the whole model, as its modules count:
            layers that attend twice count as two.
        slices: of the sequences, in the order of the packed row.
        appended: how many times each layer of the stage has called its attention.
        coarse: layers of which products would round the scores too much; kept from step to step.
        groups: all slices, as layers with a state of their own take them.
        updated: how many times each layer of the stage has made new states.
        sections: of the layers, as in `Scoring`; empty: no layer has any.
        lenders: of each layer of the stage, the one whose keys and values it reads, if these are
            another's; likewise numbered within the stage.
        page_layers: of the layers that have attended to pages; kept from step to step.
        tables: where the single tokens write and read in pages; made when a layer asks for them.
        single: the slices of one token.
        chunks: the other slices.
        windows: of the layers that have run: positions that a token sees at most, itself included;
            0 is all.
        made: what one layer has made for others to use again, by what it was made from.
    """

    cache: KVCache
    first_layer: int
    slices: tuple[PackedSlice, ...]
    appended: list[int]
    coarse: set[int] = field(default_factory=set)
    groups: tuple[StateGroup, ...] = ()
    updated: list[int] = field(default_factory=list)
    sections: Sequence[int] = ()
    lenders: Sequence[int | None] = ()
    page_layers: dict[int, PageLayer] = field(default_factory=dict)
    tables: dict[TableKey, TokenTables] = field(default_factory=dict)
    single: tuple[PackedSlice, ...] = field(init=False)
    chunks: tuple[PackedSlice, ...] = field(init=False)
    windows: dict[int, int] = field(default_factory=dict)
    made: dict[object, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.single = tuple(part for part in self.slices if part.num_tokens == 1)
        self.chunks = tuple(part for part in self.slices if part.num_tokens > 1)


def grouped(
    slices: Sequence[PackedSlice], states: Sequence[SequenceState | None], num_layers: int
) -> tuple[StateGroup, ...]:
    """Return slices as layers with a state of their own take them.

    Args:
        slices: of the sequences.
        states: of each of these before its slice; None: it begins there.
        num_layers: of the stage.
    """
    together: dict[object, list[tuple[PackedSlice, SequenceState | None]]] = {}
    for part, state in zip(slices, states, strict=True):
        # What begins is computed in whole pieces of a text, which would take each its memory.
        key = part.row if part.num_tokens > 1 or state is None else "going on"
        together.setdefault(key, []).append((part, state))
    groups = []
    for both in together.values():
        begun = tuple(state for _, state in both if state is not None)
        parts = tuple(part for part, _ in both)
        groups.append(StateGroup(parts, begun or None, [{} for _ in range(num_layers)]))
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How queries and keys make weights.

    Attributes:
        scale: factor of the scores.
        window: positions that a token attends to, itself included; 0 is all.
        softcap: scores become softcap * tanh(score / softcap); or None.
        sinks: [heads], logits that take part in softmax without a value; or None.
        section: positions of the sections that the text is cut into, from its start on; a token
            attends to none before its own. 0: the text is not cut.
        slopes: [heads], by how much the score of a position exceeds that of the one before, the
            rest being equal (ALiBi); what a position adds is rounded to their dtype. Or None.
        source: whether tokens see nothing of the source of their sequence, all of it and nothing
            else, or all of it beside the rest.
        biases: float32 [heads, positions], added to the scores of the last positions, of which a
            token sees no more; or None. Only the C library adds them to single tokens.
    """

    scale: float
    window: int
    softcap: float | None
    sinks: Tensor | None
    section: int = 0
    slopes: Tensor | None = None
    source: Literal["unseen", "alone", "too"] = "unseen"
    biases: Tensor | None = None

    @property
    def most_seen(self) -> int:
        """Positions that a token attends to at most, itself included; 0 is all."""
        return self.window or self.section

    def first_seen(self, position: int) -> int:
        """Return the first position that the token at `position` attends to."""
        if self.section:
            return position - position % self.section
        return max(0, position + 1 - self.window) if self.window else 0

    def seen_by(self, part: PackedSlice) -> list[tuple[int, int]]:
        """Return the positions of its sequence that a slice of one token sees.

        They are spans [first, stop), in order, with others between them.
        """
        if self.source == "alone":
            return [(0, part.source)]
        first = part.source + self.first_seen(part.start - part.source)
        if self.source == "unseen":
            return [(first, part.start + 1)]
        if first == part.source:
            return [(0, part.start + 1)]
        return [(0, part.source), (first, part.start + 1)]


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
