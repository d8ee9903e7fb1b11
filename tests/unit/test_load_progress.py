"""The progress of loads, as heartbeats report it: it changes as long as a load gets on."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from distributed_llm.worker.compute.load_progress import LoadProgress


def test_weights_that_are_read_count() -> None:
    progress = LoadProgress()
    before = progress.number
    progress.add(5 << 20)
    assert progress.number >= before + (5 << 20)


def test_what_the_process_writes_counts(tmp_path: Path) -> None:
    """As a download does."""
    progress = LoadProgress()
    before = progress.number
    (tmp_path / "file").write_bytes(bytes(4 << 20))
    assert progress.number >= before + 3


@pytest.mark.parametrize("field", ["read_bytes", "write_bytes", "read_chars", "write_chars"])
def test_what_it_reads_and_writes_counts_by_the_mebibyte(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = dict.fromkeys(("read_bytes", "write_bytes", "read_chars", "write_chars"), 0)
    monkeypatch.setattr(psutil.Process, "io_counters", lambda self: SimpleNamespace(**io))
    progress = LoadProgress()
    io[field] = (1 << 20) - 1
    assert progress.number == 0
    io[field] += 1
    assert progress.number == 1


def unknown(self: psutil.Process) -> None:
    raise AttributeError("io_counters")


def denied(self: psutil.Process) -> None:
    raise psutil.AccessDenied


@pytest.mark.parametrize("asked", [unknown, denied])
def test_where_that_is_not_told_the_time_it_computes_counts(
    asked: Callable[[psutil.Process], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = SimpleNamespace(user=0.2, system=0.2)
    monkeypatch.setattr(psutil.Process, "io_counters", asked)
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda self: times)
    progress = LoadProgress()
    assert progress.number == 0
    times.system = 0.4
    assert progress.number == 1
