"""`/v1/models` as Anthropic's clients ask for it: they are known by their header."""

from typing import Any

from fastapi import APIRouter
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import StrictRoute
from distributed_llm.api.models import check_model


class AnthropicRoute(StrictRoute):
    """A route that only Anthropic's clients reach; others go on to the next."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether a request is for this route."""
        if scope["type"] == "http" and "anthropic-version" not in Headers(scope=scope):
            return Match.NONE, {}
        return super().matches(scope)


router = APIRouter(route_class=AnthropicRoute, include_in_schema=False)


@router.get("/v1/models")
async def list_models(caller: Asking) -> dict[str, Any]:
    """Return the models that can be asked for."""
    name = (await caller.client.identity()).model
    return {"data": [_model(name)], "has_more": False, "first_id": name, "last_id": name}


@router.get("/v1/models/{name:path}")
async def model(name: str, caller: Asking) -> dict[str, Any]:
    """Return one model."""
    served = (await caller.client.identity()).model
    check_model(name, served)
    return _model(served)


def _model(name: str) -> dict[str, Any]:
    return {
        "type": "model",
        "id": name,
        "display_name": name.rstrip("/").rpartition("/")[2],
        "created_at": "1970-01-01T00:00:00Z",  # not known
    }
