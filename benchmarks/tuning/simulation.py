"""Predicts what a configuration would do: the production planner and core, simulated machines.

The plan comes from the planner that the coordinator uses. Strategy speed gets the plan that it
would come to once it has measured everything. The core then schedules the requests on a virtual
clock (see `benchmarks/virtual_cluster`), where a task takes what reading its layers, computing its
tokens and reading its KV cache take, one after the other, and a message takes the latency of its
link and the time of its bytes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from benchmarks.scenario import Scenario
from benchmarks.tuning.configurations import Configuration
from benchmarks.tuning.description import Description, Link
from benchmarks.tuning.figures import Heard, LoadFigures, Run, WorkerFacts, load_figures, turns_of
from benchmarks.tuning.served import TunedModel
from benchmarks.virtual_client import VirtualClient
from benchmarks.virtual_cluster import VirtualCluster
from benchmarks.virtual_worker import CONNECT_S, VirtualWorker
from distributed_llm.common.errors import NotEnoughMemory, error_from_wire
from distributed_llm.common.messages import (
    Capabilities,
    Finished,
    ModelSource,
    RequestFailed,
    Task,
    TokenChunk,
    ToNextWorker,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.settings import CoordinatorSettings, Objective
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName, Frame
from distributed_llm.common.types import LayerRange, PeerId, WorkerId
from distributed_llm.common.units import parse_layers
from distributed_llm.coordinator.core import Core
from distributed_llm.coordinator.model import GenerationDefaults, ServedModel
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.tables import Hop, Links
from distributed_llm.coordinator.planning.forecast import best_forecast
from distributed_llm.coordinator.planning.strategies import StaticStrategy, make_plan
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed
from distributed_llm.worker.session import link_events as links

KV_TOKENS = 1024
"""Positions of KV cache that every plan has room for: the coordinator's `min_kv_tokens`."""

_KV_OF_STAGE = 1 << 30
_ITEM_BYTES = 4
"""Of a token id that the last stage sends to the coordinator."""


@dataclass(frozen=True)
class Machine:
    """A worker that is simulated.

    Attributes:
        prior: what its layers take.
        task_s: what any task takes on it.
    """

    capabilities: Capabilities
    prior: Prior
    task_s: float


@dataclass(frozen=True)
class Site:
    """Machines and what is between them.

    Attributes:
        machines: by name.
        links: by two names; `usual` between all others, and to the coordinator.
    """

    machines: Mapping[str, Machine]
    links: Mapping[frozenset[str], Link]
    usual: Link

    def link(self, one: str, other: str) -> Link:
        """Return the connection between two machines."""
        return self.links.get(frozenset((one, other)), self.usual)


@dataclass(frozen=True)
class Asked:
    """What is asked of a configuration; see `measuring.Workload`."""

    loads: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


def described_site(description: Description, cost: ModelCost, dtype: DtypeName) -> Site:
    """Return a described cluster as it computes a model in this dtype."""
    machines = {}
    for name, worker in description.workers.items():
        capabilities = Capabilities(
            device="cpu",
            device_name="described",
            platform="",
            memory_bytes=worker.memory,
            cores=1,
            threads=1,
            memory_bandwidth_bytes_per_s=worker.memory_bandwidth / worker.slowdown,
            flops_per_s=worker.flops / worker.slowdown,
        )
        prior = Prior.from_capabilities(capabilities, cost, ITEM_BYTES[dtype])
        machines[name] = Machine(capabilities, prior, worker.task * worker.slowdown)
    links = {
        frozenset(pair.split("/")): link
        for pair, link in description.links.items()
        if pair != "default"
    }
    return Site(machines, links, description.links.get("default", Link()))


def simulate(configuration: Configuration, model: TunedModel, site: Site, asked: Asked) -> Run:
    """Return what a run of a configuration is expected to show; the same each time.

    Raises:
        DistributedLLMError: the model does not fit, or requests do not.
    """
    dtype = dtype_of(configuration, model)
    wire = cast(
        DtypeName, dtype if configuration.wire_dtype == "auto" else configuration.wire_dtype
    )
    cost = model.cost(dtype)
    bytes_per_token = model.hidden_size * ITEM_BYTES[wire]
    stages = plan(configuration, cost, site, asked, bytes_per_token)
    clusters = {
        count: _run(configuration, stages, model, dtype, bytes_per_token, site, asked, count)
        for count in asked.loads
    }
    return Run(
        loads={count: _figures(cluster, asked, len(stages)) for count, cluster in clusters.items()},
        stages=tuple((str(worker), str(held)) for worker, held in stages),
        workers=_facts(site, clusters[min(asked.loads)]),
    )


def dtype_of(configuration: Configuration, model: TunedModel) -> DtypeName:
    """Return what a configuration computes in."""
    if configuration.dtype == "auto":
        return model.dtype
    return cast(DtypeName, configuration.dtype)


