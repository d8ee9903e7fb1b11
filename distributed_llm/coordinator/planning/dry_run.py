"""Dry run: who would serve which layers, and how fast, without starting anything. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.formats import WeightFormats
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages import Capabilities, Name
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import ITEM_BYTES
from distributed_llm.common.types import WorkerId
from distributed_llm.common.units import parse_flops, parse_rate, parse_size
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import Plan, layer_map_of, longest_tokens_of
from distributed_llm.coordinator.planning.advice import Advice, advise
from distributed_llm.coordinator.planning.forecast import forecast, score
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.measurements import Measurements

MANY = 16
"""Concurrent requests for which `DryRun.many_tokens_per_s` is predicted."""

_POSITIONS = 256
"""Positions of the request for which `DryRun.one_tokens_per_s` is predicted."""

_MEMORY_BYTES_PER_S = 20e9
"""Assumed memory bandwidth of a machine if none is given: an ordinary laptop's."""

_LEAST_BYTES = 1024
"""Memory below which a unit was forgotten."""

_DISK_BYTES_PER_S = 1e9
"""Assumed rate at which a disk is read: an ordinary SSD's."""

_RAM_BYTES_PER_S = 12e9
"""Assumed rate at which a GPU is sent weights: 8 lanes of PCIe 4, or 16 of PCIe 3."""

_RAM = "ram:"
"""Begins the memory beside a GPU in the text of a machine."""

_FLOPS_PER_BYTE = 25.0
"""Assumed operations per byte that memory delivers, if none are given."""


@dataclass(frozen=True)
class DryRun:
    """What a coordinator would do with these machines.

    Attributes:
        cost: of the model, quantized as it is planned.
        full_bytes: of all weights if they were not quantized any further.
        formats: of the weights; None if unknown.
        kv_dtype: how keys and values are kept.
        longest_tokens: of each plan, positions of the longest request that it can hold.
        plans: one per pipeline; no machine serves in two.
        memory: bytes of each machine.
        one_tokens_per_s: rate of a single request while it decodes.
        many_tokens_per_s: rate of `MANY` concurrent requests, with prompts as long as answers.
        advice: by machine, for strategy "speed"; else empty.
        assumed: texts that say what was assumed because it was not given.
    """

    cost: ModelCost
    plans: tuple[Plan, ...]
    memory: Mapping[WorkerId, int]
    one_tokens_per_s: float
    many_tokens_per_s: float
    advice: Mapping[WorkerId, Advice]
    assumed: tuple[str, ...]
    full_bytes: int = 0
    formats: WeightFormats | None = None
    kv_dtype: KVDtype = "auto"
    longest_tokens: tuple[int, ...] = ()


