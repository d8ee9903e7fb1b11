"""How a client is told that what it asked for has failed. Pure."""

from distributed_llm.common.errors import DistributedLLMError, Overloaded
from distributed_llm.common.messages import RequestFailed, RequestId
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.events import Send


def failure(peer: PeerId, request_id: RequestId, error: DistributedLLMError) -> Send:
    """Return the last message of a request that has failed."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return Send(
        peer,
        RequestFailed(
            request_id=request_id,
            code=error.code,
            message=str(error)[:4096],
            retry_after_s=retry_after_s,
        ),
    )
