"""A layer's step as a list of operations on fixed memory, made of what was recorded of it.

Views, which are most of what a layer does, cost nothing: the memory stays where it is. Operations
on bfloat16, products with integers, norms and attention are carried out by the C library, as many
as follow one another in one call; all others by torch, as they were recorded.
"""

import ctypes
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.element_operations import elements_of, new_operation
from distributed_llm.worker.model.kernels import OpaqueWeights
from distributed_llm.worker.model.kernels.native.calls import (
    AttentionCall,
    ExpertsCall,
    NativeCall,
    NormCall,
    Places,
    ProductsCall,
)
from distributed_llm.worker.model.kernels.native.replay import Kind, Operation, Operations
from distributed_llm.worker.model.recording import Recording, TorchCall, made_by, tensors_in

_ALIGNMENT = 64

_PRODUCTS = {
    "int8_products": Kind.INT8_PRODUCTS,
    "int4_products": Kind.INT4_PRODUCTS,
    "row_products": Kind.ROW_PRODUCTS,
}


class Unrecordable(Exception):
    """A step cannot be made a program of."""


class Workspace:
    """Memory that all layers of a stage compute in, one after another.

    Args:
        most_rows: for which there is room.
    """

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, nbytes: int, rows: int) -> Tensor:
        """Return memory for a step of so many rows, uint8 [at least nbytes]."""
        if self._memory.nbytes < nbytes:
            room = -(-nbytes // rows) * self._most_rows
            self._memory = torch.empty(room, dtype=torch.uint8)
        return self._memory


@dataclass(slots=True)
class _Region:
    """Where the recorded step had something, and where the program has it, as addresses."""

    start: int
    stop: int
    moved: int
    used: bool = False


@dataclass(frozen=True, slots=True)
class _TorchStep:
    """An operation that torch carries out; what it makes is copied to where others expect it."""

    function: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    outputs: Sequence[Tensor]

    def run(self, inputs: int, places: Places) -> None:
        made = tensors_in(self.function(*self.args, **self.kwargs))
        for output, own in zip(self.outputs, made, strict=True):
            if output is not own:  # it was changed where it lies
                output.copy_(own)


class LayerProgram:
    """Computes what a layer computed when it was recorded, for other inputs.

    Args:
        recording: of the layer.
        inputs: tensors that were given to it.
        output: that it returned.
        constants: tensors that stay as they are.
        workspace: to compute in.
        rows: of the step.

    Attributes:
        inputs: numbers of those inputs that are read.
        key: memory of the keys, [kv_heads, rows, dim].
        value: likewise.

    Raises:
        Unrecordable: with the reason.
    """

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[Tensor],
        output: Tensor,
        constants: Iterable[Tensor],
        workspace: Workspace,
        rows: int,
    ) -> None:
        if recording.failure:
            raise Unrecordable(recording.failure)
        attention = [call for call in recording.calls if isinstance(call, AttentionCall)]
        if len(attention) != 1:
            raise Unrecordable("it has another kind of attention")
        self._recorded = recording
        self._constants = _Constants(constants)
        self._held: list[object] = []
        self._lay_out(inputs, workspace, rows)
        steps = [step for call in recording.calls for step in self._steps(call)]
        if not self._is_moved(output) or not output.is_contiguous():
            raise Unrecordable("it returns what it did not make")
        self.key, self.value = self._moved(attention[0].key), self._moved(attention[0].value)
        self._output = self._moved(output)
        self.inputs = [n for n, region in enumerate(self._regions[: len(inputs)]) if region.used]
        self._shapes = [inputs[number].shape for number in self.inputs]
        self._addresses = (ctypes.c_void_p * len(self.inputs))()
        copies = [self._copied(at, inputs[number]) for at, number in enumerate(self.inputs)]
        self._calls = _in_calls([*copies, *steps])
        self._places = attention[0].places

    def run(self, inputs: Sequence[Tensor], places: Places) -> Tensor | None:
        """Return what the layer returns; None if it cannot be computed so.

        Args:
            inputs: those that are read.
            places: of what attention reads; the newest positions are written there.

        Raises:
            MemoryError: there is none for what is made on the way.
        """
        for at, (tensor, shape) in enumerate(zip(inputs, self._shapes, strict=True)):
            if tensor.shape != shape or not tensor.is_contiguous():
                return None
            self._addresses[at] = tensor.data_ptr()
        address = ctypes.addressof(self._addresses)
        for step in self._calls:
            step.run(address, places)
        return self._output.clone()

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Compute what was recorded again, and forget the recording.

        Args:
            inputs: those that are read.

        Raises:
            Unrecordable: some number is another one.
        """
        self.run(inputs, self._places)
        for call in self._recorded.calls:
            if not all(_same(made, self._moved(made)) for made in made_by(call)):
                raise Unrecordable(f"{call} gives something else")
        del self._recorded, self._regions

    # ------------------------------------------------------------------ memory

    def _lay_out(self, inputs: Sequence[Tensor], workspace: Workspace, rows: int) -> None:
        """Give a place to all that is given to the layer, and to all that it makes."""
        spans = [(tensor.data_ptr(), tensor.nbytes) for tensor in inputs]
        for made in itertools.chain.from_iterable(map(made_by, self._recorded.calls)):
            storage = made.untyped_storage()
            spans.append((storage.data_ptr(), storage.nbytes()))
        offsets, size = [], 0
        for _, nbytes in spans:
            offsets.append(size)
            size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = workspace.of(size, rows)
        base = self._memory.data_ptr()
        self._regions = [
            _Region(start, start + nbytes, base + offset)
            for (start, nbytes), offset in zip(spans, offsets, strict=True)
        ]

    def _region(self, tensor: Tensor) -> _Region | None:
        address = tensor.data_ptr()
        for region in self._regions:
            if region.start <= address < region.stop:
                region.used = True
                return region
        return None

    def _is_moved(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and self._region(tensor) is not None

    def _address(self, tensor: Tensor | None) -> int:
        """Return where the program has a tensor; 0 for None."""
        if tensor is None:
            return 0
        region = self._region(tensor)
        if region is not None:
            return region.moved + tensor.data_ptr() - region.start
        return self._constants.checked(tensor).data_ptr()

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return the program's own tensor for one that was recorded."""
        if not self._is_moved(tensor):
            return self._constants.checked(tensor)
        start = self._address(tensor) - self._memory.data_ptr()
        numbers = self._memory[start - start % _ALIGNMENT :]
        itemsize = tensor.element_size()
        whole = numbers[: numbers.nbytes // itemsize * itemsize].view(tensor.dtype)
        offset = whole.storage_offset() + start % _ALIGNMENT // itemsize
        return whole.as_strided(tensor.shape, tensor.stride(), offset)

    # ------------------------------------------------------------------ operations

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
        found = elements_of(call)
        if found is None:
            return [self._by_torch(call)]
        operations = []
        for kind, output, first, second, more in found:
            operation = new_operation(kind, output, first, second)
            operation.output = self._address(output)
            operation.first = self._address(first)
            if isinstance(second, Tensor):
                operation.second = self._address(second)
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
        operation.output, operation.first = self._address(output), self._address(first)
        operation.second = self._address(second)
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
        operation.places[0] = self._address(call.chosen)
        operation.number, operation.other = call.count, call.form
        self._held.append(call.weights)
        return operation

    def _attention(self, call: AttentionCall) -> Operation:
        operation = self._operation(Kind.ATTENTION, call.output, call.query, call.key, [call.kept])
        held = self._address(call.sinks), self._rotation(call.rotation), call.sizes.buffer_info()[0]
        operation.places[:] = [self._address(call.value), *held]
        operation.number, operation.other = call.scale, call.softcap
        self._held.append(call.sizes)
        return operation

    def _rotation(self, rotation: Tensor | None) -> int:
        """Return the address of what queries and keys are turned by, which the KV cache holds."""
        self._held.append(rotation)
        return 0 if rotation is None else rotation.data_ptr()

    def _copied(self, at: int, tensor: Tensor) -> Operation:
        operation = Operation(kind=Kind.INPUT, output=self._address(tensor))
        operation.sizes[:2] = [tensor.nbytes, at]
        return operation

    def _by_torch(self, call: TorchCall) -> _TorchStep:
        kwargs = {name: self._replaced(value) for name, value in call.kwargs.items()}
        args = [self._replaced(value) for value in call.args]
        return _TorchStep(call.function, args, kwargs, list(map(self._moved, made_by(call))))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._moved(value)
        if isinstance(value, list | tuple):
            return [self._replaced(each) for each in value]
        return value


class _Constants:
    """Tensors that stay as they are.

    Args:
        tensors: all of them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._ids: set[int] = set()
        self._places: set[int] = set()
        for tensor in tensors:
            self._ids.add(id(tensor))
            if tensor.layout == torch.strided:
                self._places.add(tensor.untyped_storage().data_ptr())

    def checked(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is one of them, or a view of one.

        Raises:
            Unrecordable: it is not.
        """
        strided = tensor.layout == torch.strided
        if id(tensor) in self._ids:
            return tensor
        if strided and tensor.untyped_storage().data_ptr() in self._places:
            return tensor
        raise Unrecordable(
            f"it reads a tensor {list(tensor.shape)} that it neither has nor is given"
        )


def constants_of(layer: nn.Module) -> Iterable[Tensor]:
    """Yield the tensors that a layer's modules hold."""
    for module in layer.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        if isinstance(module, OpaqueWeights):
            yield from tensors_in(module.tensors())


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
