"""Whether the cluster answers: a token has passed all stages of the plan that is served now."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from distributed_llm.api.errors import ApiError, of_exception
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import ClusterStatus

FRESH_S = 1.0
"""Time for which what was found holds, seconds: strangers may ask, and must not make load."""

_WAIT_S = 2.0
"""Time for which those who ask wait for what is being found out."""

_TRY_TIMEOUT_S = 30.0

_SERVING = ("serving", "paused")


class Asked(Protocol):
    """What is tried; an `AsyncDistributedClient`."""

    async def status(self) -> ClusterStatus:
        """Return the status of the cluster."""

    async def generate(self, prompt: list[int], **params: Any) -> Any:
        """Return the answer to a prompt."""


@dataclass(frozen=True)
class Ready:
    """The cluster answers.

    Attributes:
        epoch: of the plan that a token has passed.
    """

    epoch: int


class Readiness:
    """Finds out whether the cluster answers, and remembers it while the same plan is served.

    However many ask, one status is asked for at a time, and one token for each new plan.

    Args:
        client: of this machine's own key.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: Asked,
        *,
        wait_s: float = _WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._wait_s = wait_s
        self._clock = clock
        self._proven: frozenset[int] = frozenset()
        self._found: Ready | ApiError | None = None
        self._found_at = 0.0
        self._finding: asyncio.Task[None] | None = None

    async def check(self) -> Ready:
        """Return that the cluster answers.

        Raises:
            ApiError: it does not; says why.
        """
        fresh = self._found is not None and self._clock() < self._found_at + FRESH_S
        if not fresh:
            if self._finding is None or self._finding.done():
                self._finding = asyncio.get_running_loop().create_task(self._find())
            done, _ = await asyncio.wait((self._finding,), timeout=self._wait_s)
            if not done:
                raise _not_ready("A token is on its way through all stages of the plan.")
        if isinstance(self._found, ApiError):
            raise self._found
        assert self._found is not None
        return self._found

    async def close(self) -> None:
        """End what is being found out."""
        if self._finding is not None:
            self._finding.cancel()
            await asyncio.gather(self._finding, return_exceptions=True)

    async def _find(self) -> None:
        try:
            self._found = await self._look()
        except DistributedLLMError as exc:
            self._found = _not_ready(f"No token passes all stages: {exc}", of_exception(exc))
        except ApiError as exc:
            self._found = exc
        self._found_at = self._clock()

    async def _look(self) -> Ready:
        status = await self._client.status()
        served = [one.epoch for one in status.pipelines if one.state in _SERVING]
        if not served:
            raise _not_ready(f"The model is not served yet: {status.note or status.state}")
        if not self._proven.issuperset(served):
            self._proven = frozenset()
            await self._client.generate(
                [0], max_new_tokens=1, temperature=0.0, timeout_s=_TRY_TIMEOUT_S
            )
            self._proven = frozenset(served)
        return Ready(max(served))


def _not_ready(why: str, error: ApiError | None = None) -> ApiError:
    code = error.code if error and error.code else "starting"
    after = error.retry_after_s if error and error.retry_after_s else 2.0
    return ApiError(503, why, "server_error", code, retry_after_s=after)
