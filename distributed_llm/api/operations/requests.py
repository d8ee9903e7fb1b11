"""`/api/v1/requests`: the requests for answers that pass this API."""

import time
from typing import Any

from fastapi import APIRouter, Request

from distributed_llm.api.asking import Asking
from distributed_llm.api.errors import ApiError
from distributed_llm.api.register import Entry, Register

router = APIRouter(prefix="/api/v1/requests")


@router.get("")
async def requests(request: Request, caller: Asking) -> dict[str, Any]:
    """Return requests that are under way or ended lately: one's own; all for an admin."""
    register: Register = request.app.state.register
    now = time.monotonic()
    return {"requests": [_told(entry, now) for entry in register.entries(caller)]}


@router.post("/{request_id}/cancel")
async def cancel(request_id: str, request: Request, caller: Asking) -> dict[str, str]:
    """Cancel one's own request."""
    register: Register = request.app.state.register
    if not register.cancel(caller, request_id):
        raise ApiError(
            404,
            f"No request {request_id!r:.80} of {caller.name or 'yours'} is under way. "
            "/api/v1/requests shows those that are.",
            code="request_not_found",
        )
    return {"id": request_id, "state": "cancelled"}


def _told(entry: Entry, now: float) -> dict[str, Any]:
    ended = now if entry.ended is None else entry.ended
    return {
        "id": entry.id,
        "path": entry.path,
        "model": entry.model,
        "name": entry.caller,
        "state": entry.state,
        "started_at": entry.started_at,
        "age_s": now - entry.started,
        "took_s": ended - entry.started,
        "first_token_s": None if entry.first is None else entry.first - entry.started,
        "prompt_tokens": entry.prompt_tokens,
        "cached_tokens": entry.cached_tokens,
        "completion_tokens": entry.completion_tokens,
        "tokens_per_s": entry.tokens_per_s,
        "error": entry.error or None,
    }
