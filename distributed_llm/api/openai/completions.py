"""`/v1/completions`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import StrictRoute, warning_headers
from distributed_llm.api.models import check_model
from distributed_llm.api.openai.answer_head import fingerprint_of, new_head
from distributed_llm.api.openai.chat import error_events
from distributed_llm.api.openai.completion_answers import (
    Choices,
    CompletionStream,
    Piece,
    whole_completion,
)
from distributed_llm.api.openai.completion_request import CompletionRequest, completions_of
from distributed_llm.api.openai.refusals import KNOWN, refuse_fields
from distributed_llm.api.openai.sampling import named_as_asked
from distributed_llm.api.openai.several import answer_all
from distributed_llm.api.streaming import EventStream, while_connected
from distributed_llm.client.async_client import AsyncDistributedClient

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request, caller: Asking) -> Response:
    """Continue prompts, at once or as a stream."""
    refuse_fields(body)
    client = caller.client
    model = (await client.identity()).model
    check_model(body.model, model)
    asked = completions_of(body)
    head = new_head(
        "cmpl", model, fingerprint_of(model, await request.app.state.plan_epoch.now(client))
    )
    echoes = [await _text(client, one) if body.echo else "" for one in asked.prompts]
    choices = Choices(asked.n, echoes, with_trace=bool(body.dllm_trace))
    pieces = named_as_asked(
        answer_all(client, asked.prompts, asked.params, asked.n), body.names, "prompt", dict(body)
    )
    headers = warning_headers(body, KNOWN)
    if body.stream:
        options = body.stream_options
        stream = CompletionStream(head, choices, with_usage=bool(options and options.include_usage))
        return EventStream(_written(pieces, stream), on_error=error_events, headers=headers)
    whole = whole_completion(await while_connected(request, _all(pieces)), head, choices)
    return Response(msgspec.json.encode(whole), 200, headers, "application/json")


async def _text(client: AsyncDistributedClient, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return await client.detokenize(prompt, skip_special_tokens=True)


async def _all(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _written(
    pieces: AsyncGenerator[Piece, None], stream: CompletionStream
) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        async for piece in pieces:
            if written := stream.write(piece):
                yield written
    yield stream.end()
