"""The progress of loads: a number for heartbeats that changes as long as a load is getting on.

A load looks for files, may download them, compares samples of them, reads tensors and converts
them. Much of that happens in libraries, so what the whole process reads and writes counts too.
"""

import psutil

_IO_UNIT_BYTES = 1 << 20
"""Bytes that the process reads or writes until that counts, as heartbeats and the log do so too."""

_CPU_UNIT_S = 0.5
"""CPU time that counts where the system does not tell what a process reads and writes, seconds."""


class LoadProgress:
    """Counts what loads do. Threads that load write it, the event loop's thread reads it."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = 0

    def add(self, amount: int) -> None:
        """Count bytes of weights that are being read, or another sign that a load gets on."""
        self._done += amount

    @property
    def number(self) -> int:
        """Changes as long as a load gets on; nothing else about it means anything."""
        return self._done + self._process_number()

    def _process_number(self) -> int:
        try:
            io = self._process.io_counters()
            # Calls, also for what is cached; and blocks on disks and network drives, also of files
            # that are mapped.
            calls = getattr(io, "read_chars", 0) + getattr(io, "write_chars", 0)
            return int(io.read_bytes + io.write_bytes + calls) // _IO_UNIT_BYTES
        except (AttributeError, NotImplementedError, psutil.Error, OSError, RuntimeError):  # macOS
            times = self._process.cpu_times()
            return int((times.user + times.system) / _CPU_UNIT_S)
