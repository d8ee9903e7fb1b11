"""What one run of a configuration shows, and what several runs show together. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from benchmarks.tuning.configurations import Configuration
from distributed_llm.common.messages import Capabilities


@dataclass(frozen=True)
class LoadFigures:
    """What so many requests at once got.

    Attributes:
        tokens_per_s: of all answers, while so many requests are there; their prompts are computed
            meanwhile.
        answer_s: from asking to the last token, median.
        first_token_s: from asking, median.
        gap_p50_s: between two tokens of an answer; `gap_p99_s` likewise.
        outside_share: of an answer's time, in no stage; for one request at a time only.
        wire_bytes_per_token: all messages of this machine's loopback, per token computed.
        busy: share of the time in which each worker computed.
    """

    tokens_per_s: float
    answer_s: float
    first_token_s: float
    gap_p50_s: float
    gap_p99_s: float
    outside_share: float | None = None
    wire_bytes_per_token: float | None = None
    busy: Mapping[str, float] = field(default_factory=dict)

    @property
    def busiest(self) -> tuple[str, float] | None:
        """The worker that computed most of the time, and its share."""
        return max(self.busy.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class WorkerFacts:
    """A worker, as a run showed it.

    Attributes:
        layer_s: seconds per layer and token, None if it computed nothing.
    """

    name: str
    capabilities: Capabilities
    layer_s: float | None


@dataclass(frozen=True)
class Run:
    """One run of a configuration.

    Attributes:
        loads: by the number of requests at once.
        stages: worker and layers, in the order of the layers.
        answers: token ids of the greedy answers to fixed prompts, asked one by one.
    """

    loads: Mapping[int, LoadFigures]
    stages: tuple[tuple[str, str], ...]
    workers: tuple[WorkerFacts, ...] = ()
    answers: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """All runs of a configuration.

    Attributes:
        failure: why it does not count; empty if it does.
        note: what else is to be known of it.
    """

    configuration: Configuration
    runs: tuple[Run, ...]
    failure: str = ""
    note: str = ""

    @property
    def loads(self) -> dict[int, LoadFigures]:
        """Medians over the runs, by the number of requests at once."""
        if not self.runs:
            return {}
        return {n: _middle([run.loads[n] for run in self.runs]) for n in self.runs[0].loads}

    def spread(self, count: int) -> float:
        """Return (most - least) / median of the tokens/s under a load, over the runs."""
        rates = [run.loads[count].tokens_per_s for run in self.runs]
        return (max(rates) - min(rates)) / median(rates)


@dataclass(frozen=True)
class Heard:
    """An answer as a client heard it: when it asked, and when each token came, seconds."""

    asked_at: float
    times: list[float]


def load_figures(
    askers: Sequence[Sequence[Heard]],
    *,
    outside_share: float | None,
    wire_bytes_per_token: float | None,
    busy: Mapping[str, float],
) -> LoadFigures:
    """Return what some askers show, each of whom asked again as soon as it was answered.

    Args:
        askers: the answers of each, in order.
    """
    answers = [answer for asker in askers for answer in asker]
    began = min(answer.asked_at for answer in answers)
    ended = min(asker[-1].times[-1] for asker in askers)  # from then on there are fewer
    came = sum(at <= ended for answer in answers for at in answer.times)
    gaps = [after - before for one in answers for before, after in pairwise(one.times)] or [0.0]
    return LoadFigures(
        tokens_per_s=came / max(ended - began, 1e-9),
        answer_s=median(answer.times[-1] - answer.asked_at for answer in answers),
        first_token_s=median(answer.times[0] - answer.asked_at for answer in answers),
        gap_p50_s=median(gaps),
        gap_p99_s=quantile(gaps, 0.99),
        outside_share=outside_share,
        wire_bytes_per_token=wire_bytes_per_token,
        busy=busy,
    )


def turns_of(count: int) -> int:
    """Return how often each of so many askers asks: more answers tell more."""
    return 3 if count == 1 else 2


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that this share of the values does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -int(-share * len(ranked) // 1) - 1))]


def _middle(found: Sequence[LoadFigures]) -> LoadFigures:
    return LoadFigures(
        tokens_per_s=median(one.tokens_per_s for one in found),
        answer_s=median(one.answer_s for one in found),
        first_token_s=median(one.first_token_s for one in found),
        gap_p50_s=median(one.gap_p50_s for one in found),
        gap_p99_s=median(one.gap_p99_s for one in found),
        outside_share=_median_or_none([one.outside_share for one in found]),
        wire_bytes_per_token=_median_or_none([one.wire_bytes_per_token for one in found]),
        busy={
            name: median(one.busy.get(name, 0.0) for one in found)
            for name in sorted({name for one in found for name in one.busy})
        },
    )


def _median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
