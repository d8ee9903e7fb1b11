"""What one run foretells of all others: its machines, for the simulation. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from benchmarks.tuning.configurations import Configuration
from benchmarks.tuning.description import Link
from benchmarks.tuning.figures import Outcome
from benchmarks.tuning.report import Predictions
from benchmarks.tuning.served import TunedModel
from benchmarks.tuning.simulation import Asked, Machine, Site, simulate
from benchmarks.tuning.subsets import layer_seconds
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName
from distributed_llm.common.units import parse_layers
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.speeds.worker_speed import Prior

_LOOPBACK = "1GB/s"


def predictions(outcomes: Sequence[Outcome], model: TunedModel, asked: Asked) -> Predictions:
    """Return the tokens/s that the first run of one pipeline foretells of all in its dtype.

    What it knows is the speed of each worker's layers, and the time outside the stages, for one
    request at a time; batching, waiting and other cuts of the layers are foretold.
    """
    sound = [one for one in outcomes if not one.failure and _as_served(one)]
    first = next(iter(sound), None)
    if first is None or 1 not in first.loads:
        return {}
    site = measured_site(first, model.cost(model.dtype), model.dtype)
    found = {}
    for one in sound:
        served = _as_served(one)
        if served is None or one.configuration.dtype != first.configuration.dtype:
            continue
        try:
            run = simulate(served, model, site, asked)
        except DistributedLLMError:  # the report does without
            continue
        found[one.configuration] = {n: loads.tokens_per_s for n, loads in run.loads.items()}
    return found


def measured_site(outcome: Outcome, cost: ModelCost, dtype: DtypeName) -> Site:
    """Return the machines of a run as the simulation takes them."""
    run = outcome.runs[0]
    seconds = layer_seconds(run.workers)
    machines = {}
    for worker in run.workers:
        prior = Prior.from_capabilities(worker.capabilities, cost, ITEM_BYTES[dtype])
        layer_s = max(0.0, seconds[worker.name] - prior.token_s)
        prior = replace(prior, layer_s=layer_s, head_s=0.0, head_token_s=0.0)  # is measured with it
        machines[worker.name] = Machine(worker.capabilities, prior, 0.0)
    alone = outcome.loads[1]
    messages = len(run.stages) + 1
    latency_s = (alone.outside_share or 0.0) * alone.gap_p50_s / messages
    return Site(machines, {}, Link.model_validate({"latency": latency_s, "bandwidth": _LOOPBACK}))


def _as_served(outcome: Outcome) -> Configuration | None:
    """Return a configuration with the layers as they were served; None for several pipelines."""
    run = outcome.runs[-1]
    ranges = [parse_layers(held) for _, held in run.stages]
    if any(before.stop != after.start for before, after in pairwise(ranges)):
        return None
    return replace(
        outcome.configuration,
        strategy="custom",
        objective="auto",
        layers=run.stages,
        replicas="auto",
    )
