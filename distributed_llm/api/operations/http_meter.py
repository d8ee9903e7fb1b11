"""ASGI middleware that counts and times requests, by the route that served them."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

NO_ROUTE = "none"
"""Handler of requests that no route served: no such path, or refused before."""

_CUT = 499
"""Status of a request that ended without a response."""

_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)


class HttpMeter:
    """Keeps `http_requests_total` and `http_request_duration_seconds`.

    Their labels have closed sets of values, whatever clients send: routes in place of paths.

    Args:
        registry: that the metrics are added to.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._clock = clock
        self._requests = Counter(
            "http_requests_total",
            "Requests over HTTP that are over.",
            ("handler", "method", "status"),
            registry=registry,
        )
        self._durations = Histogram(
            "http_request_duration_seconds",
            "From the request's head to the end of the response.",
            ("handler", "method"),
            buckets=_BUCKETS,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = self._clock(), _CUT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            handler = getattr(scope.get("route"), "path", NO_ROUTE)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(handler, method, status).inc()
            self._durations.labels(handler, method).observe(self._clock() - began)
