"""Tunes: on real workers or on a described cluster."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.tuning import provenance
from benchmarks.tuning.calibration import predictions
from benchmarks.tuning.configurations import Configuration, Space, make_space
from benchmarks.tuning.description import Description
from benchmarks.tuning.figures import Outcome, Run
from benchmarks.tuning.measuring import Workload, run_measurement
from benchmarks.tuning.provenance import Provenance
from benchmarks.tuning.recommendation import Goal
from benchmarks.tuning.report import Predictions
from benchmarks.tuning.search import Search, Step
from benchmarks.tuning.served import TunedModel, model_of_files, model_of_shape
from benchmarks.tuning.simulation import KV_TOKENS, Asked, described_site, dtype_of, simulate
from benchmarks.tuning.subsets import subset_configurations
from benchmarks.tuning.workbench import LocalWorker, Unusable, Workbench
from distributed_llm.common.errors import ConfigError, WorkerLost
from distributed_llm.common.wording import size_text

_SIMULATED_AXES = {"replicas": ()}
"""Several pipelines are not simulated."""


@dataclass(frozen=True)
class Wishes:
    """What is tuned for, and how.

    Attributes:
        model: checkpoint folder or hub id; empty is the built-in model.
        values: to try, by setting; also "subsets". A setting that is not there is tried as usual.
        loads: numbers of requests at once, ascending.
        rounds: runs of each configuration.
        limit_s: see `Search`.
        command: that was given, for people.
    """

    model: str
    quick: bool
    values: Mapping[str, Sequence[Any] | None]
    loads: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    limit_s: float | None
    goal: Goal
    command: str

    @property
    def asked(self) -> str:
        """The load for people."""
        counts = ", ".join(map(str, self.loads))
        return (
            f"{counts} requests at once, {self.prompt_tokens} tokens in, {self.new_tokens} out, "
            "greedy, each asked again at once when it was answered"
        )


@dataclass(frozen=True)
class Hands:
    """Who computes.

    Attributes:
        local: workers to start on this machine; none: they join from elsewhere.
        num_workers: to wait for.
        listen: HOST:PORT of the coordinators; empty: any free port of this machine.
        start_timeout_s: after which a configuration that does not serve has failed.
    """

    local: tuple[LocalWorker, ...]
    num_workers: int
    listen: str = ""
    start_timeout_s: float = 300.0


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        left_out: what was not tried, and why.
        predictions: of what was measured, as far as the first run foretells it.
        extra: settings that belong to the chosen ones, such as the model.
    """

    outcomes: tuple[Outcome, ...]
    provenance: Provenance
    model_dtype: str
    simulated: bool
    left_out: tuple[str, ...] = ()
    predictions: Predictions = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def tune(
    wishes: Wishes,
    hands: Hands,
    *,
    on_step: Callable[[Step], None],
    on_wait: Callable[[int, int], None],
) -> Tuned:
    """Run configurations on real workers.

    Args:
        on_step: is told before and after each run.
        on_wait: is told how many workers have joined, and how many are waited for.

    Raises:
        DistributedLLMError: nothing could be run; what failed.
    """
    model = _checked(model_of_files(wishes.model), wishes)
    workload = Workload(
        loads=wishes.loads,
        prompt_tokens=wishes.prompt_tokens,
        new_tokens=wishes.new_tokens,
        vocab_size=model.vocab_size,
        local=bool(hands.local),
    )
    space = _space(wishes, model, hands.num_workers, {})
    with Workbench(
        wishes.model,
        local=hands.local,
        num_workers=hands.num_workers,
        listen=hands.listen,
        start_timeout_s=hands.start_timeout_s,
        on_wait=on_wait,
    ) as workbench:

        def trial(configuration: Configuration) -> Run:
            with workbench.serve(configuration.environment) as address:
                run = run_measurement(address, workload)
            if len(run.workers) < hands.num_workers:
                raise WorkerLost(
                    f"Of {hands.num_workers} workers {len(run.workers)} were left at the end."
                )
            return run

        search = _search(wishes, space, model, trial, on_step, wishes.rounds)
        try:
            outcomes = search.run()
        except Unusable as unusable:
            raise unusable.error from None
    facts = next(one.runs[0].workers for one in outcomes if one.runs)
    settings = {worker.name: _settings_text(worker) for worker in hands.local}
    return Tuned(
        outcomes=tuple(outcomes),
        provenance=Provenance(
            command=wishes.command,
            model=model.name,
            machine=provenance.machine(),
            versions=provenance.versions(),
            workers=tuple(
                provenance.worker_line(worker, settings.get(worker.name, "")) for worker in facts
            ),
            asked=wishes.asked,
            how=f"{wishes.rounds} rounds in turns, each warmed up; medians"
            + ("; all workers share this machine" if hands.local else ""),
        ),
        model_dtype=model.dtype,
        simulated=False,
        left_out=tuple(search.left_out),
        predictions=predictions(
            outcomes, model, Asked(wishes.loads, wishes.prompt_tokens, wishes.new_tokens)
        ),
        extra=_extra(wishes.model, hands.listen),
    )


