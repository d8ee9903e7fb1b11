"""`/v1/embeddings`."""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import Body, StrictRoute, warning_headers
from distributed_llm.api.errors import unsupported
from distributed_llm.api.models import DEFAULT, check_model
from distributed_llm.api.openai.completion_request import Prompts, prompts_of
from distributed_llm.api.openai.refusals import KNOWN, refuse_fields
from distributed_llm.api.openai.sampling import error_of
from distributed_llm.api.streaming import while_connected
from distributed_llm.client.values import Embedding
from distributed_llm.common.errors import InvalidRequest

router = APIRouter(route_class=StrictRoute)


class EmbeddingsRequest(Body):
    """Body of `/v1/embeddings`."""

    model: str = DEFAULT
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingsRequest, request: Request, caller: Asking) -> Response:
    """Return the embeddings of texts: means of the model's last hidden states."""
    refuse_fields(body)
    client = caller.client
    served = await client.model()
    check_model(body.model, served.name)
    if body.dimensions is not None and body.dimensions != served.hidden_size:
        raise unsupported(
            "dimensions",
            f"Embeddings of this model have {served.hidden_size} dimensions, and are not cut. "
            "Leave dimensions out.",
        )
    prompts: Any = prompts_of(body.input, "input")
    try:
        found = await while_connected(request, client.embed(prompts))
    except InvalidRequest as exc:
        raise error_of(exc, {}, "input", {}) from exc
    told = _body(served.name, found, as_text=body.encoding_format == "base64")
    headers = warning_headers(body, KNOWN)
    return Response(msgspec.json.encode(told), 200, headers, "application/json")


def _body(model: str, embeddings: Sequence[Embedding], *, as_text: bool) -> dict[str, Any]:
    """Return the body of an answer.

    Args:
        as_text: vectors as base64 of little-endian float32.
    """
    tokens = sum(one.usage.prompt_tokens for one in embeddings)
    vectors = (one.vector.astype("<f4") for one in embeddings)
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": (
                    base64.b64encode(vector.tobytes()).decode() if as_text else vector.tolist()
                ),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
