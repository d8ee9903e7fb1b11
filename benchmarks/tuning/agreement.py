"""Whether configurations that must give the same answers do. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from benchmarks.tuning.configurations import Configuration
from benchmarks.tuning.figures import Outcome, Run

Answers = tuple[tuple[int, ...], ...]


def check_answers(outcomes: Sequence[Outcome], model_dtype: str) -> list[Outcome]:
    """Return the outcomes, of which those with other answers than most have failed.

    Greedy answers are compared among configurations that compute and send in the same dtypes. In
    float32 they must be the same everywhere. In a narrower dtype two kinds of machines may round
    otherwise, so with workers of several kinds a difference is noted and nothing more.
    """
    kinds = {kind_of(one.configuration, model_dtype) for one in outcomes}
    expected = {
        kind: _most_common(
            run.answers
            for one in outcomes
            if kind_of(one.configuration, model_dtype) == kind
            for run in one.runs
        )
        for kind in kinds
    }
    return [_checked(one, expected, model_dtype) for one in outcomes]


def kind_of(configuration: Configuration, model_dtype: str) -> tuple[str, str]:
    """Return the dtypes in which a configuration computes and sends."""
    dtype = model_dtype if configuration.dtype == "auto" else configuration.dtype
    wire = dtype if configuration.wire_dtype == "auto" else configuration.wire_dtype
    return dtype, wire


def _most_common(answers: Iterable[Answers]) -> Answers:
    counts = Counter(found for found in answers if found)
    return counts.most_common(1)[0][0] if counts else ()


def _checked(
    outcome: Outcome, expected: Mapping[tuple[str, str], Answers], model_dtype: str
) -> Outcome:
    kind = kind_of(outcome.configuration, model_dtype)
    right = expected[kind]
    for run in outcome.runs:
        where = _difference(run.answers, right)
        if not where or outcome.failure:
            continue
        if kind[0] != "float32" and _are_mixed(run):
            return replace(outcome, note=f"answers differ {where}: machines round differently")
        return replace(outcome, failure=f"gives other answers than most configurations, {where}")
    return outcome


def _difference(found: Answers, right: Answers) -> str:
    """Return where the first difference is; empty if there is none."""
    for number, (ours, theirs) in enumerate(zip(found, right, strict=False), 1):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
            if a != b:
                return f"from token {place} of prompt {number} on ({a}, not {b})"
        if len(ours) != len(theirs):
            return f"in the length of answer {number} ({len(ours)}, not {len(theirs)} tokens)"
    return ""


def _are_mixed(run: Run) -> bool:
    kinds = {(w.capabilities.device, w.capabilities.device_name) for w in run.workers}
    return len(kinds) > 1
