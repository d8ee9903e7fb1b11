"""Copies to a device that is made up of the CPU: at once, or as late as the marks allow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Mark:
    """A point in what a device was asked to do."""

    def __init__(self, text: str, reach: Callable[[], None] = lambda: None) -> None:
        self.text = text
        self.synchronize = reach


class MadeUpCopies:
    """Copies within the memory of the CPU; if `late`, only once somebody waits for them.

    Attributes:
        log: what was asked, in words.
        names: of memory, for `log`, by its address.
        buffers: memory of the device.
        locked: addresses of locked memory.
        late: as given.
    """

    def __init__(self, late: bool = False) -> None:
        self.log: list[str] = []
        self.names: dict[int, str] = {}
        self.buffers: list[Tensor] = []
        self.locked: set[int] = set()
        self.late = late
        self._asked: list[tuple[Tensor, Tensor]] = []
        self._copied = self._computed = 0

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.full((nbytes,), 0xFF, dtype=torch.uint8))  # NaN in any dtype
        self.names[self.buffers[-1].data_ptr()] = f"buffer {len(self.buffers)}"
        return self.buffers[-1]

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        names = [self.names.get(memory.data_ptr(), "?") for memory in (source, target)]
        self.log.append(f"{names[0]} to {names[1]} after {after.text}")
        self._asked.append((source, target))
        last = len(self._asked)
        mark = Mark(f"{names[0]} in {names[1]}", lambda: self._copy_until(last))
        if not self.late:
            mark.synchronize()
        return mark

    def _copy_until(self, last: int) -> None:
        for source, target in self._asked[self._copied : last]:
            target.copy_(source)
        self._copied = max(self._copied, last)

    def reached(self) -> Any:
        self._computed += 1
        return Mark(f"point {self._computed}")

    def wait(self, mark: Any) -> None:
        self.log.append(f"wait for {mark.text}")
        mark.synchronize()

    def lock(self, memory: Tensor) -> None:
        self.locked.add(memory.data_ptr())

    def unlock(self, memory: Tensor) -> None:
        under_way = self._asked[self._copied :]
        assert not any(source.data_ptr() == memory.data_ptr() for source, _ in under_way)
        self.locked.remove(memory.data_ptr())
