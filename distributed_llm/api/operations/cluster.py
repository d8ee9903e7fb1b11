"""`/api/v1/me`, `/api/v1/cluster`, `/api/v1/events`: who asks, and how the cluster is."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from distributed_llm.api.asking import Asking
from distributed_llm.api.errors import ApiError, openai_body
from distributed_llm.api.operations.feed import Feed
from distributed_llm.api.streaming import EventStream, sse

router = APIRouter(prefix="/api/v1")


@router.get("/me")
async def me(caller: Asking) -> dict[str, Any]:
    """Return who asks, what they may do, and what is served."""
    identity = await caller.client.identity()
    return {"name": caller.name, "role": caller.role.value, "model": identity.model}


@router.get("/cluster")
async def cluster(caller: Asking) -> Response:
    """Return the status of the cluster: times in seconds, layers from 0 and half-open."""
    return json_response(await caller.client.status())


@router.get("/events")
async def events(request: Request, caller: Asking) -> EventStream:
    """Send what happens: `status` once a second and after a change, `event` for each new one."""
    feed: Feed = request.app.state.feed
    return EventStream(feed.follow(caller.client), on_error=_on_error)


def _on_error(error: ApiError) -> list[bytes]:
    _, body = openai_body(error, "")
    return [sse(body, "error")]


def json_response(value: object, status: int = 200) -> Response:
    """Return a response with a value of messages as JSON; numbers that are none become null."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")
