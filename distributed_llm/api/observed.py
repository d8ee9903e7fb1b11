"""A client of the coordinator that tells of the answers that pass it."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Protocol

from distributed_llm.client.answers import Chunk
from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.client.prompts import EncodedPrompt
from distributed_llm.client.requests import Requests
from distributed_llm.common.sampling_params import SamplingParams


class Observer(Protocol):
    """Hears of what is asked, and of what comes of it."""

    def asked(self, params: SamplingParams) -> None:
        """Hear that a prompt is sent."""

    def came(self, chunk: Chunk) -> None:
        """Hear of the next piece of an answer."""

    def ended(self, error: BaseException | None) -> None:
        """Hear that nothing follows to one prompt; with what ended it before its time, if so."""


observer: ContextVar[Observer | None] = ContextVar("observer", default=None)
"""Who hears of what is asked in this context; requests over HTTP have one each."""


class ObservedRequests(Requests):
    """Requests of which the observer is told of whoever asks: many share one connection."""

    async def stream(
        self, prompt: EncodedPrompt, sampling: SamplingParams
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answers to a prompt as `Requests` does; tell of them."""
        heard_by = observer.get()
        if heard_by is not None:
            heard_by.asked(sampling)
        error: BaseException | None = None
        try:
            async with aclosing(super().stream(prompt, sampling)) as chunks:
                async for chunk in chunks:
                    if heard_by is not None:
                        heard_by.came(chunk)
                    yield chunk
        except BaseException as exc:
            error = exc
            raise
        finally:
            if heard_by is not None:
                heard_by.ended(error)


class ObservedClient(AsyncDistributedClient):
    """A client that tells the observer of whoever asks it; see `ObservedRequests`."""

    requests_type = ObservedRequests
