"""`/v1/responses`: turns of conversations, as Codex and OpenAI's packages ask for them."""

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import WARNING, StrictRoute, warning_headers
from distributed_llm.api.chat.answering import answer
from distributed_llm.api.chat.events import TurnEvent
from distributed_llm.api.chat.served import served_model
from distributed_llm.api.errors import ApiError, invalid
from distributed_llm.api.models import check_model
from distributed_llm.api.openai.responses.bodies import Item, ResponsesBody
from distributed_llm.api.openai.responses.conversation import (
    NAMES,
    items_of,
    left_out_tools,
    turn_of,
)
from distributed_llm.api.openai.responses.store import Record, ResponseStore
from distributed_llm.api.openai.responses.writer import ResponseWriter, new_id
from distributed_llm.api.openai.sampling import named_as_asked
from distributed_llm.api.streaming import EventStream, sse, while_connected

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/responses")
async def create_response(body: ResponsesBody, request: Request, caller: Asking) -> Response:
    """Return the assistant's answer, whole or as a stream of events."""
    served = await served_model(caller.client)
    check_model(body.model, served.name)
    store = _store(request)
    items = items_of(body.input)
    turn = turn_of(body, [*_earlier(store, caller.name, body), *items], served.formats)
    given = {"text.format": turn.params.get("grammar")}
    events = named_as_asked(answer(caller.client, turn, served.formats), NAMES, "input", given)
    writer = ResponseWriter(_begun(body, served.name))

    def keep() -> None:
        if body.store is not False:
            store.put(caller.name, Record(writer.response, items, body.previous_response_id))

    headers = _headers(body)
    if body.stream:

        def tell(error: ApiError) -> Iterator[bytes]:
            for event in writer.fail(error):
                yield sse(event, event["type"])

        return EventStream(_sent(events, writer, keep), on_error=tell, headers=headers)
    response = await while_connected(request, _whole(events, writer))
    keep()
    return _json(response, headers)


@router.get("/v1/responses/{response_id}")
async def get_response(response_id: str, request: Request, caller: Asking) -> Response:
    """Return a response that is kept."""
    return _json(_kept(request, caller.name, response_id).response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request, caller: Asking) -> dict[str, Any]:
    """Keep a response no longer."""
    if not _store(request).delete(caller.name, response_id):
        raise _not_found(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """Return what a response that is kept answers."""
    items = _kept(request, caller.name, response_id).input
    if order == "desc":
        items = items[::-1]
    ids = [item["id"] for item in items]
    start = ids.index(after) + 1 if after in ids else 0
    page = items[start : start + limit]
    return _json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(items),
        }
    )


def _json(value: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), 200, headers, "application/json")


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def _kept(request: Request, caller: str, response_id: str) -> Record:
    record = _store(request).get(caller, response_id)
    if record is None:
        raise _not_found(response_id)
    return record


def _not_found(response_id: str) -> ApiError:
    return ApiError(
        404,
        f"There is no response {response_id!r:.100} of this key. Those that are used longest ago "
        "make room, and all are lost when the API ends.",
    )


def _earlier(store: ResponseStore, caller: str, body: ResponsesBody) -> Sequence[Item]:
    """Return the conversation that a request continues."""
    if body.previous_response_id is None:
        return ()
    items = store.conversation(caller, body.previous_response_id)
    if items is None:
        raise invalid(
            f"The response {body.previous_response_id!r:.100}, or one before it, is not kept "
            "here. Send the whole conversation as input.",
            "previous_response_id",
            "previous_response_not_found",
        )
    return items


def _begun(body: ResponsesBody, model: str) -> dict[str, Any]:
    """Return a response before there is an answer: what was asked."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    reasoning = body.reasoning
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "background": False,
    }


def _headers(body: ResponsesBody) -> dict[str, str]:
    """Return the header that says what of a request was ignored; maybe none."""
    headers = warning_headers(body)
    kinds = left_out_tools(body)
    if not kinds:
        return headers
    told = f"ignored tools: {', '.join(kinds)}"
    return {WARNING: "; ".join([*headers.values(), told])}


async def _sent(
    events: AsyncGenerator[TurnEvent, None], writer: ResponseWriter, keep: Callable[[], None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            for sent in writer.add(event):
                if sent["type"] in ("response.completed", "response.incomplete"):
                    keep()  # before the client knows its end, and may continue it
                yield sse(sent, sent["type"])


async def _whole(events: AsyncGenerator[TurnEvent, None], writer: ResponseWriter) -> dict[str, Any]:
    async with aclosing(events):
        async for event in events:
            for _ in writer.add(event):
                pass
    return writer.response
