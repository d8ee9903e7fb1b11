"""How the coordinator decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.types import LayerRange

Strategy = Literal["speed", "memory", "even", "custom"]
Goal = Literal["auto", "throughput", "latency"]


@dataclass(frozen=True)
class CoreSettings:
    """How the coordinator decides; times in seconds.

    Attributes:
        objective: what strategy "speed" makes best.
        layers: the layers of each worker, for strategy "custom".
        replicas: how many times to serve the model, if there are workers enough; "auto" is once,
            and with strategy "speed" as often as is fastest.
        wire_dtype: of activations between stages; None is the model's.
        min_workers: workers to wait for before the first plan.
        settle_s: quiet time after a join before planning.
        max_batch_sequences: that run at the same time on one pipeline.
        max_batch_tokens: tokens in one step.
        min_kv_tokens: positions of KV cache that a plan must have room for.
        task_timeout_s: without progress, after which a step is computed again.
    """

    strategy: Strategy = "speed"
    objective: Goal = "auto"
    layers: Mapping[str, LayerRange] = field(default_factory=dict)
    replicas: int | Literal["auto"] = "auto"
    wire_dtype: DtypeName | None = None
    min_workers: int = 1
    settle_s: float = 0.5
    max_batch_sequences: int = 256
    max_batch_tokens: int = 512
    max_waiting_requests: int = 256
    min_kv_tokens: int = 1024
    heartbeat_interval_s: float = 1.0
    silence_timeout_s: float = 4.0
    task_timeout_s: float = 30.0
