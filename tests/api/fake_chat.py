"""A client that answers every turn with given pieces of text."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.client.prompts import encode_chat
from distributed_llm.common.messages import FinishReason, Timings, Usage
from distributed_llm.common.sampling_params import SamplingParams


class FakeChat:
    """Gives every one of a turn's answers the same pieces, a token each.

    Attributes:
        asked: how it was last asked.
        closed: whether its last answer was closed.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        *,
        finish_reason: FinishReason = "stop",
        stop_string: str | None = None,
        error: Exception | None = None,
    ) -> None:
        self._pieces = pieces
        self._finish_reason: FinishReason = finish_reason
        self._stop_string = stop_string
        self._error = error
        self.asked: dict[str, Any] = {}
        self.closed = False

    async def stream_chat(self, messages: Any, **params: Any) -> AsyncGenerator[Chunk, None]:
        """Yield the pieces, after them the error if there is one."""
        self.asked = {"messages": messages, **params}
        self.closed = False
        encode_chat(messages, params.get("tools"), params.get("chat_template_kwargs"))
        others = ("tools", "chat_template_kwargs", "grammar")
        SamplingParams.from_arguments({k: v for k, v in params.items() if k not in others})
        choices = range(params.get("n") or 1)
        try:
            for piece in self._pieces:
                for choice in choices:
                    yield Chunk(text=piece, token_ids=[1], choice=choice)
            if self._error:
                raise self._error
            for choice in choices:
                yield Chunk(
                    "",
                    [2],
                    choice,
                    finish_reason=self._finish_reason,
                    stop_string=self._stop_string,
                )
            for choice in choices:
                yield Chunk("", [], choice, generation=self._generation(choice))
        finally:
            self.closed = True

    def _generation(self, choice: int) -> Generation:
        return Generation(
            text="".join(self._pieces),
            token_ids=[1] * len(self._pieces),
            finish_reason=self._finish_reason,
            choice=choice,
            logprobs=None,
            usage=Usage(prompt_tokens=7, completion_tokens=len(self._pieces), cached_tokens=2),
            timings=Timings(queued_s=0.0, first_token_s=0.0, decode_s=0.0, stages=()),
            request_id="r1",
        )
