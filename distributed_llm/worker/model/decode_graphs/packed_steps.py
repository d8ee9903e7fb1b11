"""Computes the decode steps of a stage by graphs."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from distributed_llm.worker.kv.page_tables import TableKey, TokenTables
from distributed_llm.worker.model.decode_graphs.steps import DecodeGraphs, DecodeStep, Given
from distributed_llm.worker.model.kernels import packed_nbytes
from distributed_llm.worker.model.layer_hooks import LayerHooks
from distributed_llm.worker.model.packed_step import PackedStep
from distributed_llm.worker.model.page_attention import host_tables


class GraphedSteps:
    """Makes of packed steps what graphs take.

    Args:
        graphs: of the stage.
        hooks: on the layers.
        layers: of the stage; like the head, not referred to.
        head: that is computed behind them, if any is.
    """

    def __init__(
        self,
        graphs: DecodeGraphs,
        hooks: LayerHooks,
        layers: nn.ModuleList,
        head: nn.Module | None,
    ) -> None:
        self._graphs = graphs
        self._hooks = hooks
        own, beside = _nbytes(layers), 0 if head is None else _nbytes(head)
        self._share = own / (own + beside)

    def run(
        self,
        step: PackedStep,
        given: Given,
        compute: Callable[[PackedStep, Given], Tensor | None],
        plainly: Callable[[], Tensor | None],
    ) -> Tensor | None:
        """Return what a step gives, [tokens, width]; valid until the next step.

        Args:
            step: of single tokens; it may be a graph if all layers attend to pages.
            given: what it is computed from, on the CPU, each [tokens, ...].
            compute: computes a step from tensors on the device.
            plainly: computes it kernel by kernel.
        """
        pages, tables = step.cache.pages, host_tables(step)
        if pages is None or tables is None:
            return plainly()

        def recordable(inputs: Given, there: Mapping[TableKey, TokenTables]) -> Tensor:
            self._hooks.recording = True
            try:
                return _made(compute(_without_sequences(step, there), inputs))
            finally:
                self._hooks.recording = False

        return self._graphs.run(
            DecodeStep(
                given=given,
                tables=tables,
                memory=pages.generation,
                compute=recordable,
                plainly=lambda: _made(plainly()),
                launch=lambda graph: self._hooks.launch(graph, self._share),
            )
        )


def _without_sequences(step: PackedStep, tables: Mapping[TableKey, TokenTables]) -> PackedStep:
    """Return a step like another one, with tables alone: no layer can look at its sequences."""
    return replace(
        step,
        slices=(),
        groups=(),
        appended=[0] * len(step.appended),
        updated=[0] * len(step.updated),
        tables=dict(tables),
        windows={},
        made={},
    )


def _made(output: Tensor | None) -> Tensor:
    assert output is not None
    return output


def _nbytes(module: nn.Module) -> int:
    """Return the bytes that a step reads of a module's weights."""
    return sum(parameter.nbytes for parameter in module.parameters()) + packed_nbytes(module)
