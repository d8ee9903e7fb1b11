"""Run one language model on several machines, each too small for it alone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed_llm.client.answers import Chunk, Generation, LikelyToken, PickedToken
    from distributed_llm.client.async_client import AsyncDistributedClient
    from distributed_llm.client.client import DistributedClient
    from distributed_llm.client.values import Embedding, TokenizedPrompt
    from distributed_llm.common.errors import (
        AddressInUse,
        CapacityError,
        CheckpointError,
        CheckpointMismatch,
        CheckpointUnavailable,
        ConfigError,
        ConnectionFailed,
        ContextLengthExceeded,
        CoordinatorLost,
        CoordinatorUnreachable,
        DeadlineExceeded,
        DistributedLLMError,
        InvalidRequest,
        NotAllowed,
        NotEnoughMemory,
        NotEnrolled,
        NotReady,
        Overloaded,
        ProtocolMismatch,
        RequestCancelled,
        StageError,
        TextError,
        UnsupportedModel,
        WorkerLost,
        WrongServerKey,
    )
    from distributed_llm.common.grammar import Grammar
    from distributed_llm.common.messages import ModelInfo, StageHop, StepTrace, Usage
    from distributed_llm.common.sampling_params import SamplingParams
    from distributed_llm.local_cluster import LocalCluster

__all__ = [
    "AddressInUse",
    "AsyncDistributedClient",
    "CapacityError",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointUnavailable",
    "Chunk",
    "ConfigError",
    "ConnectionFailed",
    "ContextLengthExceeded",
    "CoordinatorLost",
    "CoordinatorUnreachable",
    "DeadlineExceeded",
    "DistributedClient",
    "DistributedLLMError",
    "Embedding",
    "Generation",
    "Grammar",
    "InvalidRequest",
    "LikelyToken",
    "LocalCluster",
    "ModelInfo",
    "NotAllowed",
    "NotEnoughMemory",
    "NotEnrolled",
    "NotReady",
    "Overloaded",
    "PickedToken",
    "ProtocolMismatch",
    "RequestCancelled",
    "SamplingParams",
    "StageError",
    "StageHop",
    "StepTrace",
    "TextError",
    "TokenizedPrompt",
    "UnsupportedModel",
    "Usage",
    "WorkerLost",
    "WrongServerKey",
]

_HOMES = (
    "client.answers",
    "client.async_client",
    "client.client",
    "client.values",
    "local_cluster",
    "common.errors",
    "common.grammar",
    "common.messages",
    "common.sampling_params",
)
"""The modules that these names come from; each is imported when a name is first used."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
