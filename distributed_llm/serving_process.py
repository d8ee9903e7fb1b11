"""How a verb of `dllm` that serves begins: its log, its event loop, and its end with its parent."""

import asyncio
import contextlib
import os
import sys
import threading
from typing import Annotated

import typer

WithParent = Annotated[bool, typer.Option("--exit-with-parent", hidden=True)]


def start_process(log_level: str, exit_with_parent: bool) -> None:
    """Prepare this process to serve.

    Args:
        log_level: of what it logs on stderr.
        exit_with_parent: end once stdin is closed, as it is when the parent ends.
    """
    from distributed_llm.common.log import configure

    configure(log_level)
    if sys.platform == "win32":  # the default loop cannot watch ZeroMQ's file descriptor
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    if exit_with_parent:
        threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    with contextlib.suppress(OSError):  # stdin is closed
        while os.read(0, 1024):  # empty once the parent's end of the pipe is closed
            pass
    os._exit(0)
