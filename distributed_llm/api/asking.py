"""Who asks, as routes get it."""

from typing import Annotated

from fastapi import Depends, Request

from distributed_llm.api.callers import Caller
from distributed_llm.api.errors import ApiError


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _admin(request: Request) -> Caller:
    caller = _caller(request)
    if not caller.is_admin:
        raise ApiError(
            403,
            f"{caller.name or 'A request without a key'} may ask the model, and this takes the "
            "role admin. `dllm key create --role admin` makes a key that has it.",
            "permission_error",
            "not_allowed",
        )
    return caller


Asking = Annotated[Caller, Depends(_caller)]
"""Parameter of a route: whoever asks."""

AskingAdmin = Annotated[Caller, Depends(_admin)]
"""Parameter of a route that is for admins only: who asks."""
