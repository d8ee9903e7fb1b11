"""Counts of all requests, and how fast they finish. Pure."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from distributed_llm.common.messages import Histogram, Latencies

_DECAY = 0.8
"""Weight of the mean interval so far against the latest one."""

_MIN_WAIT_S = 1.0
"""Least estimate of a wait, seconds."""

_MAX_WAIT_S = 600.0
"""Largest estimate of a wait, seconds."""


_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""Bounds of times to the first token; those of vLLM, like the following."""

_WHOLE_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Bounds of times that requests wait or take as a whole."""

_BETWEEN_TOKENS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0),
)
"""Bounds of times from a token to the next."""


class TimeCounts:
    """Counts times by buckets.

    Args:
        bounds_s: upper bounds of the buckets, included, ascending.
    """

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one time."""
        self._counts[bisect_left(self._bounds_s, seconds)] += 1
        self._sum_s += seconds

    @property
    def histogram(self) -> Histogram:
        """What was counted so far."""
        return Histogram(bounds_s=self._bounds_s, counts=tuple(self._counts), sum_s=self._sum_s)


class RequestTimes:
    """Counts how long requests and their parts take.

    Attributes:
        queue: from the arrival of a request until an answer was first admitted.
        first_token: from the arrival of a request until the first token of an answer.
        between_tokens: from each token of an answer to the next.
        whole: from the arrival of a request that finished until then.
    """

    def __init__(self) -> None:
        self.queue = TimeCounts(_WHOLE_S)
        self.first_token = TimeCounts(_FIRST_TOKEN_S)
        self.between_tokens = TimeCounts(_BETWEEN_TOKENS_S)
        self.whole = TimeCounts(_WHOLE_S)

    @property
    def latencies(self) -> Latencies:
        """What was counted so far."""
        return Latencies(
            queue=self.queue.histogram,
            first_token=self.first_token.histogram,
            between_tokens=self.between_tokens.histogram,
            whole=self.whole.histogram,
        )


@dataclass
class Totals:
    """Counts since the coordinator started.

    Attributes:
        finished: requests that were answered completely.
        cancelled: requests that their clients cancelled, or whose clients are gone.
        failed: requests that ended with an error, refused ones included.
        failures: the failed ones, by the code of the error.
        prompt_tokens: tokens of the prompts of accepted requests.
        tokens: tokens of all answers.
        prefix_query_tokens: tokens that were looked up among prefixes.
        prefix_hit_tokens: positions that were shared with another sequence instead of computed.
        preemptions: how often an answer gave up its KV cache to an older one.
        steps: that were completed.
        prompt_steps: those of them with parts of prompts.
        activation_bytes: that went from stage to stage in them.
        recovered: answers that lost their KV cache with a pipeline, and were computed again.
        times: how long requests took.
    """

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_steps: int = 0
    activation_bytes: int = 0
    recovered: int = 0
    times: RequestTimes = field(default_factory=RequestTimes, compare=False)
    _finished_at: float | None = None
    _interval_s: float | None = None

    def count_step(self, activation_bytes: int, *, decodes: bool) -> None:
        """Count a step that was completed."""
        self.steps += 1
        self.prompt_steps += not decodes
        self.activation_bytes += activation_bytes

    def count_failed(self, code: str) -> None:
        """Count a request that ended with an error."""
        self.failed += 1
        self.failures[code] += 1

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
