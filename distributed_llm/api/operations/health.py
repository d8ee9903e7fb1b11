"""`/health/live` and `/health/ready`, which need no key."""

from typing import Any

from fastapi import APIRouter, Request

from distributed_llm.api.operations.readiness import Readiness

router = APIRouter()


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live")
async def live() -> dict[str, str]:
    """Say that the API runs, whatever the cluster does."""
    return {"status": "ok"}


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready")
async def ready(request: Request) -> dict[str, Any]:
    """Say whether the cluster answers: 503 until a token has passed all stages of its plan."""
    readiness: Readiness = request.app.state.readiness
    found = await readiness.check()
    return {"status": "ready", "epoch": found.epoch}
