"""Computes decode steps by graphs of a GPU, once these have shown that they compute the same."""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_llm.worker.kv.page_tables import (
    SPARE_SLOT,
    HostTables,
    Piece,
    TableKey,
    TokenTables,
)
from distributed_llm.worker.model.decode_graphs.book import GraphBook
from distributed_llm.worker.model.decode_graphs.buckets import MOST_TOKENS, Bucket, bucket_of
from distributed_llm.worker.model.decode_graphs.capture import Capture
from distributed_llm.worker.model.decode_graphs.static_inputs import StaticInputs
from distributed_llm.worker.model.decode_graphs.watch import NotAGraph, Watch

logger = logging.getLogger(__name__)

_MOST_APART = {torch.float32: 1e-3}
"""By dtype, the relative error of a row (by its norm) that comes of products of other sizes."""

_MOST_APART_IN_16_BITS = 0.2

Given = Mapping[str, Tensor]
"""What a step is computed from beside its tables, by name, each [tokens, ...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """A step of single tokens, and what computes it.

    Attributes:
        given: what it is computed from, on the CPU.
        tables: by which all layers attend.
        memory: equal as long as weights and KV cache lie where they are.
        compute: computes any such step, [tokens, width], from tensors on the device.
        plainly: computes this one as if there were no graphs.
        launch: launches a graph that computes it.
    """

    given: Given
    tables: Mapping[TableKey, HostTables]
    memory: Hashable
    compute: Callable[[Given, Mapping[TableKey, TokenTables]], Tensor]
    plainly: Callable[[], Tensor]
    launch: Callable[[Callable[[], None]], None]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(next(iter(self.given.values())))


@dataclass(frozen=True, slots=True)
class _Graph:
    """A graph, and what it reads and writes.

    Attributes:
        launch: has it computed.
        inputs: that it reads.
        output: [tokens, width], that it writes.
    """

    launch: Callable[[], None]
    inputs: StaticInputs
    output: Tensor


class DecodeGraphs:
    """The graphs of the decode steps of one stage.

    A graph is recorded while it computes what nobody reads, and then launched for a step. Whatever
    it has kept that belongs to what it was recorded with shows: it gives something else than the
    same step without a graph, and graphs are given up. The step is computed as ever beside that.

    Args:
        capture: makes graphs.
        device: that computes.
        room_bytes: of its memory that graphs may take.
    """

    def __init__(self, capture: Capture, device: torch.device, room_bytes: int) -> None:
        self._capture = capture
        self._device = device
        self._book = GraphBook[_Graph](room_bytes)
        self._outputs: Tensor | None = None  # of all graphs, for only one is under way

    def run(self, step: DecodeStep) -> Tensor:
        """Return what a step gives, [tokens, width]; valid until the next step.

        Raises:
            torch.AcceleratorError: the device has failed.
        """
        bucket = bucket_of(step.tables)
        if bucket is None:
            return step.plainly()
        if not self._book.valid_for(step.memory):
            self._outputs = None
        graph = self._book.graph_for(bucket)
        if graph is None:
            return self._tried(bucket, step) if self._book.wants(bucket) else step.plainly()
        graph.inputs.fill(_padded(bucket, step.given, step.tables))
        step.launch(graph.launch)
        return graph.output[: step.tokens]

    def _tried(self, bucket: Bucket, step: DecodeStep) -> Tensor:
        """Return what a step gives; keep a graph for the next ones like it if that gives the same.

        What was asked of the device before is done, and what the graph has taken of its memory is
        measured.
        """
        free = self._capture.free_bytes()
        tried: tuple[_Graph, Tensor] | None = None
        try:
            tried = self._launched(bucket, step)
        except torch.AcceleratorError:
            raise
        except Exception as exc:  # whatever it is, the step can be computed without a graph
            wrong = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        output = step.plainly()
        if tried is not None and _alike(output, tried[1]):
            self._book.keep(bucket, tried[0], free - self._capture.free_bytes())
        else:
            if tried is not None:
                wrong = "rows that make up a number change what others give"
            self._book.refuse(wrong)
        if not len(self._book):
            self._outputs = None
        if self._book.refusal:
            logger.warning(
                "no more decode steps on %s become graphs, %d are: %s",
                *(self._device, len(self._book), self._book.refusal),
            )
        return output

    def _launched(self, bucket: Bucket, step: DecodeStep) -> tuple[_Graph, Tensor]:
        """Return a new graph that was launched for a step, and what that gave.

        Raises:
            NotAGraph: the step computes what no graph can, or the graph gives something else.
            torch.OutOfMemoryError: there is no room for a graph.
        """
        graph = self._recorded(bucket, step)
        graph.inputs.fill(_padded(bucket, step.given, step.tables))
        graph.launch()
        given = graph.output[: step.tokens].clone()
        if not torch.equal(given, _of(bucket, graph.inputs, step)[: step.tokens]):
            raise NotAGraph("a graph gave something else than what it was made of")
        return graph, given

    def _recorded(self, bucket: Bucket, step: DecodeStep) -> _Graph:
        """Return a new graph, that was recorded while nobody's tokens were computed.

        Raises:
            NotAGraph: a step computes what no graph can.
            torch.OutOfMemoryError: there is no room for a graph.
        """
        nobody = {name: part.new_zeros((1, *part.shape[1:])) for name, part in step.given.items()}
        spare = {
            sizes.key: HostTables([SPARE_SLOT], [Piece(SPARE_SLOT, 1, (0,))], sizes.key.group)
            for sizes in bucket.tables
        }
        contents = _padded(bucket, nobody, spare)
        inputs = StaticInputs(contents, self._device)
        inputs.fill(contents)
        made: list[Tensor] = []
        with Watch(self._device):
            self._capture.rehearse(lambda: made.append(_of(bucket, inputs, step)))
        output = self._output_like(made.pop())

        def compute() -> None:
            output.copy_(_of(bucket, inputs, step))

        return _Graph(self._capture.record(compute), inputs, output)

    def _output_like(self, made: Tensor) -> Tensor:
        """Return where a graph writes what is made like this."""
        if self._outputs is None:
            self._outputs = made.new_empty((MOST_TOKENS, *made.shape[1:]))
        return self._outputs[: len(made)]


_TABLES = "tables "


def _of(bucket: Bucket, inputs: StaticInputs, step: DecodeStep) -> Tensor:
    """Compute a step like this one from what lies in the memory that a graph reads."""
    tensors = inputs.tensors
    tables = {
        sizes.key: TokenTables.of(tensors[_name(number)], *sizes[1:])
        for number, sizes in enumerate(bucket.tables)
    }
    return step.compute({name: tensors[name] for name in step.given}, tables)


def _name(number: int) -> str:
    return f"{_TABLES}{number}"


def _padded(bucket: Bucket, given: Given, tables: Mapping[TableKey, HostTables]) -> Given:
    """Return what a graph reads of a step, with more rows than it has tokens."""
    more = bucket.tokens - len(next(iter(given.values())))
    padded = {
        name: F.pad(tensor, (*(0, 0) * (tensor.dim() - 1), 0, more))
        for name, tensor in given.items()
    }
    for number, sizes in enumerate(bucket.tables):
        padded[_name(number)] = tables[sizes.key].packed(sizes.shape)
    return padded


def _alike(one: Tensor, other: Tensor) -> bool:
    """Return whether rows differ by no more than products of other sizes round them."""
    most = _MOST_APART.get(one.dtype, _MOST_APART_IN_16_BITS)
    apart = (one.float() - other.float()).norm(dim=-1)
    return bool((apart <= most * one.float().norm(dim=-1)).all())