def tune_described(
    wishes: Wishes, description: Description, *, on_step: Callable[[Step], None]
) -> Tuned:
    """Predict what configurations would do on a described cluster.

    Raises:
        DistributedLLMError: the model fits in no way, or cannot be read.
    """
    shape = description.model
    if shape and wishes.model:
        raise ConfigError(
            "--model and the section `model` of the described cluster both name a model; leave one "
            "of them out."
        )
    model = _checked(model_of_shape(shape) if shape else model_of_files(wishes.model), wishes)
    asked = Asked(wishes.loads, wishes.prompt_tokens, wishes.new_tokens)
    space = _space(wishes, model, len(description.workers), _SIMULATED_AXES)
    known: dict[Configuration, Run] = {}

    def trial(configuration: Configuration) -> Run:
        if configuration not in known:
            dtype = dtype_of(configuration, model)
            site = described_site(description, model.cost(dtype), dtype)
            known[configuration] = simulate(configuration, model, site, asked)
        return known[configuration]

    search = _search(wishes, space, model, trial, on_step, 1, again=False)
    outcomes = search.run()
    return Tuned(
        outcomes=tuple(outcomes),
        provenance=Provenance(
            command=wishes.command,
            model=model.name,
            machine="",
            versions=provenance.versions(),
            workers=tuple(
                f"{name}: {size_text(worker.memory)} for layers and KV cache, reads "
                f"{worker.memory_bandwidth / 1e9:g} GB/s, {worker.flops / 1e12:g} TFLOPS, slowdown "
                f"{worker.slowdown:g}"
                for name, worker in description.workers.items()
            ),
            asked=wishes.asked,
            how="predicted: the planner and the scheduler are the real ones, machines and time are "
            "simulated; strategy speed with one pipeline, as it is once all has been measured",
        ),
        model_dtype=model.dtype,
        simulated=True,
        left_out=tuple(search.left_out),
        extra=_extra(wishes.model, ""),
    )


def _search(
    wishes: Wishes,
    space: Space,
    model: TunedModel,
    trial: Callable[[Configuration], Run],
    on_step: Callable[[Step], None],
    rounds: int,
    *,
    again: bool = True,
) -> Search:
    def subsets(start: Configuration, run: Run) -> list[Configuration]:
        cost = model.cost(model.dtype)
        room = min(KV_TOKENS, model.context_length)
        return subset_configurations(start, space.subsets, run.workers, cost, room)

    return Search(
        space,
        trial,
        subsets=subsets,
        model_dtype=model.dtype,
        goal=wishes.goal,
        rounds=rounds,
        again=again,
        limit_s=wishes.limit_s,
        clock=time.monotonic,
        on_step=on_step,
    )


def _space(
    wishes: Wishes, model: TunedModel, num_workers: int, never: Mapping[str, Sequence[Any]]
) -> Space:
    for name in never:
        if wishes.values.get(name) is not None:
            raise ConfigError(f"{name} is not simulated; leave --{name.replace('_', '-')} out.")
    return make_space(
        quick=wishes.quick,
        given={**wishes.values, **never},
        num_workers=num_workers,
        most_requests=max(wishes.loads),
        model_dtype=model.dtype,
    )


def _checked(model: TunedModel, wishes: Wishes) -> TunedModel:
    """Return the model if it can read and write as much as it will be asked to.

    Raises:
        ConfigError: its context is too short.
    """
    wanted = wishes.prompt_tokens + wishes.new_tokens
    if wanted > model.context_length:
        raise ConfigError(
            f"--prompt-tokens {wishes.prompt_tokens} and --new-tokens {wishes.new_tokens} are "
            f"{wanted} tokens, but the context of {model.name} is {model.context_length}. Ask for "
            "less."
        )
    return model


def _extra(model: str, listen: str) -> dict[str, str]:
    return {name: value for name, value in (("model", model), ("bind", listen)) if value}


def _settings_text(worker: LocalWorker) -> str:
    return ", ".join(f"{name} {value}" for name, value in worker.settings.items())
