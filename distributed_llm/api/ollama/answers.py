"""`/api/chat` and `/api/generate`."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import StrictRoute, warning, warning_headers
from distributed_llm.api.chat.answering import answer
from distributed_llm.api.chat.events import AnswerEnded, TextDelta, TurnEnded, TurnEvent
from distributed_llm.api.chat.served import served_model
from distributed_llm.api.errors import ApiError, ollama_body
from distributed_llm.api.ollama.bodies import ChatBody, GenerateBody, GeneratingBody
from distributed_llm.api.ollama.conversation import check_prompt, turn_of_chat, turn_of_prompt
from distributed_llm.api.ollama.lines import Lines, Put, as_message, as_response, whole
from distributed_llm.api.ollama.names import check_name
from distributed_llm.api.ollama.options import NAMES, params_of, unknown_options
from distributed_llm.api.openai.sampling import named_as_asked
from distributed_llm.api.streaming import EventStream, while_connected
from distributed_llm.client.answers import Generation
from distributed_llm.client.async_client import AsyncDistributedClient

router = APIRouter(route_class=StrictRoute)


@router.post("/api/chat")
async def chat(body: ChatBody, request: Request, caller: Asking) -> Response:
    """Return the assistant's next message, as JSON lines unless `stream` is false."""
    served = await served_model(caller.client)
    check_name(body.asked_model, served.name)
    if not body.messages:
        return _nothing_asked(body, as_message)
    turn = turn_of_chat(body, served.formats, served.template)
    events = answer(caller.client, turn, served.formats)
    return await _respond(body, request, events, as_message, "messages")


@router.post("/api/generate")
async def generate(body: GenerateBody, request: Request, caller: Asking) -> Response:
    """Return what follows on a prompt, as JSON lines unless `stream` is false."""
    served = await served_model(caller.client)
    check_name(body.asked_model, served.name)
    check_prompt(body)
    if not body.prompt:
        return _nothing_asked(body, as_response)
    if body.raw or not served.template:
        text = body.prompt if not body.system else f"{body.system}\n\n{body.prompt}"
        events = _continued(caller.client, text, params_of(body))
    else:
        turn = turn_of_prompt(body, served.formats, served.template)
        events = answer(caller.client, turn, served.formats)
    return await _respond(body, request, events, as_response, "prompt")


async def _continued(
    client: AsyncDistributedClient, prompt: str, params: dict[str, Any]
) -> AsyncGenerator[TurnEvent, None]:
    """Yield the answer to a prompt that is taken as it is, as events of a turn."""
    generations: list[Generation] = []
    async with aclosing(client.stream(prompt, **params)) as chunks:
        async for chunk in chunks:
            if chunk.generation is not None:
                generations.append(chunk.generation)
                continue
            if chunk.text or chunk.logprobs:
                yield TextDelta(choice=0, text=chunk.text, tokens=tuple(chunk.logprobs or ()))
            if chunk.finish_reason is not None:
                yield AnswerEnded(choice=0, reason=chunk.finish_reason)
    yield TurnEnded(generations=tuple(generations))


async def _respond(
    body: GeneratingBody,
    request: Request,
    events: AsyncGenerator[TurnEvent, None],
    put: Put,
    prompt: str,
) -> Response:
    """Return the response that tells the events of a turn.

    Args:
        prompt: name of the field that has the prompt.
    """
    lines = _lines(
        named_as_asked(events, NAMES, prompt, body.options or {}), Lines(body.asked_model, put)
    )
    headers = _headers(body)
    if body.stream is not False:
        return EventStream(
            _written(lines),
            on_error=_error_lines,
            ping=b"",
            media_type="application/x-ndjson",
            headers=headers,
        )
    told = whole(await while_connected(request, _all(lines)), put)
    return Response(msgspec.json.encode(told), 200, headers, "application/json")


def _nothing_asked(body: GeneratingBody, put: Put) -> Response:
    """Return what clients get that want the model to be loaded, or to be gone."""
    gone = body.keep_alive in (0, "0", "0s", "0m")
    line = Lines(body.asked_model, put).last("unload" if gone else "load")
    return Response(msgspec.json.encode(line), 200, media_type="application/json")


def _headers(body: GeneratingBody) -> dict[str, str]:
    return warning("options", unknown_options(body)) | warning_headers(body)


async def _lines(
    events: AsyncGenerator[TurnEvent, None], lines: Lines
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(events):
        async for event in events:
            for line in lines.write(event):
                yield line


async def _written(lines: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(lines):
        async for line in lines:
            yield msgspec.json.encode(line) + b"\n"


async def _all(lines: AsyncGenerator[dict[str, Any], None]) -> list[dict[str, Any]]:
    async with aclosing(lines):
        return [line async for line in lines]


def _error_lines(error: ApiError) -> Iterable[bytes]:
    return (msgspec.json.encode(ollama_body(error, "")[1]) + b"\n",)
