"""`/v1/messages`: turns of conversations, as Claude Code and Anthropic's packages ask for them."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from distributed_llm.api.anthropic.bodies import CountTokensBody, MessagesBody
from distributed_llm.api.anthropic.conversation import NAMES, turn_of
from distributed_llm.api.anthropic.message import MessageWriter
from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import WARNING, StrictRoute, warning_headers
from distributed_llm.api.chat.answering import answer
from distributed_llm.api.chat.events import TurnEvent
from distributed_llm.api.chat.served import served_model
from distributed_llm.api.errors import ApiError, anthropic_body
from distributed_llm.api.models import check_model
from distributed_llm.api.openai.sampling import named_as_asked
from distributed_llm.api.streaming import EventStream, sse, while_connected

router = APIRouter(route_class=StrictRoute)

_PING = sse({"type": "ping"}, "ping")

_ANTHROPICS = "claude-"
"""Begins the names that Anthropic's clients ask for unless they are told otherwise."""


@router.post("/v1/messages")
async def create_message(body: MessagesBody, request: Request, caller: Asking) -> Response:
    """Return the assistant's next message, whole or as a stream of events."""
    served = await served_model(caller.client)
    headers = _headers(body, served.name)
    turn = turn_of(body, served.formats)
    events = named_as_asked(
        answer(caller.client, turn, served.formats), NAMES, "messages", given={}
    )
    writer = MessageWriter(served.name)
    if body.stream:
        request_id = getattr(request.state, "request_id", "")

        def tell(error: ApiError) -> Iterator[bytes]:
            yield sse(anthropic_body(error, request_id)[1], "error")

        return EventStream(_sent(events, writer), on_error=tell, ping=_PING, headers=headers)
    message = await while_connected(request, _whole(events, writer))
    return JSONResponse(message, headers=headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensBody, caller: Asking) -> Response:
    """Return how many tokens a conversation has."""
    served = await served_model(caller.client)
    headers = _headers(body, served.name)
    turn = turn_of(body, served.formats)
    prompt = await caller.client.tokenize_chat(
        turn.messages,
        tools=turn.tools or None,
        chat_template_kwargs=turn.template_arguments or None,
    )
    return JSONResponse({"input_tokens": len(prompt.token_ids)}, headers=headers)


def _headers(body: CountTokensBody, served: str) -> dict[str, str]:
    """Return the header that says what of a request was ignored; maybe none.

    Claude Code asks for Anthropic's models in the background, whichever it is told to use.

    Raises:
        ApiError: the request is for a model that is neither served nor one of Anthropic's.
    """
    headers = warning_headers(body)
    if not body.model.startswith(_ANTHROPICS):
        check_model(body.model, served)
        return headers
    instead = f"the model {served:.100} answers for {body.model:.100}"
    told = [headers[WARNING]] if headers else []
    return {WARNING: "; ".join([*told, instead.encode("ascii", "replace").decode()])}


async def _sent(
    events: AsyncGenerator[TurnEvent, None], writer: MessageWriter
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            for sent in writer.add(event):
                yield sse(sent, sent["type"])


async def _whole(events: AsyncGenerator[TurnEvent, None], writer: MessageWriter) -> dict[str, Any]:
    async with aclosing(events):
        async for event in events:
            for _ in writer.add(event):
                pass
    return writer.message
