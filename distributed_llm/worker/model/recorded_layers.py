"""Layers whose decode steps are recorded, and from then on computed by the C library.

Of a decode step on a CPU, a third is spent between the products: in Python, and in operations on a
few numbers each. A layer that decodes does the same each time, with other numbers. So the first
step of some number of rows is recorded while the model's own code computes it, and made a list of
operations on fixed memory. The list is carried out at once for the same inputs, and is used only if
each number that it makes is what the model made, to the last bit.
"""

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.kernels.native.calls import listening
from distributed_llm.worker.model.layer_program import (
    LayerProgram,
    Unrecordable,
    Workspace,
    constants_of,
)
from distributed_llm.worker.model.packed_step import PackedStep, Scoring, running_step
from distributed_llm.worker.model.recording import Recording
from distributed_llm.worker.model.token_attention import make_places

logger = logging.getLogger(__name__)

_MOST_ROWS = 16
"""Rows up to which steps are recorded; with more, products take nearly all of the time."""

Where = tuple[int | str, int | None]
"""An argument, by position or name, and a place in it if it is a tuple."""


def record_layers(
    layers: nn.ModuleList, of_attention: Sequence[bool], device: torch.device, dtype: torch.dtype
) -> None:
    """Have the decode steps of a stage's layers recorded, if that is of use on this machine.

    Args:
        layers: of the stage.
        of_attention: whether keys and values are all that a layer keeps of a sequence.
        device: they compute on.
        dtype: they compute in.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or native.instructions() == "none":
        return
    workspace = Workspace(_MOST_ROWS)
    for number, (layer, fits) in enumerate(zip(layers, of_attention, strict=True)):
        if fits:
            layer.forward = RecordedLayer(layer, number, workspace)


class RecordedLayer:
    """The forward method of a layer.

    Args:
        layer: whose class computes what is not recorded. It is referred to weakly, or its memory
            would be kept until the next garbage collection.
        number: of the layer within the stage.
        workspace: shared by the layers of the stage.
    """

    def __init__(self, layer: nn.Module, number: int, workspace: Workspace) -> None:
        self._layer = weakref.ref(layer)
        self._number = number
        self._workspace = workspace
        self._programs: dict[int, _Program] = {}
        self._recordable = True
        self._has_run = False  # modules may do otherwise when they run for the first time

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        step = running_step()
        rows = len(step.single)
        if step.chunks or rows > _MOST_ROWS or not (self._recordable and self._has_run):
            self._has_run = True
            return self._own(args, kwargs)
        program = self._programs.get(rows)
        if program is None:
            return self._recorded(step, rows, args, kwargs)
        output = program.run(step, args, kwargs)
        return self._own(args, kwargs) if output is None else output

    def _own(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        layer = self._layer()
        assert layer is not None
        return type(layer).forward(layer, *args, **kwargs)

    def _recorded(
        self, step: PackedStep, rows: int, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        layer = self._layer()
        assert layer is not None
        recording = Recording()
        with listening(recording), recording:
            output = self._own(args, kwargs)
        made = _only(output)
        if made is None or not bool(made.isfinite().all()):
            self._recordable = made is not None  # what is no number has many forms
            return output
        try:
            given = dict(_tensors_of(args, kwargs))
            program = LayerProgram(
                *(recording, list(given.values()), made, constants_of(layer)),
                *(self._workspace, rows),
            )
            program.check([list(given.values())[number] for number in program.inputs])
        except Unrecordable as why:
            logger.debug("steps of layer %d are not recorded: %s", self._number, why)
            self._recordable = False
            return output
        where = [list(given)[number] for number in program.inputs]
        plain = _plain(args, kwargs)
        self._programs[rows] = _Program(
            program, self._number, _seen(step, self._number), where, plain, type(output)
        )
        return output


class _Program:
    """A program of a layer, and what has to be as it was when it was recorded.

    Args:
        program: that was recorded.
        number: of the layer within the stage.
        seen: which positions the layer's attention sees, and nothing else of its scoring.
        where: its inputs are in the arguments.
        plain: the arguments that are no tensors.
        returned: type of what the layer returns: a tensor, or a tuple with one.
    """

    def __init__(
        self,
        program: LayerProgram,
        number: int,
        seen: Scoring,
        where: Sequence[Where],
        plain: Sequence[object],
        returned: type,
    ) -> None:
        self._program = program
        self._number = number
        self._seen = seen
        self._where = where
        self._plain = plain
        self._returned = returned

    def run(self, step: PackedStep, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what the layer returns; None if something else is asked for than was recorded."""
        if _plain(args, kwargs) != self._plain:
            return None
        inputs = [_tensor_at(where, args, kwargs) for where in self._where]
        program = self._program
        places = make_places(step, self._number, program.key, program.value, self._seen)
        output = program.run(inputs, places)
        if output is None:
            return None
        step.appended[self._number] += 1
        step.windows[self._number] = self._seen.most_seen
        return (output,) if self._returned is tuple else output


def _seen(step: PackedStep, number: int) -> Scoring:
    """Return which positions the attention of a layer that has run sees."""
    section = step.sections[number] if step.sections else 0
    window = 0 if section else step.windows[number]
    return Scoring(scale=1.0, window=window, softcap=None, sinks=None, section=section)


def _only(output: Any) -> Tensor | None:
    """Return the tensor that a layer returns; None if it returns more than one."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[int | str, object]]:
    yield from enumerate(args)
    yield from kwargs.items()


def _tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Where, Tensor]]:
    """Yield the tensors among arguments, with where they are."""
    for name, value in _arguments(args, kwargs):
        if isinstance(value, Tensor):
            yield (name, None), value
        elif isinstance(value, tuple):
            for place, part in enumerate(value):
                if isinstance(part, Tensor):
                    yield (name, place), part


def _tensor_at(where: Where, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name, place = where
    value = args[name] if isinstance(name, int) else kwargs[name]
    return value if place is None else value[place]


def _plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[object]:
    """Return the arguments that are no tensors, with their names."""
    return [each for each in _arguments(args, kwargs) if not isinstance(each[1], Tensor | tuple)]
