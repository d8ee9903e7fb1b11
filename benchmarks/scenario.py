"""What is simulated: how many workers and requests, how fast, how far from one another."""

from dataclasses import dataclass, field
from typing import Literal

from distributed_llm.common.messages import ModelSource
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.settings import Objective
from distributed_llm.coordinator.model import GenerationDefaults, ServedModel
from distributed_llm.coordinator.model_cost import ModelCost

VOCAB = 32_000
HIDDEN = 2048
LAYER_BYTES = 100 * 2**20
_KV_BYTES = 4096


@dataclass(frozen=True)
class Scenario:
    """What is simulated. Times are virtual; "mean" is of an exponential or log-normal draw."""

    workers: int = field(default=8, metadata={"help": "workers that join, one by one"})
    pipelines: int = field(default=1, metadata={"help": "times that the model is served"})
    requests: int = field(default=100, metadata={"help": "requests of all clients"})
    rate: float = field(default=0.0, metadata={"help": "requests per second; 0: all at once"})
    clients: int = field(default=8, metadata={"help": "clients"})
    skew: float = field(default=1.0, metadata={"help": "client k asks in proportion to k^-skew"})
    prompt: int = field(default=128, metadata={"help": "mean tokens of a prompt"})
    shared: int = field(default=0, metadata={"help": "tokens with which all prompts begin"})
    answer: int = field(default=64, metadata={"help": "mean tokens of an answer"})
    batch: int = field(default=64, metadata={"help": "answers that run in one pipeline"})
    chunk: int = field(default=512, metadata={"help": "tokens of a step"})
    waiting: int = field(default=0, metadata={"help": "answers that may wait; 0: any number"})
    spare: float = field(default=2.0, metadata={"help": "times that a pipeline holds the model"})
    kv_tokens: int = field(default=65_536, metadata={"help": "positions of KV cache of a stage"})
    stage_ms: float = field(default=20.0, metadata={"help": "of a task, without its tokens"})
    token_ms: float = field(default=0.2, metadata={"help": "of a task, for each of its tokens"})
    spread: float = field(default=0.1, metadata={"help": "sigma of log-normal worker speeds"})
    noise: float = field(default=0.02, metadata={"help": "of a task's time, at most, as a share"})
    link_ms: float = field(default=1.0, metadata={"help": "mean delay of a message, one way"})
    relayed: float = field(default=0.0, metadata={"help": "share of workers that reach no other"})
    join_s: float = field(default=0.01, metadata={"help": "between the first joins"})
    lifetime_s: float = field(default=0.0, metadata={"help": "mean, of a worker; 0: none dies"})
    rejoin_s: float = field(default=10.0, metadata={"help": "from a death to a worker instead"})
    strategy: Literal["speed", "memory", "even"] = field(
        default="memory", metadata={"help": "speed, memory or even"}
    )
    objective: Objective = field(default="auto", metadata={"help": "auto, throughput or latency"})
    seed: int = field(default=0, metadata={"help": "of all draws"})

    @property
    def num_layers(self) -> int:
        """Layers of the model: four for each worker of a pipeline."""
        return 4 * max(1, self.workers // self.pipelines)

    @property
    def memory_bytes(self) -> int:
        """Memory of each worker."""
        whole = self.spare * (self.num_layers + 1) * LAYER_BYTES
        return int(whole * self.pipelines / self.workers)


def served_model(scenario: Scenario) -> ServedModel:
    """Return a model of the scenario's size, without a checkpoint."""
    cost = ModelCost(
        layer_bytes=(LAYER_BYTES,) * scenario.num_layers,
        first_bytes=LAYER_BYTES // 2,
        last_bytes=LAYER_BYTES // 2,
        shared_bytes=0,
        layer_kv_bytes=(_KV_BYTES,) * scenario.num_layers,
    )
    return ServedModel(
        name="made up",
        source=ModelSource(kind="builtin", name=""),
        dtype="bfloat16",
        wire_dtype="bfloat16",
        cost=cost,
        hidden_size=HIDDEN,
        defaults=GenerationDefaults(2**20, VOCAB, (), SamplingParams(temperature=0.0)),
        digest=str,
    )
