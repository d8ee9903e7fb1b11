"""Shows the operator of a worker how far its weights have come: a bar, or lines in a log."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from distributed_llm.common.messages import FetchProgress
from distributed_llm.common.wording import fetch_text

logger = logging.getLogger(__name__)

_UPDATE_S = 0.25
_LINE_EVERY_S = 10.0
"""Time between two lines in a log that is no terminal, seconds."""


class FetchDisplay:
    """Shows progress until it is closed; to be made and used in a running event loop.

    Args:
        progress: returns how far the weights have come; None while none are fetched.
    """

    def __init__(self, progress: Callable[[], FetchProgress | None]) -> None:
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._line_at = 0.0
        self._timer = self._loop.call_later(_UPDATE_S, self._update)

    def close(self) -> None:
        """Show nothing any more."""
        self._timer.cancel()
        self._end_bar()

    def _update(self) -> None:
        self._timer = self._loop.call_later(_UPDATE_S, self._update)
        progress = self._progress()
        if progress is None:
            self._end_bar()
            self._line_at = self._loop.time() + _LINE_EVERY_S
            return
        text = fetch_text(
            progress.here_bytes, progress.total_bytes, progress.bytes_per_s, progress.doing
        )
        if sys.stderr.isatty() or self._bar:
            self._show_bar(progress, text)
        elif self._loop.time() >= self._line_at:
            self._line_at = self._loop.time() + _LINE_EVERY_S
            logger.info("weights: %s", text)

    def _show_bar(self, progress: FetchProgress, text: str) -> None:
        if self._bar is None or self._task is None:
            self._bar = Progress(
                BarColumn(bar_width=8),
                TextColumn("{task.percentage:.0f} %"),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(text, total=None)
            self._bar.start()
        total = progress.total_bytes or None
        self._bar.update(self._task, description=text, completed=progress.here_bytes, total=total)

    def _end_bar(self) -> None:
        if self._bar:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()
            self._bar = self._task = None
