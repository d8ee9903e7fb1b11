"""A coordinator that tells what it expects of its plans.

    DLLM_COORDINATOR__MODEL=FOLDER python -m benchmarks.watched_coordinator

It is `dllm coordinator`, but after its address it prints a line of JSON for every search for a
better plan: what it expects of the plan that is served, and of the best one.

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
from distributed_llm.coordinator.planning.plan_search import SearchResult
from distributed_llm.coordinator.serve import open_to_serve, serve
from distributed_llm.coordinator.speeds.demand import Demand


@dataclass(frozen=True)
class Expected:
    """What a plan is expected to do.

    Attributes:
        layers: "WORKER START-STOP" of each stage.
        slowest_s: of the slowest stage or link, for a step and its share of prompts.
        depth: steps in flight.
        step_s: from one token of a sequence to its next, on average.
        tokens_per_s: of answers, of all sequences together.
    """

    layers: tuple[str, ...]
    slowest_s: float
    depth: int
    step_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Searched:
    """What one search has found.

    Attributes:
        epoch: of the plan that is served.
        demand: that plans are for.
        served: what the plan that is served is expected to do.
        best: what the best plan is expected to do; None if none fits.
    """

    epoch: int
    demand: Demand
    served: Expected
    best: Expected | None


def searched(result: SearchResult) -> Searched:
    """Return what is printed of a search."""
    sequences = result.search.demand.sequences
    best = result.best
    return Searched(
        result.search.epoch,
        result.search.demand,
        _expected(result.served, sequences),
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
    """A core that prints what its searches find."""

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Print what a search has found; go on as usual."""
        if isinstance(event, Studied) and isinstance(event.reply, SearchResult):
            print(msgspec.json.encode(searched(event.reply)).decode(), flush=True)
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
    opened = open_to_serve(settings)
    code = asyncio.run(
        serve(settings, *opened, on_listening=lambda address: print(address, flush=True))
    )
    os._exit(code)


if __name__ == "__main__":
    main()
