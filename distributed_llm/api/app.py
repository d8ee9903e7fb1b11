"""Joins routes and middleware to one ASGI application."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from distributed_llm.api import errors
from distributed_llm.api.authentication import Authentication
from distributed_llm.api.bodies import invalid_body
from distributed_llm.api.callers import Callers
from distributed_llm.api.errors import ApiError
from distributed_llm.api.openai import models
from distributed_llm.common.errors import DistributedLLMError

_ROUTERS = (models.router,)

PUBLIC = frozenset({("GET", "/health/live"), ("GET", "/health/ready")})
"""Requests that need no key, by method and path; besides the files of the page."""


def make_app(callers: Callers) -> ASGIApp:
    """Return the API as an ASGI application.

    Args:
        callers: finds out who asks; closed when the application ends.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await callers.close()

    app = FastAPI(
        title="distributed_llm",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.callers = callers
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(DistributedLLMError, _package_error)
    app.add_exception_handler(RequestValidationError, _wrong_body)
    app.add_exception_handler(HTTPException, _http_error)
    return Authentication(app, callers, lambda method, path: (method, path) in PUBLIC)


def _respond(request: Request, error: ApiError) -> Response:
    request_id = getattr(request.state, "request_id", "")
    return errors.response(error, request.url.path, request_id)


async def _api_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ApiError)
    return _respond(request, exc)


async def _package_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, DistributedLLMError)
    return _respond(request, errors.of_exception(exc))


async def _wrong_body(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    return _respond(request, invalid_body(exc))


async def _http_error(request: Request, exc: Exception) -> Response:
    """Tell an error of the framework: no such path, a method that a path has not."""
    assert isinstance(exc, HTTPException)
    path = request.url.path
    what = {
        404: f"There is nothing at {path!r:.200}. See /openapi.json for what there is.",
        405: f"{path!r:.200} is not asked by {request.method}.",
    }.get(exc.status_code, str(exc.detail))
    headers = exc.headers or {}
    return _respond(request, ApiError(exc.status_code, what, headers=headers))
