"""What admins do to a cluster by the API: drain workers, let machines and programs in, and out."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from distributed_llm.api.asking import AskingAdmin
from distributed_llm.api.bodies import Body, StrictRoute
from distributed_llm.api.callers import Callers
from distributed_llm.api.operations.cluster import json_response
from distributed_llm.api.streaming import while_connected
from distributed_llm.client.new_key import new_key
from distributed_llm.common.messages import ClusterMembers
from distributed_llm.common.roles import Role

router = APIRouter(prefix="/api/v1", route_class=StrictRoute)

_DRAIN_WAIT_S = 10.0
"""Time after which it is said that a worker is leaving, if it has not left."""


class NewTokenBody(Body):
    """A token to be made.

    Attributes:
        uses: machines that may enrol by it; null for any number.
        lifetime_s: time for which they may, seconds; null for ever.
    """

    role: Literal["worker", "client", "admin"] = "worker"
    uses: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = 1
    lifetime_s: Annotated[float, Field(gt=0, le=1e9)] | None = 86_400.0


class NewKeyBody(Body):
    """A key to be made."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    role: Literal["client", "admin"] = "client"


@router.post("/workers/{name}/drain")
async def drain(name: str, request: Request, caller: AskingAdmin) -> Response:
    """Have a worker end once others have its layers; 202 if that takes long."""

    async def draining() -> bool:
        try:
            async with asyncio.timeout(_DRAIN_WAIT_S):
                await caller.client.drain_worker(name)
        except TimeoutError:
            return False
        return True

    left = await while_connected(request, draining())
    told = {"worker": name, "state": "left" if left else "leaving"}
    return json_response(told, 200 if left else 202)


@router.get("/members")
async def members(caller: AskingAdmin) -> Response:
    """Return the machines and programs that may connect, and the tokens by which others may."""
    return json_response(_told(await caller.client.members()))


@router.post("/tokens")
async def create_token(body: NewTokenBody, caller: AskingAdmin) -> dict[str, Any]:
    """Make a token; its line is for `dllm join`, and is shown this once."""
    token = await caller.client.create_token(
        Role(body.role), uses=body.uses, lifetime_s=body.lifetime_s
    )
    return {"id": token.id, "line": token.line, "addresses": token.addresses}


@router.delete("/tokens/{token_id}")
async def revoke_token(token_id: str, caller: AskingAdmin) -> dict[str, str]:
    """Let nobody enrol by a token any more."""
    await caller.client.revoke_token(token_id)
    return {"id": token_id}


@router.delete("/machines/{name}")
async def remove_machine(name: str, caller: AskingAdmin) -> dict[str, str]:
    """Let a machine or a key connect no more."""
    await caller.client.remove_machine(name)
    return {"name": name}


@router.post("/machines/{name}/readmit")
async def readmit_machine(name: str, caller: AskingAdmin) -> dict[str, str]:
    """Let a machine connect again that is quarantined."""
    await caller.client.readmit_machine(name)
    return {"name": name}


@router.post("/keys")
async def create_key(body: NewKeyBody, request: Request, caller: AskingAdmin) -> dict[str, str]:
    """Make a key for a program; it is shown this once. Its name may be another one, if taken."""
    callers: Callers = request.app.state.callers
    key = await new_key(caller.client, callers.address, body.name, Role(body.role))
    return {"name": key.name, "role": body.role, "key": key.text}


def _told(found: ClusterMembers) -> dict[str, Any]:
    return {
        "machines": [
            {
                "name": one.name,
                "role": one.role,
                "enrolled_at": one.enrolled_at,
                "sessions": one.sessions,
                "quarantined_s": one.quarantined_s,
            }
            for one in found.machines
        ],
        "tokens": found.tokens,
        "addresses": found.addresses,
    }
