"""`/api/model/process`: a text goes in, what the model makes of it comes out, and how."""

import time
from typing import Any

from fastapi import APIRouter, Request

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import Body, StrictRoute
from distributed_llm.api.streaming import while_connected

router = APIRouter(route_class=StrictRoute)


class ProcessBody(Body):
    """A text to be processed.

    Attributes:
        metadata: of whoever asks; it changes nothing.
    """

    text: str
    metadata: dict[str, Any] | None = None


@router.post("/api/model/process")
async def process(body: ProcessBody, request: Request, caller: Asking) -> dict[str, Any]:
    """Return how the model continues a text, the milliseconds it took, and by how many workers."""
    began = time.monotonic()
    generation = await while_connected(request, caller.client.generate(body.text, details=True))
    workers = {stage.worker for stage in generation.timings.stages}
    return {
        "text": generation.text,
        "processingTime": round((time.monotonic() - began) * 1000, 2),
        "nodeCount": len(workers),
    }
