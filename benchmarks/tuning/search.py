"""The search: coordinate by coordinate from the defaults, not every combination.

One setting after another is varied, the others as they were found best so far. The values of a
setting run in turns (A B C A B C), so that a machine that becomes slower meanwhile makes all of
them slower; what was best so far runs again with them. A value is taken over if it is better by
more than the noise. What is missed: settings that help only together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.tuning.agreement import check_answers
from benchmarks.tuning.configurations import Axis, Configuration, Space
from benchmarks.tuning.figures import Outcome, Run
from benchmarks.tuning.recommendation import Goal, best
from distributed_llm.common.errors import DistributedLLMError

_WORKERS = "numbers of workers"


@dataclass(frozen=True)
class Step:
    """What the search is about to do, or has done.

    Attributes:
        number: of the run, from 1; `planned` of them in all, as it looks now.
        outcome: of the configuration so far; None before the run.
        left_s: what the rest takes, None before the first run has ended.
    """

    number: int
    planned: int
    configuration: Configuration
    outcome: Outcome | None
    left_s: float | None


class Search:
    """Tries configurations and keeps what became of them.

    Args:
        space: what to try.
        trial: runs a configuration.
        subsets: gives the configurations with fewer workers, from the one that is best so far and
            its latest run.
        model_dtype: of the checkpoint.
        goal: what is to be good.
        rounds: runs of each configuration.
        again: what is best so far runs again beside others; not needed where nothing is random.
        limit_s: nothing is begun that would end later than this after the end of the first run,
            which may have waited for the workers; None: no limit.
        clock: seconds.
        on_step: is told before and after each run.
    """

    def __init__(
        self,
        space: Space,
        trial: Callable[[Configuration], Run],
        *,
        subsets: Callable[[Configuration, Run], Sequence[Configuration]],
        model_dtype: str,
        goal: Goal,
        rounds: int,
        again: bool,
        limit_s: float | None,
        clock: Callable[[], float],
        on_step: Callable[[Step], None],
    ) -> None:
        self._space, self._trial, self._subsets = space, trial, subsets
        self._model_dtype, self._goal, self._rounds = model_dtype, goal, rounds
        self._again = again
        self._limit_s, self._clock, self._on_step = limit_s, clock, on_step
        self._took_s: list[float] = []
        self._first_ended_at = 0.0  # it had to wait for the workers
        self._runs: dict[Configuration, list[Run]] = {}
        self._failures: dict[Configuration, DistributedLLMError] = {}
        others = {axis.name: len(axis.values) - 1 for axis in space.axes}
        others[_WORKERS] = len(space.subsets)
        self._ahead = {name: rounds * (n + again) for name, n in others.items() if n}
        self._rest = 0  # runs of what is varied now
        self.left_out: list[str] = []

    @property
    def outcomes(self) -> list[Outcome]:
        """All configurations in the order in which they were tried."""
        tried = [
            Outcome(one, tuple(runs), _sentence(self._failures.get(one)))
            for one, runs in self._runs.items()
        ]
        return check_answers(tried, self._model_dtype)

    def run(self) -> list[Outcome]:
        """Return what became of all configurations.

        Raises:
            DistributedLLMError: none of those that were tried first runs.
        """
        best_so_far = self._space.baseline
        for axis in self._space.axes:
            if axis.name in ("dtype", "wire_dtype"):
                continue
            best_so_far = self._vary(axis.name, best_so_far, _variants(best_so_far, axis))
            if axis.name == "strategy":
                best_so_far = self._vary_subsets(best_so_far)
        if not self._runs:
            best_so_far = self._vary("all as it is", best_so_far, [])
        for axis in self._space.axes:  # last, since other answers are not taken over
            if axis.name in ("dtype", "wire_dtype"):
                self._vary(axis.name, best_so_far, _variants(best_so_far, axis))
        return self.outcomes

    def _vary_subsets(self, start: Configuration) -> Configuration:
        if not self._space.subsets:
            return start
        found = self._subsets(start, self._runs[start][-1])
        if len(found) < len(self._space.subsets):
            self.left_out.append("some numbers of workers, since the model does not fit them")
        return self._vary(_WORKERS, start, found)

    def _vary(
        self, name: str, start: Configuration, others: Sequence[Configuration]
    ) -> Configuration:
        """Run `start` and others in turns; return the best of them."""
        self._ahead.pop(name, None)
        if not others and self._runs:
            return start
        wanted = [start, *others]
        for turn in range(self._rounds):
            due = [one for one in wanted if self._is_due(one)]
            self._rest = len(due) * (self._rounds - turn)
            if self._too_late(len(due)):
                when = f"from round {turn + 1} of {self._rounds} on" if turn else "at all"
                self.left_out.append(f"{name} {when}, for want of time")
                self._rest = 0
                break
            for configuration in due:
                self._try(configuration)
            if all(one in self._failures for one in self._runs):
                raise self._failures[start]
        return self._best_of(start, wanted)

    def _is_due(self, configuration: Configuration) -> bool:
        """Say whether a run of a configuration would tell anything."""
        return configuration not in self._failures and (
            self._again or configuration not in self._runs
        )

    def _best_of(self, start: Configuration, wanted: Sequence[Configuration]) -> Configuration:
        tried = [one for one in self.outcomes if one.configuration in wanted and not one.failure]
        return best(tried, self._goal).configuration if tried else start

    def _try(self, configuration: Configuration) -> None:
        self._tell(configuration, len(self._took_s) + 1, None)
        began_at = self._clock()
        runs = self._runs.setdefault(configuration, [])
        try:
            runs.append(self._trial(configuration))
        except DistributedLLMError as error:
            self._failures[configuration] = error
        self._took_s.append(self._clock() - began_at)
        if len(self._took_s) == 1:
            self._first_ended_at = self._clock()
        self._rest -= 1
        failure = _sentence(self._failures.get(configuration))
        outcome = Outcome(configuration, tuple(runs), failure)
        self._tell(configuration, len(self._took_s), outcome)

    def _tell(self, configuration: Configuration, number: int, outcome: Outcome | None) -> None:
        left = self._rest + sum(self._ahead.values())
        left_s = left * median(self._took_s) if self._took_s else None
        planned = len(self._took_s) + left
        self._on_step(Step(number, planned, configuration, outcome, left_s))

    def _too_late(self, runs: int) -> bool:
        """Say whether so many more runs would take longer than the limit."""
        if self._limit_s is None or not self._took_s:
            return False
        elapsed_s = self._clock() - self._first_ended_at
        return elapsed_s + runs * median(self._took_s) > self._limit_s


def _variants(start: Configuration, axis: Axis) -> list[Configuration]:
    """Return `start` with the other values of an axis, as far as they can change anything."""
    if axis.name == "objective" and start.strategy != "speed":
        return []
    if axis.name == "replicas" and start.strategy == "custom":
        return []
    others = [replace(start, **{axis.name: value}) for value in axis.values]
    return [one for one in others if one != start]


def _sentence(error: DistributedLLMError | None) -> str:
    return "" if error is None else str(error).strip().split("\n", 1)[0]