def dry_run(
    model: ServedModel,
    workers: Sequence[str],
    settings: CoordinatorSettings,
    full: ModelCost | None = None,
) -> DryRun:
    """Return what a coordinator would do with workers before it has measured them.

    Args:
        model: to serve.
        workers: "[NAME=]SIZE[+DISK][,BANDWIDTH[,FLOPS]]" of each, such as
            "pc=8GiB,40GB/s,1.5TFLOPS" or "old=4GiB+20GiB".
        settings: of the coordinator.
        full: cost of the model if its weights were not quantized any further, if it does not fit.

    Raises:
        NotEnoughMemory: with how much is missing and what would fit.
        ConfigError: a worker's text is malformed, its name is not unique, or some have a speed
            and others have none.
    """
    capabilities = _workers(workers)
    measurements = Measurements(
        model.cost,
        item_bytes=ITEM_BYTES[model.dtype],
        bytes_per_token=model.activation_bytes,
    )
    for worker, machine in capabilities.items():
        measurements.joined(worker, machine)
    planner = Planner.from_settings(model, settings)
    machines = measurements.machines(
        {worker: model.planned(machine).memory_bytes for worker, machine in capabilities.items()}
    )
    plans = planner.plans(machines)
    cost = model.cost_at(plans[0][0].quantize)
    if cost is not model.cost:
        return dry_run(replace(model, cost=cost, smaller=()), workers, settings, model.cost)
    by_speed = settings.strategy == "speed"
    used = planner.machines_of(plans, machines)
    one = Demand(sequences=1, positions=_POSITIONS, prompt_tokens=0, chunk_tokens=1)
    many = Demand.expected(-(-MANY // len(plans)))
    return DryRun(
        model.cost,
        tuple(plans),
        {worker: machine.memory_bytes for worker, machine in capabilities.items()},
        one_tokens_per_s=max(_rates(model.cost, used, plans, one)),
        many_tokens_per_s=sum(_rates(model.cost, used, plans, many)),
        advice=_advice(planner, machines, plans) if by_speed else {},
        assumed=_assumed(workers),
        full_bytes=(full or cost).all_weight_bytes,
        formats=model.formats.get(cost.quantize),
        kv_dtype=model.kv_dtype,
        longest_tokens=tuple(
            min(
                longest_tokens_of(plan, cost, settings.max_batch_tokens),
                model.defaults.context_length,
            )
            for plan in plans
        ),
    )


def _rates(
    cost: ModelCost, machines: Machines, plans: Sequence[Plan], demand: Demand
) -> list[float]:
    return [forecast(cost, machines, layer_map_of(plan), demand).tokens_per_s for plan in plans]


def _advice(planner: Planner, machines: Machines, plans: Sequence[Plan]) -> dict[WorkerId, Advice]:
    """Return what each machine is worth to its pipeline, or to the one that it helps most."""
    cost, used = planner.cost, {stage.worker for plan in plans for stage in plan}

    def score_of(plan: Plan) -> float:
        some = machines.subset([stage.worker for stage in plan])
        demand = Demand.expected(len(plan))
        return score(cost, some, layer_map_of(plan), demand, objective=planner.objective)

    scores = [score_of(plan) for plan in plans]
    advices: dict[WorkerId, Advice] = {}
    for plan, own_score in zip(plans, scores, strict=True):
        own = {stage.worker for stage in plan}
        group = [worker for worker in machines.memory_bytes if worker in own or worker not in used]
        group_advice = advise(
            cost,
            machines.subset(group),
            Demand.expected(len(group)),
            objective=planner.objective,
            kv_tokens=planner.kv_tokens(machines.subset(group).memory_bytes),
            least_kv_tokens=planner.least_kv_tokens,
            beside_tokens_per_s=sum(scores) - own_score,
        )
        for worker, advice in (group_advice or {}).items():
            before = advices.get(worker)
            if before is None or (before.gain or 0.0) < (advice.gain or 0.0):
                advices[worker] = advice
    return advices


# ------------------------------------------------------------------ machines from texts


def _workers(texts: Sequence[str]) -> dict[WorkerId, Capabilities]:
    workers = [_worker(text, number) for number, text in enumerate(texts, 1)]
    names = [name for name, _ in workers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--worker {twice}: there are two of this name. Give each its own.")
    known, unknown = ([text for text in texts if ("," in text) is has] for has in (True, False))
    if known and unknown:
        raise ConfigError(
            f"--worker {unknown[0]}: it has no speed, but {known[0]} has one. Give all workers a "
            "speed, such as pc=8GiB,40GB/s,1.5TFLOPS, or none."
        )
    return dict(workers)


def _worker(text: str, number: int) -> tuple[WorkerId, Capabilities]:
    name, _, what = text.rpartition("=")
    size, *speeds = (part.strip() for part in what.split(","))
    try:
        if name:
            msgspec.convert(name, Name)
        memory_bytes, ram_bytes, disk_bytes = _rooms(size)
        bytes_per_s = parse_rate(speeds[0]) if speeds else _MEMORY_BYTES_PER_S
        flops_per_s = parse_flops(speeds[1]) if speeds[1:] else _FLOPS_PER_BYTE * bytes_per_s
    except msgspec.ValidationError as exc:
        raise ConfigError(
            f"--worker {text}: {name!r} cannot be a worker's name; "
            "letters, digits, '.', '_' and '-' make one, up to 64."
        ) from exc
    except ValueError as exc:
        raise ConfigError(f"--worker {text}: {exc}.") from exc
    if not memory_bytes or speeds[2:]:
        raise ConfigError(
            f"--worker {text}: write [NAME=]SIZE[+ram:RAM][+DISK][,BANDWIDTH[,FLOPS]], such as "
            "512MiB, mac=2GiB or pc=8GiB,40GB/s,1.5TFLOPS; DISK is room for layers that do not "
            "fit, and RAM that of a GPU's machine."
        )
    if memory_bytes < _LEAST_BYTES:
        raise ConfigError(
            f"--worker {text}: {memory_bytes} bytes are no machine's memory; write a unit, such as "
            "8GiB."
        )
    worker = WorkerId(name or f"worker-{number}")
    capabilities = Capabilities(
        device="",
        device_name="",
        platform="",
        memory_bytes=memory_bytes,
        cores=1,
        threads=1,
        memory_bandwidth_bytes_per_s=bytes_per_s,
        flops_per_s=flops_per_s,
        offload_bytes=ram_bytes + disk_bytes,
        disk_bytes_per_s=_DISK_BYTES_PER_S if disk_bytes else None,
        ram_bytes=ram_bytes,
        ram_bytes_per_s=_RAM_BYTES_PER_S if ram_bytes else None,
    )
    return worker, capabilities


def _rooms(text: str) -> tuple[int, int, int]:
    """Return the bytes of memory, of RAM beside a GPU, and of disk in "8GiB+ram:30GiB+100GiB".

    Raises:
        ValueError: a part is no size.
    """
    memory, _, more = text.partition("+")
    first, _, rest = more.partition("+")
    if not first.startswith(_RAM):
        first, rest = "", more
    sizes = (parse_size(part) for part in (memory, first.removeprefix(_RAM), rest))
    memory_bytes, ram_bytes, disk_bytes = (size or 0 for size in sizes)
    return memory_bytes, ram_bytes, disk_bytes


def _assumed(workers: Sequence[str]) -> tuple[str, ...]:
    links = "links of 1 Gbit/s and 0.5 ms"
    if any(_RAM in text for text in workers):
        links = f"{links}, GPUs that are sent {_RAM_BYTES_PER_S / 1e9:.0f} GB/s"
    if any("+" in text.replace(f"+{_RAM}", "") for text in workers):
        links = f"{links}, disks of {_DISK_BYTES_PER_S / 1e9:.0f} GB/s"
    if all(text.count(",") == 0 for text in workers):
        return ("workers that are all alike, 20 GB/s and 0.5 TFLOPS", links)
    if any(text.count(",") == 1 for text in workers):
        return (f"{_FLOPS_PER_BYTE:.0f} FLOPS per byte/s where none are given", links)
    return (links,)
