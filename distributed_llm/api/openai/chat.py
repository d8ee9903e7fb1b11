"""`/v1/chat/completions`."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import StrictRoute, warning_headers
from distributed_llm.api.chat.answering import answer
from distributed_llm.api.chat.events import TurnEnded, TurnEvent
from distributed_llm.api.chat.served import served_model
from distributed_llm.api.errors import ApiError, openai_body
from distributed_llm.api.models import check_model
from distributed_llm.api.openai.answer_head import fingerprint_of, new_head
from distributed_llm.api.openai.chat_answers import ChatStream, whole_chat
from distributed_llm.api.openai.chat_request import ChatRequest, turn_of
from distributed_llm.api.openai.refusals import KNOWN, refuse_fields
from distributed_llm.api.openai.sampling import named_as_asked
from distributed_llm.api.openai.tracing import TracedChat
from distributed_llm.api.streaming import DONE, EventStream, sse, while_connected

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request, caller: Asking) -> Response:
    """Answer a conversation, at once or as a stream."""
    refuse_fields(body)
    client = caller.client
    served = await served_model(client)
    check_model(body.model, served.name)
    turn = turn_of(body, served.formats, served.template)
    head = new_head(
        "chatcmpl",
        served.name,
        fingerprint_of(served.name, await request.app.state.plan_epoch.now(client)),
    )
    traced = TracedChat(client) if body.dllm_trace else None
    events = named_as_asked(
        answer(traced or client, turn, served.formats), body.names, "messages", dict(body)
    )
    headers = warning_headers(body, KNOWN)
    if body.stream:
        options = body.stream_options
        stream = ChatStream(
            head,
            with_usage=bool(options and options.include_usage),
            with_trace=bool(body.dllm_trace),
        )
        return EventStream(_written(events, stream, traced), on_error=error_events, headers=headers)
    whole = whole_chat(
        await while_connected(request, _all(events)),
        head,
        with_logprobs=bool(body.logprobs),
        with_trace=bool(body.dllm_trace),
    )
    return Response(msgspec.json.encode(whole), 200, headers, "application/json")


async def _all(events: AsyncGenerator[TurnEvent, None]) -> list[TurnEvent]:
    async with aclosing(events):
        return [event async for event in events]


async def _written(
    events: AsyncGenerator[TurnEvent, None], stream: ChatStream, traced: TracedChat | None
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            if traced is None or isinstance(event, TurnEnded):
                yield stream.write(event)
            else:
                yield stream.write(event, traced.taken(event.choice))


def error_events(error: ApiError) -> Iterable[bytes]:
    """Return how a stream that has begun tells an error."""
    return (sse(openai_body(error, "")[1]), DONE)
