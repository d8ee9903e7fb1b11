"""Joins routes and middleware to one ASGI application."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from distributed_llm.api import errors
from distributed_llm.api.authentication import Authentication
from distributed_llm.api.bodies import invalid_body
from distributed_llm.api.callers import Callers
from distributed_llm.api.ending import Ending, told
from distributed_llm.api.errors import ApiError
from distributed_llm.api.guard.crowd import Crowd, Share
from distributed_llm.api.guard.envelope import Envelope, fault
from distributed_llm.api.guard.headers import HeaderLimits
from distributed_llm.api.guard.intake import Intake
from distributed_llm.api.guard.origins import Origins, own_names
from distributed_llm.api.guard.request_log import RequestLog
from distributed_llm.api.openai.plan_epoch import PlanEpoch
from distributed_llm.api.openai.responses.store import ResponseStore
from distributed_llm.api.operations.answer_meter import AnswerMeter, build_info
from distributed_llm.api.operations.feed import Feed
from distributed_llm.api.operations.http_meter import HttpMeter
from distributed_llm.api.operations.metrics import ClusterCollector
from distributed_llm.api.operations.readiness import Readiness
from distributed_llm.api.operations.traces import traces_of_environment
from distributed_llm.api.page.files import page_files, page_routes
from distributed_llm.api.register import Register, Registration
from distributed_llm.api.routes import ROUTERS
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.settings import ApiSettings

PUBLIC = frozenset({"/health/live", "/health/ready", *page_files()})
"""Paths that anybody may get: they tell nothing about requests, machines or keys."""

_DEFAULTS = ApiSettings()


def make_app(
    callers: Callers,
    settings: ApiSettings = _DEFAULTS,
    feed: Feed | None = None,
    ending: Ending | None = None,
) -> ASGIApp:
    """Return the API as an ASGI application.

    Args:
        callers: finds out who asks; closed when the application ends.
        settings: what is let in, and how much of it.
        feed: tells what the cluster does; whoever ends the application ends it first.
        ending: says when whoever runs the application has told it to end.
    """
    readiness, feed = Readiness(callers.own), feed or Feed()
    measured, of_cluster = CollectorRegistry(), ClusterCollector()
    measured.register(of_cluster)
    build_info(measured, version("distributedllm"))
    traces = traces_of_environment()
    register = Register(AnswerMeter(measured).ended, *([traces.ended] if traces else ()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await feed.close()
        await readiness.close()
        await callers.close()
        if traces:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="distributed_llm",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.callers = callers
    app.state.responses = ResponseStore()
    app.state.readiness = readiness
    app.state.feed = feed
    app.state.register = register
    app.state.plan_epoch = PlanEpoch()
    app.state.metrics = measured
    app.state.cluster_metrics = of_cluster
    for router in ROUTERS:
        app.include_router(router)
    app.router.routes.extend(page_routes())
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(DistributedLLMError, _package_error)
    app.add_exception_handler(RequestValidationError, _wrong_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)
    behind = guarded(Registration(app, register), callers, settings, ending)
    return HttpMeter(behind, measured)


def guarded(
    app: ASGIApp, callers: Callers, settings: ApiSettings, ending: Ending | None = None
) -> ASGIApp:
    """Return an application behind all that a request passes first; the last here is the first."""
    app = Intake(app, settings.max_body)
    app = Share(app, settings.max_requests_per_key)
    app = Authentication(app, callers, is_public)
    app = Crowd(app, settings.max_requests, is_public)
    app = Origins(app, {*own_names(), *settings.allowed_hosts})
    app = HeaderLimits(app)
    app = RequestLog(app, is_public)
    return Envelope(app, ending or Ending())


def application(guarded: Any) -> FastAPI:
    """Return the routes within what `make_app` returned, which describe themselves."""
    while not isinstance(guarded, FastAPI):
        guarded = guarded._app
    return guarded


def is_public(method: str, path: str) -> bool:
    """Return whether a request needs no key."""
    return method in ("GET", "HEAD") and path in PUBLIC


def _respond(request: Request, error: ApiError) -> Response:
    request_id = getattr(request.state, "request_id", "")
    return errors.response(error, request.url.path, request_id)


async def _api_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ApiError)
    return _respond(request, exc)


async def _package_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, DistributedLLMError)
    return _respond(request, told(exc, request.scope))


async def _wrong_body(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    return _respond(request, invalid_body(exc))


async def _fault(request: Request, exc: Exception) -> Response:
    """Tell a fault of ours, which is raised again, and then logged by `Envelope`."""
    return _respond(request, fault(getattr(request.state, "request_id", "")))


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
