"""`/api/embed` and `/api/embeddings`: texts as numbers."""

import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import StrictRoute
from distributed_llm.api.errors import invalid
from distributed_llm.api.ollama.bodies import EmbedBody
from distributed_llm.api.ollama.names import check_name
from distributed_llm.api.openai.sampling import error_of
from distributed_llm.api.streaming import while_connected
from distributed_llm.common.errors import InvalidRequest

router = APIRouter(route_class=StrictRoute)

_MOST_TEXTS = 1024


@router.post("/api/embed")
async def embed(body: EmbedBody, request: Request, caller: Asking) -> dict[str, Any]:
    """Return the embeddings of texts, each of length 1 as Ollama's are."""
    check_name(body.asked_model, caller.model)
    texts = [body.input] if isinstance(body.input, str) else body.input or []
    if len(texts) > _MOST_TEXTS:
        raise invalid(f"There are {len(texts)} texts; {_MOST_TEXTS} are allowed.", "input")
    began = time.monotonic_ns()
    found = await _embedded(request, caller, texts, "input")
    lengths = [float(np.linalg.norm(one.vector)) or 1.0 for one in found]
    return {
        "model": body.asked_model,
        "embeddings": [
            (one.vector / length).tolist() for one, length in zip(found, lengths, strict=True)
        ],
        "total_duration": time.monotonic_ns() - began,
        "load_duration": 0,
        "prompt_eval_count": sum(one.usage.prompt_tokens for one in found),
    }


@router.post("/api/embeddings")
async def embed_one(body: EmbedBody, request: Request, caller: Asking) -> dict[str, Any]:
    """Return the embedding of one text, as it is."""
    check_name(body.asked_model, caller.model)
    (found,) = await _embedded(request, caller, [body.prompt or ""], "prompt")
    return {"embedding": found.vector.tolist()}


async def _embedded(request: Request, caller: Asking, texts: list[str], field: str) -> Any:
    """Return the embeddings of texts.

    Args:
        field: of the request, that has them.
    """
    try:
        return await while_connected(request, caller.client.embed(texts))
    except InvalidRequest as exc:
        raise error_of(exc, {}, field, {}) from exc
