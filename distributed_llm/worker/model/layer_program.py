"""A layer's step as a list of operations on fixed memory, made of what was recorded of it.

Views, which are most of what a layer does, cost nothing: the memory stays where it is. Operations
on bfloat16, products with integers, norms and attention are carried out by the C library, as many
as follow one another in one call; all others by torch, as they were recorded.
"""

import ctypes
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distributed_llm.worker.model.element_operations import elements_of, new_operation
from distributed_llm.worker.model.kernels.native.calls import (
    NO_PLACES,
    AttentionCall,
    ConvolutionCall,
    ExpertsCall,
    LatentCall,
    NativeCall,
    NormCall,
    Places,
    ProductsCall,
    RecurrenceCall,
)
from distributed_llm.worker.model.kernels.native.replay import Kind, Operation, Operations
from distributed_llm.worker.model.program_memory import (
    Constants,
    ProgramMemory,
    Unrecordable,
    Workspace,
)
from distributed_llm.worker.model.recording import (
    Recording,
    TorchCall,
    changed_by,
    made_by,
    tensors_in,
)

_PRODUCTS = {
    "int8_products": Kind.INT8_PRODUCTS,
    "int4_products": Kind.INT4_PRODUCTS,
    "row_products": Kind.ROW_PRODUCTS,
}

_RECURRENCES = {
    "delta_rule": Kind.DELTA_RULE,
    "selective_update": Kind.SELECTIVE_UPDATE,
}

_OF_LATENTS = {
    "absorb_queries": Kind.ABSORB_QUERIES,
    "latent_values": Kind.LATENT_VALUES,
}

_MOST_COPIED = 1 << 19
"""Bytes of a row that may be copied of an input.

Of a larger state, which the C library does not make, torch's operations would need several copies
for as many rows as there is memory for.
"""


@dataclass(frozen=True, slots=True)
class _TorchStep:
    """An operation that torch carries out; what it makes is copied to where others expect it.

    Attributes:
        outputs: where that is; none if the operation changes a tensor.
    """

    function: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    outputs: Sequence[Tensor]

    def run(self, given: int, places: Places) -> None:
        made = self.function(*self.args, **self.kwargs)
        if self.outputs:
            for output, own in zip(self.outputs, tensors_in(made), strict=True):
                output.copy_(own)


