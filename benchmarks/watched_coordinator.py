"""A coordinator that tells what it expects of its plans.

    DLLM_COORDINATOR__MODEL=FOLDER python -m benchmarks.watched_coordinator

It is `dllm coordinator`, but after its address it prints a line of JSON for every survey: what it
expects of the plan that is served, and of the best one that it knows.

It ends when stdin does.
"""

import asyncio
import os
import sys
import threading
from dataclasses import dataclass

import msgspec

from distributed_llm.common.config import load_settings
from distributed_llm.common.log import configure
from distributed_llm.coordinator import service
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.events import Action, Event, Studied
from distributed_llm.coordinator.planning.forecast import Forecast
from distributed_llm.coordinator.planning.plan_search import FoundPlans
from distributed_llm.coordinator.serve import serve
from distributed_llm.coordinator.speeds.demand import Demand


@dataclass(frozen=True)
class Expected:
    """What a plan is expected to do.

    Attributes:
        layers: "WORKER START-STOP" of each stage.
        slowest_s: of the slowest stage or link, for a step and its share of prompts.
        depth: steps that are under way.
        step_s: from one token of a sequence to its next, on average.
        tokens_per_s: of answers, of all sequences together.
    """

    layers: tuple[str, ...]
    slowest_s: float
    depth: int
    step_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Survey:
    """What one survey has found.

    Attributes:
        epoch: of the plan that is served.
        now: of that plan.
        best: of the best plan; None if nothing fits.
        demand: that it is for.
    """

    epoch: int
    demand: Demand
    now: Expected
    best: Expected | None


def told(findings: FoundPlans) -> Survey:
    """Return what is printed."""
    sequences = findings.search.demand.sequences
    best = findings.best
    return Survey(
        findings.search.epoch,
        findings.search.demand,
        _expected(findings.now, sequences),
        _expected(best, sequences) if best else None,
    )


def _expected(forecast: Forecast, sequences: float) -> Expected:
    layers = tuple(f"{worker} {held}" for worker, held in forecast.layer_map)
    return Expected(
        layers,
        forecast.partition.slowest_s,
        forecast.depth,
        sequences / forecast.tokens_per_s,
        forecast.tokens_per_s,
    )


class WatchedCore(Core):
    """A core that prints what its surveys find."""

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Print what a survey has found; go on as usual."""
        if isinstance(event, Studied) and isinstance(event.answer, FoundPlans):
            print(msgspec.json.encode(told(event.answer)).decode(), flush=True)
        return super().handle(event, now=now)


def _wait_for_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve until a signal, or until stdin ends."""
    settings = load_settings(None, environment=os.environ, overrides={}).coordinator
    configure(settings.log_level)
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()
    service.Core = WatchedCore  # type: ignore[attr-defined]
    code = asyncio.run(serve(settings, on_listening=lambda address: print(address, flush=True)))
    os._exit(code)


if __name__ == "__main__":
    main()
