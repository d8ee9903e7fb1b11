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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distributed_llm.worker.kv.states import StateTensors
from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.kernels.native.calls import NO_PLACES, listening
from distributed_llm.worker.model.layer_program import LayerProgram
from distributed_llm.worker.model.packed_step import PackedStep, Scoring, running_step
from distributed_llm.worker.model.program_memory import Unrecordable, Workspace, constants_of
from distributed_llm.worker.model.recording import Recording
from distributed_llm.worker.model.token_attention import make_places

logger = logging.getLogger(__name__)

_MOST_ROWS = 16
"""Rows up to which steps are recorded; with more, products take nearly all of the time."""

Where = tuple[int | str, int | None]
"""An argument, by position or name, and a place in it if it is a tuple."""


class Kept(NamedTuple):
    """What a layer keeps of a sequence.

    Attributes:
        positions: keys and values of each, by one attention.
        state: of its own.
    """

    positions: bool
    state: bool


def record_layers(
    layers: nn.ModuleList, kept: Sequence[Kept | None], device: torch.device, dtype: torch.dtype
) -> None:
    """Have the decode steps of a stage's layers recorded, if that is of use on this machine.

    Args:
        layers: of the stage.
        kept: what each of them keeps; None: it depends on more than that and what it is given.
        device: they compute on.
        dtype: they compute in.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or native.instructions() == "none":
        return
    workspace = Workspace(_MOST_ROWS)
    for number, (layer, keeps) in enumerate(zip(layers, kept, strict=True)):
        if keeps is not None:
            layer.forward = RecordedLayer(layer, number, keeps, workspace)


class RecordedLayer:
    """The forward method of a layer.

    Args:
        layer: whose class computes what is not recorded. It is referred to weakly, or its memory
            would be kept until the next garbage collection.
        number: of the layer within the stage.
        keeps: what it keeps of a sequence.
        workspace: shared by the layers of the stage.
    """

    def __init__(self, layer: nn.Module, number: int, keeps: Kept, workspace: Workspace) -> None:
        self._layer = weakref.ref(layer)
        self._number = number
        self._keeps = keeps
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
        states = self._states_before(step)
        if states is None:
            return self._own(args, kwargs)
        program = self._programs.get(rows)
        if program is None:
            return self._recorded(step, rows, states, args, kwargs)
        output = program.run(step, states, args, kwargs)
        return self._own(args, kwargs) if output is None else output

    def _own(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        layer = self._layer()
        assert layer is not None
        return type(layer).forward(layer, *args, **kwargs)

    def _states_before(self, step: PackedStep) -> StateTensors | None:
        """Return the states that all sequences go on from; None if some begin."""
        if not self._keeps.state:
            return {}
        return step.groups[0].given(self._number) if len(step.groups) == 1 else None

    def _recorded(
        self,
        step: PackedStep,
        rows: int,
        states: StateTensors,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
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
            inputs = [*given.values(), *states.values()]
            new = step.groups[0].made[self._number] if self._keeps.state else {}
            program = LayerProgram(
                *(recording, inputs, [made, *new.values()], constants_of(layer)),
                *(self._workspace, rows, int(self._keeps.positions)),
            )
            program.check([inputs[number] for number in program.inputs])
        except Unrecordable as why:
            logger.debug("steps of layer %d are not recorded: %s", self._number, why)
            self._recordable = False
            return output
        args_read = len([number for number in program.inputs if number < len(given)])
        names = [list(states)[number - len(given)] for number in program.inputs[args_read:]]
        self._programs[rows] = _Program(
            program=program,
            number=self._number,
            seen=_seen(step, self._number) if self._keeps.positions else None,
            where=[list(given)[number] for number in program.inputs[:args_read]],
            read=names,
            made=list(new),
            plain=_plain(args, kwargs),
            beside=None if isinstance(output, Tensor) else output[1:],
        )
        return output


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    """A program of a layer, and what has to be as it was when it was recorded.

    Attributes:
        program: that was recorded.
        number: of the layer within the stage.
        seen: which positions the layer's attention sees, and nothing else of its scoring; None if
            it has none.
        where: in the arguments its first inputs are.
        read: names of the states that are its other inputs.
        made: names of the states that it makes.
        plain: the arguments that are no tensors.
        beside: what the layer returns behind its tensor, all None; or None if no tuple.
    """

    program: LayerProgram
    number: int
    seen: Scoring | None
    where: Sequence[Where]
    read: Sequence[str]
    made: Sequence[str]
    plain: Sequence[object]
    beside: tuple[None, ...] | None

    def run(
        self,
        step: PackedStep,
        states: StateTensors,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Return what the layer returns; None if something else is asked for than was recorded."""
        if _plain(args, kwargs) != self.plain:
            return None
        inputs = [_tensor_at(where, args, kwargs) for where in self.where]
        inputs += [states[name] for name in self.read]
        places = NO_PLACES
        if self.seen is not None:
            key, value = self.program.key_and_value
            places = make_places(step, self.number, key, value, self.seen)
        outputs = self.program.run(inputs, places)
        if outputs is None:
            return None
        output, *new = outputs
        if self.seen is not None:
            step.appended[self.number] += 1
            step.windows[self.number] = self.seen.most_seen
        if self.made:
            step.updated[self.number] += 1
            step.groups[0].made[self.number] = dict(zip(self.made, new, strict=True))
        return output if self.beside is None else (output, *self.beside)


def _seen(step: PackedStep, number: int) -> Scoring:
    """Return which positions the attention of a layer that has run sees."""
    section = step.sections[number] if step.sections else 0
    window = 0 if section else step.windows[number]
    return Scoring(scale=1.0, window=window, softcap=None, sinks=None, section=section)


def _only(output: Any) -> Tensor | None:
    """Return the tensor that a layer returns; None if it returns more than one."""
    if isinstance(output, tuple) and not any(each is not None for each in output[1:]):
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