class LayerProgram:
    """Computes what a layer computed when it was recorded, for other inputs.

    Args:
        recording: of the layer.
        inputs: tensors that were given to it.
        outputs: that it made of them.
        constants: tensors that stay as they are.
        workspace: to compute in.
        rows: of the step.
        attentions: that the layer has, 0 or 1.

    Attributes:
        inputs: numbers of those inputs that are read, in ascending order.

    Raises:
        Unrecordable: with the reason.
    """

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        constants: Iterable[Tensor],
        workspace: Workspace,
        rows: int,
        attentions: int,
    ) -> None:
        if recording.failure:
            raise Unrecordable(recording.failure)
        attention = [call for call in recording.calls if isinstance(call, AttentionCall)]
        if len(attention) != attentions:
            raise Unrecordable("it has another kind of attention")
        constant = Constants(constants)
        self._calls = constant.folded(recording.calls)
        recurrences = [call for call in self._calls if isinstance(call, RecurrenceCall)]
        elsewhere = {t.data_ptr() for call in recurrences for t in (call.state, call.made)}
        self._memory = ProgramMemory(
            [tensor for tensor in inputs if tensor.data_ptr() not in elsewhere],
            [t for call in self._calls for t in made_by(call) if t.data_ptr() not in elsewhere],
            *(constant, workspace, rows),
        )
        # What lies elsewhere is found by the numbers of what is given and made.
        self._numbers = {tensor.data_ptr(): n for n, tensor in enumerate([*inputs, *outputs])}
        self._held: list[object] = [constant]
        steps = [step for call in self._calls for step in self._steps(call)]
        self._outputs = [
            output.shape if output.data_ptr() in elsewhere else self._own(output)
            for output in outputs
        ]
        self._attended = [tuple(map(self._memory.moved, (c.key, c.value))) for c in attention]
        in_memory = [n for n, tensor in enumerate(inputs) if self._memory.is_read(tensor)]
        if any(inputs[number].nbytes > _MOST_COPIED * rows for number in in_memory):
            raise Unrecordable("it is given too much to be copied")
        given = [n for n, tensor in enumerate(inputs) if tensor.data_ptr() in elsewhere]
        self.inputs = sorted([*in_memory, *given])
        self._shapes = [inputs[number].shape for number in self.inputs]
        self._given = (ctypes.c_void_p * (len(inputs) + len(outputs)))()
        self._first_output = len(inputs)
        copies = [self._copied(number, inputs[number]) for number in in_memory]
        self._steps_in_calls = _in_calls([*copies, *steps])
        self._places = attention[0].places if attention else NO_PLACES

    @property
    def key_and_value(self) -> tuple[Tensor, Tensor]:
        """Memory of what attention appends, [kv_heads, rows, dim] each."""
        ((key, value),) = self._attended
        return key, value

    def run(self, inputs: Sequence[Tensor], places: Places) -> list[Tensor] | None:
        """Return what the layer makes; None if it cannot be computed so.

        Args:
            inputs: those that are read.
            places: of what attention reads; the newest positions are written there.

        Raises:
            MemoryError: there is none for what is made on the way.
        """
        for number, tensor, shape in zip(self.inputs, inputs, self._shapes, strict=True):
            if tensor.shape != shape or not tensor.is_contiguous():
                return None
            self._given[number] = tensor.data_ptr()
        made = [
            each if isinstance(each, Tensor) else torch.empty(each, dtype=torch.float32)
            for each in self._outputs
        ]
        for number, tensor in enumerate(made, start=self._first_output):
            self._given[number] = tensor.data_ptr()
        address = ctypes.addressof(self._given)
        for step in self._steps_in_calls:
            step.run(address, places)
        kept = zip(made, self._outputs, strict=True)
        return [tensor.clone() if tensor is own else tensor for tensor, own in kept]

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Compute what was recorded again, and forget the recording.

        Args:
            inputs: those that are read.

        Raises:
            Unrecordable: some number is another one.
        """
        outputs = self.run(inputs, self._places)
        if outputs is None:
            raise Unrecordable("what it is given lies in pieces")
        for call in self._calls:
            for made in made_by(call):
                if isinstance(call, RecurrenceCall) and made is call.made:
                    again = outputs[self._numbers[made.data_ptr()] - self._first_output]
                else:
                    again = self._memory.moved(made)
                if not _same(made, again):
                    raise Unrecordable(f"{call} gives something else")
        del self._calls, self._numbers

    def _own(self, output: Tensor) -> Tensor:
        """Return the program's own tensor for one that the layer returned."""
        if not (self._memory.is_moved(output) and output.is_contiguous()):
            raise Unrecordable("it returns what it did not make")
        return self._memory.moved(output)

    def _steps(self, call: TorchCall | NativeCall) -> list["Operation | _TorchStep"]:
        """Return what computes again what a call did."""
        match call:
            case NormCall():
                columns = call.states.shape[-1]
                sizes = call.states.numel() // columns, columns, call.kind
                operation = self._operation(Kind.NORM, call.output, call.states, call.weight, sizes)
                operation.number = call.epsilon
                return [operation]
            case ProductsCall():
                return [self._products(call)]
            case ExpertsCall():
                return [self._experts(call)]
            case AttentionCall():
                return [self._attention(call)]
            case LatentCall():
                return [self._of_latents(call)]
            case ConvolutionCall():
                return [self._convolution(call)]
            case RecurrenceCall():
                return [self._recurrence(call)]
        found = elements_of(call)
        if found is None:
            return [self._by_torch(call)]
        operations = []
        for kind, output, first, second, more in found:
            operation = new_operation(kind, output, first, second)
            operation.output = self._memory.address(output)
            operation.first = self._memory.address(first)
            if isinstance(second, Tensor):
                operation.second = self._memory.address(second)
            if more is not None:
                self._held.append(more)
                operation.places[0] = more.data_ptr()
            operations.append(operation)
        return [*operations]

    def _operation(
        self,
        kind: Kind,
        output: Tensor,
        first: Tensor,
        second: Tensor | None = None,
        sizes: Sequence[int] = (),
    ) -> Operation:
        operation = Operation(kind=kind)
        operation.output, operation.first = (
            self._memory.address(output),
            self._memory.address(first),
        )
        operation.second = self._memory.address(second)
        operation.sizes[: len(sizes)] = sizes
        return operation

    def _products(self, call: ProductsCall) -> Operation:
        if call.states.dtype != torch.bfloat16:
            raise Unrecordable("its products are of another dtype")
        kind = _PRODUCTS[call.function]
        sizes = call.count, *call.states.shape, call.instructions, *call.group
        operation = self._operation(kind, call.output, call.states, None, sizes)
        operation.second = call.weights.buffer_info()[0]
        self._held.append(call.weights)
        return operation

    def _experts(self, call: ExpertsCall) -> Operation:
        choices, (rows, inputs) = len(call.chosen), call.states.shape
        sizes = choices, choices // rows, inputs, call.group, call.instructions
        operation = self._operation(Kind.EXPERT_PRODUCTS, call.output, call.states, None, sizes)
        operation.second = call.weights.buffer_info()[0]
        operation.places[0] = self._memory.address(call.chosen)
        operation.number, operation.other = call.count, call.form
        self._held.append(call.weights)
        return operation

    def _attention(self, call: AttentionCall) -> Operation:
        operation = self._operation(Kind.ATTENTION, call.output, call.query, call.key, [call.kept])
        held = (
            self._memory.address(call.sinks),
            self._rotation(call.rotation),
            call.sizes.buffer_info()[0],
        )
        operation.places[:] = [self._memory.address(call.value), *held]
        operation.number, operation.other = call.scale, call.softcap
        self._held.append(call.sizes)
        return operation

    def _of_latents(self, call: LatentCall) -> Operation:
        kind = _OF_LATENTS[call.function]
        operation = self._operation(kind, call.output, call.states, call.weight)
        operation.places[0] = call.sizes.buffer_info()[0]
        self._held.append(call.sizes)
        return operation

    def _convolution(self, call: ConvolutionCall) -> Operation:
        sizes = [int(call.silu)]
        operation = self._operation(Kind.CONVOLUTION, call.output, call.column, call.window, sizes)
        weights = map(self._memory.address, (call.weight, call.bias))
        operation.places[:3] = [*weights, call.sizes.buffer_info()[0]]
        self._held.append(call.sizes)
        return operation

    def _recurrence(self, call: RecurrenceCall) -> Operation:
        operation = Operation(kind=_RECURRENCES[call.function])
        operation.output = self._memory.address(call.output)
        read = array("q", map(self._memory.address, call.read))
        operation.first, operation.second = (each.buffer_info()[0] for each in (read, call.sizes))
        for at, state in enumerate((call.state, call.made)):
            number = self._numbers.get(state.data_ptr())
            if number is None:
                raise Unrecordable("it goes on from a state that it is not given")
            operation.sizes[at] = number
        self._held += [read, call.sizes]
        return operation

    def _rotation(self, rotation: Tensor | None) -> int:
        """Return the address of what queries and keys are turned by, which the KV cache holds."""
        self._held.append(rotation)
        return 0 if rotation is None else rotation.data_ptr()

    def _copied(self, at: int, tensor: Tensor) -> Operation:
        operation = Operation(kind=Kind.INPUT, output=self._memory.address(tensor))
        operation.sizes[:2] = [tensor.nbytes, at]
        return operation

    def _by_torch(self, call: TorchCall) -> _TorchStep:
        kwargs = {name: self._replaced(value) for name, value in call.kwargs.items()}
        args = [self._replaced(value) for value in call.args]
        made = () if changed_by(call) else made_by(call)
        return _TorchStep(call.function, args, kwargs, list(map(self._memory.moved, made)))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._memory.moved(value)
        if isinstance(value, list | tuple):
            return [self._replaced(each) for each in value]
        return value


def _in_calls(steps: Sequence["Operation | _TorchStep"]) -> list["Operations | _TorchStep"]:
    """Put operations together that follow one another."""
    calls: list[Operations | _TorchStep] = []
    together: list[Operation] = []
    for step in steps:
        if isinstance(step, Operation):
            together.append(step)
            continue
        if together:
            calls.append(Operations(together))
            together = []
        calls.append(step)
    return [*calls, Operations(together)] if together else calls


def _same(expected: Tensor, actual: Tensor) -> bool:
    """Return whether two tensors are the same to the last bit."""
    whole, own = (each.contiguous().flatten().view(torch.uint8) for each in (expected, actual))
    return torch.equal(whole, own)