def _facts(site: Site, cluster: "_Cluster") -> tuple[WorkerFacts, ...]:
    """Return the machines as a run shows them: what a stage takes, per layer."""
    took_s = {
        peer.decode(): worker.busy_s / cluster.steps / cluster.layers_of[peer.decode()]
        for peer, worker in cluster.workers.items()
    }
    return tuple(
        WorkerFacts(name, machine.capabilities, took_s.get(name))
        for name, machine in site.machines.items()
    )


# ------------------------------------------------------------------ the plan


def plan(
    configuration: Configuration,
    cost: ModelCost,
    site: Site,
    asked: Asked,
    bytes_per_token: int,
) -> list[tuple[WorkerId, LayerRange]]:
    """Return who serves what under a configuration.

    Raises:
        NotEnoughMemory: the model does not fit.
        ConfigError: layers that were named do not cover the model.
    """
    memory = {WorkerId(n): m.capabilities.memory_bytes for n, m in site.machines.items()}
    if configuration.strategy != "speed":
        layers = {name: parse_layers(held) for name, held in configuration.layers}
        stages = make_plan(
            cost,
            memory,
            strategy=cast(StaticStrategy, configuration.strategy),
            kv_tokens=KV_TOKENS,
            layers=layers,
        )
        return [(stage.worker, stage.layers) for stage in stages]
    most = max(asked.loads)
    demand = Demand(
        sequences=most,
        positions=asked.prompt_tokens + asked.new_tokens / 2,
        prompt_tokens=asked.prompt_tokens / asked.new_tokens,
        chunk_tokens=min(most * asked.prompt_tokens, configuration.max_batch_tokens),
    )
    machines = Machines(
        memory,
        {WorkerId(name): WorkerSpeed(machine.prior) for name, machine in site.machines.items()},
        lambda tokens: _links(site, tokens * bytes_per_token),
    )
    objective = cast(Objective, configuration.objective)
    best = best_forecast(cost, machines, demand, objective=objective, kv_tokens=KV_TOKENS)
    if best is None:
        make_plan(cost, memory, strategy="memory", kv_tokens=KV_TOKENS)  # says what is missing
        raise NotEnoughMemory("No partition of the layers fits the workers.")
    return list(best.layer_map)


def _links(site: Site, size: float) -> Links:
    """Return what so many bytes take between all machines."""
    known = {
        (WorkerId(one), WorkerId(other)): _hop(link, size)
        for pair, link in site.links.items()
        for one, other in (sorted(pair), sorted(pair, reverse=True))
    }
    return Links(_hop(site.usual, size), known)


def _hop(link: Link, size: float) -> Hop:
    return Hop(link.latency, size / link.bandwidth)


# ------------------------------------------------------------------ the run


def _run(
    configuration: Configuration,
    stages: Sequence[tuple[WorkerId, LayerRange]],
    model: TunedModel,
    dtype: DtypeName,
    bytes_per_token: int,
    site: Site,
    asked: Asked,
    count: int,
) -> "_Cluster":
    scenario = Scenario(
        workers=len(stages),
        requests=count * turns_of(count),
        clients=1,
        prompt=asked.prompt_tokens,
        answer=asked.new_tokens,
        batch=configuration.max_batch_sequences,
        chunk=configuration.max_batch_tokens,
        kv_tokens=_KV_OF_STAGE,
        join_s=0.0,
    )
    served = ServedModel(
        name=model.name,
        source=ModelSource(kind="builtin", name=""),
        dtype=dtype,
        wire_dtype=dtype,
        cost=model.cost(dtype),
        hidden_size=model.hidden_size,
        defaults=GenerationDefaults(
            model.context_length, model.vocab_size, (), SamplingParams(temperature=0.0)
        ),
        digest=str,
    )
    cluster = _Cluster(scenario, site, stages, served, bytes_per_token, count)
    cluster.start()
    cluster.ask()
    return cluster


class _Cluster(VirtualCluster):
    """A virtual cluster of given machines, with given layers."""

    def __init__(
        self,
        scenario: Scenario,
        site: Site,
        stages: Sequence[tuple[WorkerId, LayerRange]],
        served: ServedModel,
        bytes_per_token: int,
        count: int,
    ) -> None:
        self.site, self.count = site, count
        self.bytes_per_token = bytes_per_token
        self.vocab_size = served.defaults.vocab_size
        self.link_free_at: defaultdict[frozenset[str], float] = defaultdict(float)
        self.layers_of = {str(worker): len(held) for worker, held in stages}
        super().__init__(scenario)
        self.core = Core(
            served,
            CoordinatorSettings(
                strategy="custom",
                layers={str(worker): held for worker, held in stages},
                replicas=1,
                min_workers=len(stages),
                max_batch_sequences=scenario.batch,
                max_batch_tokens=scenario.chunk,
                max_waiting_requests=scenario.requests,
                min_kv_tokens=KV_TOKENS,
                task_timeout_s=86400,
            ),
            draw_seed=lambda: self.random.getrandbits(62),
        )

    @property
    def asked_s(self) -> float:
        """From the first request to the end of the last, seconds."""
        return self.now - self.asked_at - CONNECT_S

    def link_delay_s(self) -> float:
        """Return what one end adds to the delay of a link, to the coordinator at least."""
        return self.site.usual.latency / 2

    def _join(self) -> None:
        name = list(self.layers_of)[self._joined]
        self._joined += 1
        worker = _Worker(self, name)
        self.workers[worker.peer] = worker

    def _make_clients(self) -> list[VirtualClient]:
        self.client = _Client(self)
        return [self.client]

    def _ask_next(self, askers: Iterable[VirtualClient]) -> None:
        for number in range(self.count):
            self.client.ask_as(number)

    def prompt(self) -> list[int]:
        """Return a prompt that nobody sent before."""
        return self._tokens(self.scenario.prompt)

    def _length(self, mean: int) -> int:
        return mean

    def _tokens(self, number: int) -> list[int]:
        return [self.random.randrange(self.vocab_size) for _ in range(number)]


