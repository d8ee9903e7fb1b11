"""`/tokenize` and `/detokenize`, as vLLM has them."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import Body, StrictRoute
from distributed_llm.api.errors import invalid
from distributed_llm.api.models import DEFAULT, check_model
from distributed_llm.api.openai.conversation import turn_messages, turn_tools
from distributed_llm.api.openai.refusals import refuse_fields
from distributed_llm.api.openai.sampling import error_of
from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.common.errors import InvalidRequest

router = APIRouter(route_class=StrictRoute)

_MAX_SPELLED = 1024
"""Different tokens of a prompt that are told as texts."""

_AT_A_TIME = 16
"""Of them, those that are asked for at a time."""


class TokenizeRequest(Body):
    """Body of `/tokenize`: a text or a conversation."""

    model: str = DEFAULT
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class Tokens(BaseModel):
    """The token ids of a prompt.

    Attributes:
        max_model_len: positions of prompt and answer together.
        token_strs: texts of the tokens, each by itself; if they were asked for.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """Body of `/detokenize`."""

    model: str = DEFAULT
    tokens: list[int]


class Text(BaseModel):
    """The text of token ids."""

    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, caller: Asking) -> Tokens:
    """Return the token ids of a text or a conversation."""
    refuse_fields(body)
    client = caller.client
    model = await client.model()
    check_model(body.model, model.name)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give a prompt, or messages.", "prompt")
    try:
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            encoded = await client.tokenize(body.prompt, add_special_tokens=special)
        else:
            encoded = await client.tokenize_chat(
                turn_messages(body.messages or ()),
                tools=turn_tools(body.tools or ()) or None,
                chat_template_kwargs=body.chat_template_kwargs,
            )
    except InvalidRequest as exc:
        field = "messages" if body.prompt is None else "prompt"
        raise error_of(exc, {}, field, {}) from exc
    found = encoded.token_ids
    return Tokens(
        count=len(found),
        max_model_len=model.context_length,
        tokens=found,
        token_strs=await _texts(client, found) if body.return_token_strs else None,
    )


async def _texts(client: AsyncDistributedClient, tokens: Sequence[int]) -> list[str]:
    distinct = sorted(set(tokens))
    if len(distinct) > _MAX_SPELLED:
        raise invalid(
            f"The prompt has {len(distinct)} different tokens; return_token_strs tells at most "
            f"{_MAX_SPELLED}.",
            "return_token_strs",
        )
    gate = asyncio.Semaphore(_AT_A_TIME)

    async def text(token: int) -> str:
        async with gate:
            return await client.detokenize([token])

    texts = dict(zip(distinct, await asyncio.gather(*map(text, distinct)), strict=True))
    return [texts[token] for token in tokens]


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, caller: Asking) -> Text:
    """Return the text of token ids."""
    check_model(body.model, (await caller.client.identity()).model)
    try:
        return Text(prompt=await caller.client.detokenize(body.tokens))
    except InvalidRequest as exc:
        raise invalid(str(exc), "tokens", "invalid_value") from exc
