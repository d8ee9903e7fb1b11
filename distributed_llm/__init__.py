"""Run one language model on several machines, each too small for it alone."""

from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.client.client import AsyncDistributedClient, DistributedClient
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
    DeadlineExceeded,
    DistributedLLMError,
    InvalidRequest,
    NotEnoughMemory,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    RequestCancelled,
    StageError,
    TextError,
    UnsupportedModel,
    WorkerLost,
)
from distributed_llm.common.messages import TokenLogprobs, Usage
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
    "DeadlineExceeded",
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
    "TextError",
    "TokenLogprobs",
    "UnsupportedModel",
    "Usage",
    "WorkerLost",
]
