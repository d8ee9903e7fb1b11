"""`/v1/models`: the model that is served."""

import time
from typing import Any

from fastapi import APIRouter

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import StrictRoute
from distributed_llm.api.models import check_model
from distributed_llm.client.async_client import AsyncDistributedClient

router = APIRouter(route_class=StrictRoute)

_CREATED = int(time.time())
"""When the model came, as far as this process knows: seconds since 1970."""


@router.get("/v1/models")
async def list_models(caller: Asking) -> dict[str, Any]:
    """Return the models that can be asked for."""
    return {"object": "list", "data": [await _model(caller.client)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, caller: Asking) -> dict[str, Any]:
    """Return one model."""
    check_model(name, (await caller.client.identity()).model)
    return await _model(caller.client)


async def _model(client: AsyncDistributedClient) -> dict[str, Any]:
    served = await client.model()
    return {
        "id": served.name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "distributed_llm",
        "max_model_len": served.context_length,
    }
