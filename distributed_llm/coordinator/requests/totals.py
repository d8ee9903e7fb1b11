"""Counts of all requests, and how fast they finish. Pure."""

from dataclasses import dataclass

_DECAY = 0.8
"""Weight of the mean interval so far against the latest one."""

_MIN_WAIT_S = 1.0
"""Least estimate of a wait, seconds."""

_MAX_WAIT_S = 600.0
"""Largest estimate of a wait, seconds."""


@dataclass
class Totals:
    """Counts since the coordinator started.

    Attributes:
        finished: requests that were answered completely.
        cancelled: requests that their clients cancelled, or whose clients are gone.
        failed: requests that ended with an error, refused ones included.
        tokens: tokens of all answers.
        prefix_hit_tokens: positions that were shared with another sequence instead of computed.
        preemptions: how often an answer gave up its KV cache to an older one.
    """

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    _finished_at: float | None = None
    _interval_s: float | None = None

    def count_finished(self, *, now: float) -> None:
        """Count a request that was answered completely."""
        self.finished += 1
        if self._finished_at is not None:
            sample = now - self._finished_at
            past = sample if self._interval_s is None else self._interval_s
            self._interval_s = _DECAY * past + (1 - _DECAY) * sample
        self._finished_at = now

    def seconds_for(self, answers: int) -> float:
        """Estimate how long `answers` answers take, by the intervals at which requests finished."""
        wait_s = answers * (self._interval_s or 0.0)
        return min(max(wait_s, _MIN_WAIT_S), _MAX_WAIT_S)
