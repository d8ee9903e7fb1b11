"""`/v1/models`: the model that is served."""

from typing import Any

from fastapi import APIRouter

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import StrictRoute
from distributed_llm.api.models import check_model

router = APIRouter(route_class=StrictRoute)


@router.get("/v1/models")
async def list_models(caller: Asking) -> dict[str, Any]:
    """Return the models that can be asked for."""
    identity = await caller.client.identity()
    return {"object": "list", "data": [_model(identity.model)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, caller: Asking) -> dict[str, Any]:
    """Return one model."""
    identity = await caller.client.identity()
    check_model(name, identity.model)
    return _model(identity.model)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "distributed_llm"}
