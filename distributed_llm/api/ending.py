"""How errors are told once the API has been told to end: not as what follows from that.

`dllm up` ends its worker at the same time. Whoever asks meanwhile would hear to start one.
"""

from starlette.types import Scope

from distributed_llm.api.errors import ApiError, of_exception
from distributed_llm.common.errors import DistributedLLMError

_RETRY_AFTER_S = 10.0
"""Time in which a program that is started again serves, seconds."""


class Ending:
    """Whether the API has been told to end.

    Attributes:
        begun: whether it has.
    """

    def __init__(self) -> None:
        self.begun = False


def told(error: DistributedLLMError, scope: Scope) -> ApiError:
    """Return how HTTP tells an exception to who sent the request of a scope."""
    found = of_exception(error)
    return ending_error() if found.status == 503 and is_ending(scope) else found


def is_ending(scope: Scope) -> bool:
    """Return whether the API that serves a request has been told to end."""
    ending = scope.get("state", {}).get("ending")
    return isinstance(ending, Ending) and ending.begun


def ending_error() -> ApiError:
    """Return what a request is told that cannot be answered any more."""
    return ApiError(
        503,
        "This service is ending, as whoever runs it has told it to. Ask again once it is back.",
        "server_error",
        "ending",
        retry_after_s=_RETRY_AFTER_S,
    )
