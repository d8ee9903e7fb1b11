"""Graphs of a device that is made up of the CPU: operations recorded, and carried out again.

They are as strict as those of a GPU, and stricter where that would be wrong without a word:

- a step that looks at numbers cannot be recorded;
- what the CPU made during a recording was sent from memory that is gone afterwards, so there is
  nonsense in it;
- memory that was freed after a recording is memory of others, so it must not be computed with;
- what is made in between is nonsense once a graph has ended, but for what its caller holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_ATEN = torch.ops.aten

_WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

_LOOKS = frozenset(
    {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.pin_memory, Tensor.item}
)

NOT_PERMITTED = "operation not permitted when stream is capturing"


class MadeUpCapture:
    """`Capture` on the CPU.

    Attributes:
        recorded: how many graphs were made.
        replayed: how many times one was launched.
        free: bytes of memory that are free.
        graph_bytes: that a graph takes.
        failure: what the next recording raises in its midst.
    """

    def __init__(self, free: int = 1 << 40, graph_bytes: int = 1 << 20) -> None:
        self.recorded = self.replayed = 0
        self.free = free
        self.graph_bytes = graph_bytes
        self.failure: Exception | None = None

    def rehearse(self, compute: Callable[[], None]) -> None:
        compute()

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        graph = _Graph()
        with _Looking(), graph:
            compute()
        graph.end()
        self.recorded += 1
        self.free -= self.graph_bytes

        def replay() -> None:
            self.replayed += 1
            graph.replay()

        return replay

    def free_bytes(self) -> int:
        return self.free


class _Looking(TorchFunctionMode):
    """Forbids what reads numbers and is no operation of torch's on a CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _LOOKS:
            raise RuntimeError(f"{NOT_PERMITTED}: {func}")
        return func(*args, **(kwargs or {}))


class _Elsewhere:
    """A tensor in memory that a graph does not hold.

    Args:
        tensor: to be found again.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        self._dtype = tensor.dtype

    def found(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise AssertionError("a graph computes with memory that was freed")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)


class _Graph(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is computed while this is entered, to be computed again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, list[Tensor | None]]] = []
        self._own: dict[int, torch.UntypedStorage] = {}  # that were made in the recording
        self._hosts: dict[int, Tensor] = {}  # likewise, by the CPU

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        by_index = func in (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default)
        counts = by_index and any(tensor.dtype == torch.bool for tensor in given[1:])
        if counts or (not by_index and any(tag in func.tags for tag in _WAITS)):
            raise RuntimeError(f"{NOT_PERMITTED}: {func}")
        with torch._C.DisableTorchFunction():  # what the operation does by itself is its own affair
            output = func(*args, **kwargs)
        made = [value for value in tree_flatten(output)[0] if isinstance(value, Tensor)]
        if func is _ATEN.lift_fresh.default or self._of_the_cpu(given, kwargs):
            self._hosts.update((_place(tensor), tensor) for tensor in made)
            return output
        self._own.update((_place(t), t.untyped_storage()) for t in made if self._is_new(t, given))
        own = [tensor if _place(tensor) in self._own else None for tensor in made]
        self._calls.append((func, tree_map(self._kept, (args, kwargs)), own))
        return output

    def _of_the_cpu(self, given: Sequence[Tensor], kwargs: Any) -> bool:
        if given:
            return all(_place(tensor) in self._hosts for tensor in given)
        return kwargs.get("device") is None

    def _is_new(self, tensor: Tensor, given: Sequence[Tensor]) -> bool:
        known = _place(tensor) in self._own
        return not known and all(_place(tensor) != _place(other) for other in given)

    def _kept(self, value: Any) -> Any:
        """Return what is kept of an argument; only memory of the recording is held."""
        if not isinstance(value, Tensor) or _place(value) in self._own:
            return value
        return value if _place(value) in self._hosts else _Elsewhere(value)

    def end(self) -> None:
        """Forget what the CPU has made, as it does once it has sent it."""
        for tensor in self._hosts.values():
            if tensor.dim():
                _spoil(tensor.untyped_storage())

    def replay(self) -> None:
        """Compute all of it again."""
        for func, arguments, made in self._calls:
            args, kwargs = tree_map(_found, arguments)
            output = func(*args, **kwargs)
            again = [value for value in tree_flatten(output)[0] if isinstance(value, Tensor)]
            for old, new in zip(made, again, strict=True):
                if old is not None and _place(old) != _place(new):
                    old.copy_(new)
        for storage in self._own.values():
            _spoil(storage)


def _found(value: Any) -> Any:
    return value.found() if isinstance(value, _Elsewhere) else value


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _spoil(storage: torch.UntypedStorage) -> None:
    """Write what is no number in any dtype, and no place in any table."""
    if storage.nbytes():
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0x7F)
