"""Run one language model on several machines, each too small for it alone."""

from distributed_llm.client.client import (
    AsyncDistributedClient,
    Chunk,
    DistributedClient,
    Generation,
)
from distributed_llm.common.errors import (
    AddressInUse,
    CapacityError,
    CheckpointError,
    CheckpointMismatch,
    ConfigError,
    ConnectionFailed,
    ContextLengthExceeded,
    CoordinatorLost,
    CoordinatorUnreachable,
    DistributedLLMError,
    InvalidRequest,
    NotEnoughMemory,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    RequestCancelled,
    StageError,
    UnsupportedModel,
    WorkerLost,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.local_cluster import LocalCluster

__all__ = [
    "AddressInUse",
    "AsyncDistributedClient",
    "CapacityError",
    "CheckpointError",
    "CheckpointMismatch",
    "Chunk",
    "ConfigError",
    "ConnectionFailed",
    "ContextLengthExceeded",
    "CoordinatorLost",
    "CoordinatorUnreachable",
    "DistributedClient",
    "DistributedLLMError",
    "Generation",
    "InvalidRequest",
    "LocalCluster",
    "NotEnoughMemory",
    "NotReady",
    "Overloaded",
    "ProtocolMismatch",
    "RequestCancelled",
    "SamplingParams",
    "StageError",
    "UnsupportedModel",
    "WorkerLost",
]