class _Worker(VirtualWorker):
    """A machine that takes the time that it is described to take."""

    def __init__(self, cluster: _Cluster, name: str) -> None:
        self._site, self._name = cluster.site, name
        self._machine = cluster.site.machines[name]
        self._described = cluster
        super().__init__(cluster, name)

    def _capabilities(self, scenario: Scenario) -> Capabilities:
        return self._machine.capabilities

    def _task_s(self, task: Task) -> float:
        prior = self._machine.prior
        tokens = sum(part.num_tokens for part in task.sequences)
        attended = [(part.start + part.num_tokens / 2) * part.num_tokens for part in task.sequences]
        decodes = all(part.num_tokens == 1 for part in task.sequences)
        position_s = prior.position_s if decodes else prior.prompt_position_s
        layer_s = prior.layer_s + prior.token_s * tokens + position_s * sum(attended)
        head_s = 0.0
        if not task.route:
            sampled = sum(part.sample for part in task.sequences)
            head_s = prior.head_s + prior.head_token_s * sampled
        return self._machine.task_s + self._described.layers_of[self._name] * layer_s + head_s

    def _across(
        self, link: links.LinkId, message: ToNextWorker, frames: tuple[Frame, ...] = ()
    ) -> None:
        other = self._links.get(link)
        if other is None:
            return
        cluster, name = self._described, other.peer.decode()
        connection = PeerId(f"{self._name} {link.epoch} {link.layers}".encode())
        cluster.dials[connection] = self, link
        tokens = 0
        if isinstance(message, Task):
            tokens = sum(part.num_tokens for part in message.sequences)
        way = self._site.link(self._name, name)
        pair = frozenset((self._name, name))
        free_at = max(cluster.now, cluster.link_free_at[pair])
        free_at += tokens * cluster.bytes_per_token / way.bandwidth
        cluster.link_free_at[pair] = free_at
        event = links.PeerReceived(connection, message, frames)
        cluster.at(free_at + way.latency, other._apply, event)


class _Client(VirtualClient):
    """Several askers, each of whom asks again as soon as it is answered."""

    def __init__(self, cluster: _Cluster) -> None:
        super().__init__(cluster, "client")
        self._described = cluster
        self._asker_of: dict[str, int] = {}
        self.heard: list[list[Heard]] = [[] for _ in range(cluster.count)]

    def ask_as(self, asker: int) -> None:
        """Send the next request of an asker."""
        self._asker_of[f"r{self._numbers}"] = asker
        self.heard[asker].append(Heard(self.cluster.now, []))
        self.ask(self._described.prompt(), self.cluster.scenario.answer)

    def receive(self, message: object) -> None:
        """Take a message; the next request follows the end of one."""
        super().receive(message)
        match message:
            case TokenChunk():
                now = self.cluster.now + self.cluster.coordinator_delay_s
                heard = self.heard[self._asker_of[message.request_id]][-1]
                heard.times.extend([now] * len(message.token_ids))
            case Finished():
                asker = self._asker_of[message.request_id]
                if len(self.heard[asker]) < turns_of(self._described.count):
                    self.ask_as(asker)
            case RequestFailed():
                raise error_from_wire(message.code, message.message, 0.0)


def _figures(cluster: _Cluster, asked: Asked, num_stages: int) -> LoadFigures:
    computed_s = sum(worker.busy_s for worker in cluster.workers.values())
    tokens = asked.prompt_tokens + asked.new_tokens - 1
    hops = (num_stages - 1) * cluster.bytes_per_token
    return load_figures(
        cluster.client.heard,
        outside_share=max(0.0, 1 - computed_s / cluster.asked_s) if cluster.count == 1 else None,
        wire_bytes_per_token=hops + _ITEM_BYTES * asked.new_tokens / tokens,
        busy={
            peer.decode(): worker.busy_s / cluster.asked_s
            for peer, worker in cluster.workers.items()
        },
    )
