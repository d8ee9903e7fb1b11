"""Which machines computed an answer, for those who ask with `dllm_trace`."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from distributed_llm.api.chat.answering import ChatClient
from distributed_llm.client.answers import Chunk
from distributed_llm.common.messages import StepTrace
from distributed_llm.common.types import LayerRange


class Hop(msgspec.Struct):
    """What one stage did in one step.

    Attributes:
        tokens: that it computed, of all answers.
        bytes: that came in.
        link_s: how long they take on the link from the stage before; None if that is not known.
        queued_s: from their arrival until they were computed.
        compute_s: for which they were computed.
    """

    worker: str
    layers: LayerRange
    tokens: int
    bytes: int
    link_s: float | None
    queued_s: float
    compute_s: float


def hops_of(trace: Iterable[StepTrace]) -> list[Hop]:
    """Return what the stages did in some steps."""
    return [
        Hop(
            hop.worker,
            hop.layers,
            step.step_tokens,
            hop.bytes_in,
            hop.link_s,
            hop.queued_s,
            hop.compute_s,
        )
        for step in trace
        for hop in step.hops
    ]


class TracedChat:
    """Asks another client for turns, and keeps which machines computed what comes."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self._hops: defaultdict[int, list[Hop]] = defaultdict(list)

    async def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the assistant's next message."""
        chunks = self._client.stream_chat(
            messages, tools=tools, chat_template_kwargs=chat_template_kwargs, **params
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                self._hops[chunk.choice] += hops_of(chunk.trace)
                yield chunk

    def taken(self, choice: int) -> list[Hop]:
        """Return what came with an answer since this was asked before."""
        return self._hops.pop(choice, [])
