"""When a child that ended is started again: after pauses that double. Pure."""

import math

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.wording import duration_text

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0

_WELL_S = 60.0
"""A child that ran for this long did not fail at its start, so pauses begin anew, seconds."""


class Pauses:
    """Starts of one child.

    Attributes:
        start_at: when it is to be started again; infinity for never.
    """

    def __init__(self) -> None:
        self.start_at = math.inf
        self._since: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self._since is not None

    def started(self, now: float) -> None:
        """Take note that it was started."""
        self._since, self.start_at = now, math.inf

    def ended(self) -> float | None:
        """Take note that it ended; return since when it ran."""
        since, self._since = self._since, None
        return since

    def again(self, code: int, now: float, since: float | None) -> str:
        """Return what follows for a child that failed; plan its next start, if there is one.

        Args:
            code: its exit code. One of wrong settings is for a person to mend.
            since: when it was started.
        """
        if code == ConfigError.exit_code:
            return "it is not started again"
        if since is not None and now - since >= _WELL_S:
            self._pause_s = _FIRST_PAUSE_S
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self.start_at = now + pause_s
        return f"it is started again in {duration_text(pause_s)}"

    def never(self) -> None:
        """Start it no more."""
        self.start_at = math.inf
