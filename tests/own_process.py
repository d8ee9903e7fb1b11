"""Runs a part of a test in a process of its own, whose memory no other test has shaped."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def in_own_process(work: Callable[..., object], *arguments: Any) -> None:
    """Call a function of a module in a new process; fail if it raises.

    What it raises is told on stderr.
    """
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=work, args=arguments, daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0
